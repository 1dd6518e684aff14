"""The report as a page: one file, inert names, renders in a real browser without complaint."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

import fxfib
from fxfib import layers as layer_data
from fxfib.layers import Layer, decode, encode
from fxfib.report import Group, Refusal, Report

from browsing import HOSTILE, browser, opened


def network() -> nn.Sequential:
    """7 - 11 - 5 - 3; hidden nodes 1 and 3 are parallel, 2 and 5 equal, 6 constant, 7 unread."""
    model = nn.Sequential(
        nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 3)
    ).eval()
    with torch.no_grad():
        first, second = model[0], model[2]
        first.weight[3], first.bias[3] = 2.5 * first.weight[1], 2.5 * first.bias[1]
        first.weight[5], first.bias[5] = first.weight[2], first.bias[2]
        first.weight[6] = 0.0
        first.bias[6] = 0.75
        second.weight[:, 7] = 0.0
    return model


@pytest.fixture(scope="module")
def report() -> Report:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fxfib.compile(network(), 0.0, torch.randn(4, 7)).fibration


def large(count: int, names=lambda index: f"layers.{index}.linear", nodes: int = 256) -> Report:
    """A chain of layers of which every third node is merged into its neighbour."""
    slots = tuple(node - (node + 2) // 3 for node in range(1, nodes + 1))
    fibers = max(slots) + 1
    layers = tuple(
        Layer(names(i), "linear", i, () if i == 0 else (i - 1,), slots) for i in range(count)
    )
    groups = tuple(Group((names(i),), nodes, fibers, nodes - fibers, 0, 0, 0) for i in range(count))
    refusals = tuple(
        Refusal(names(i), "aten.sort", names(i), names(i)) for i in range(min(count, 5))
    )
    return Report(
        names(0), 0.0, "fibration", "float32", "cpu", 1000, 500, 1000, 500, 0.0, 0.0, 0.0, 1e-4,
        groups=groups, refusals=refusals, notes=(names(1),), layers=layers,
    )  # fmt: skip


def test_layers_say_where_every_node_went(report):
    first, second, third = report.layers
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]
    assert (first.inputs, second.inputs, third.inputs) == ((), (0,), (1,))
    assert first.slots[1] == first.slots[3] and first.slots[2] == first.slots[5]
    assert (first.slots[6], first.slots[7]) == (layer_data.CONSTANT, layer_data.UNREAD)
    assert first.fibers == 7 == report.groups[first.group].fibers
    assert first.before.shape == (11, 7) and first.after.shape == (7, 7)
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_residual_layers_share_a_group_and_edges_skip():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None).eval()
    layers = fxfib.compile(model, 0.0, torch.randn(2, 3, 32, 32), verify=False).fibration.layers
    by_name = {layer.name: layer for layer in layers}
    assert by_name["conv1"].group == by_name["layer1.1.conv2"].group
    read = {layers[i].name for i in by_name["layer1.1.conv1"].inputs}
    assert read == {"conv1", "layer1.0.conv2"}


@pytest.mark.parametrize(
    "slots", [(), (0,), (0, 1, 2, 3), (0, 1, 2, 1, 0, -1, -2, 3, 4), (-1, -1), (5, 4, 3, 3, 4, 5)]
)
def test_slots_as_text(slots):
    assert decode(encode(slots)) == slots


def test_bad_slots_are_refused():
    with pytest.raises(fxfib.LoadError, match="no range"):
        decode("0-x")


def test_thumbnails_show_magnitudes():
    weight = torch.zeros(300, 7)
    weight[:150] = -2.0
    picture = layer_data.thumbnail(weight, torch.arange(300).numpy(), None, 10)
    assert (picture.rows, picture.columns, picture.shape, picture.peak) == (10, 7, (300, 7), 2.0)
    import base64

    pixels = base64.b64decode(picture.pixels)
    assert set(pixels[: 5 * 7]) == {255} and set(pixels[5 * 7 :]) == {0}


def test_one_small_file_without_network(report, tmp_path):
    path = tmp_path / "report.html"
    report.to_html(path)
    text = path.read_text(encoding="utf-8")
    assert len(text) < 100_000
    # Nothing but the name space of SVG looks like an address.
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|script src)", text)
    assert "default-src 'none'" in text
    with pytest.raises(fxfib.ExportError, match="cannot be written"):
        report.to_html(tmp_path / "missing" / "report.html")


def test_names_cannot_leave_the_data():
    from fxfib.page import page

    for name in HOSTILE:
        text = page(large(3, lambda index, name=name: f"{index}{name}"))
        assert text.count("<script") == 2 and text.count("</script>") == 2
        assert "<img" not in text and len(text) < 100_000


@browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_renders_in_a_browser(report, tmp_path, theme):
    path = tmp_path / "report.html"
    report.to_html(path)
    dom, said = opened(path, theme)
    assert not said, said
    assert f'data-theme="{theme}"' in dom and 'data-ready="yes"' in dom
    for text in ("166 → 114", "exact", "1, 3", "2, 5", "kept at full width", "11 × 7"):
        assert text in dom, text


FRONTIER = tuple(
    fxfib.report.Point(100 * n, 50 * n, {"0": 0.1 / n}, 0.1 / n, 1.0 / n, True, n == 3)
    for n in range(1, 6)
)


@browser
def test_frontier_and_latency_in_a_browser(report, tmp_path):
    from fxfib.benchmarking import Benchmark, Row

    row = Row("onnxruntime", "cpu", 8, 5, 2.0, 1.9, 2.2, 1.0, 0.9, 1.1, 2.0, 1.8, 2.1, 0.0, 0.0)
    result = Benchmark("Net", 10, 5, 10, 5, (row,), {}, "on a quiet machine")
    path = tmp_path / "report.html"
    dataclasses.replace(report, frontier=FRONTIER).to_html(path, result)
    dom, said = opened(path)
    assert not said, said
    for text in ("measured loss", "onnxruntime", "2.00 ×", "on a quiet machine"):
        assert text in dom, text
    assert dom.count("<circle") == len(FRONTIER)


@browser
def test_eps_curve_in_a_browser(report, tmp_path):
    torch.manual_seed(0)
    curve = fxfib.eps_curve(network(), torch.randn(4, 7), eps=(0.5, 0.0, 0.1), progress=False)
    path = tmp_path / "report.html"
    report.to_html(path, curve=curve)
    dom, said = opened(path)
    assert not said, said
    assert "parameters kept" in dom and "relative error" in dom
    assert dom.count("<circle") == 2 * len(curve)


@browser
def test_hostile_names_are_inert_in_a_browser(tmp_path):
    for number, name in enumerate(HOSTILE):
        path = tmp_path / f"{number}.html"
        large(4, lambda index, name=name: f"{index}{name}").to_html(path)
        dom, said = opened(path)
        assert not said, said
        assert 'data-ready="yes"' in dom
        assert re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1].startswith("fxfib: 0")


@browser
def test_a_broken_page_would_be_noticed(report, tmp_path):
    path = tmp_path / "report.html"
    report.to_html(path)
    path.write_text(
        path.read_text(encoding="utf-8").replace("function showLayer", "function other")
    )
    dom, said = opened(path)
    assert said and 'data-ready="yes"' not in dom


@browser
def test_a_thousand_layers(tmp_path):
    path = tmp_path / "report.html"
    large(1000, nodes=1024).to_html(path)
    assert path.stat().st_size < 5_000_000
    # By the page's own clock, which the wait for virtual time does not move: a loose bound, as no
    # machine is known here; bench/page.py measures it.
    clock = "addEventListener('load', () => document.body.dataset.took = performance.now())"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", f"<script>{clock}</script></body>"))
    dom, said = opened(path)
    assert not said and 'data-ready="yes"' in dom
    assert float(re.search(r'data-took="([\d.]+)"', dom)[1]) < 30_000


def test_figures(report):
    pytest.importorskip("matplotlib")
    groups, layers = report.plot()
    assert "nodes of every group" in groups.axes[0].get_title()
    assert len(layers.axes[0].images) == 3
    (*_, frontier) = dataclasses.replace(report, frontier=FRONTIER).plot()
    assert len(frontier.axes[0].lines[0].get_xdata()) == len(FRONTIER)
    curve = tuple(fxfib.CurvePoint(n / 4, 100 - n, 50, 1 - n / 100, n / 50) for n in range(4))
    (*_, drawn) = report.plot(curve)
    assert [len(axes.lines[0].get_xdata()) for axes in drawn.axes] == [4, 4]
    hostile = dataclasses.replace(large(3, lambda index: f"${index}_{{" + "n" * 500))
    for figure in hostile.plot():
        figure.canvas.draw()


def test_command_line_writes_pages(report, tmp_path, capsys):
    from fxfib.cli import main

    saved, path = tmp_path / "report.json", tmp_path / "page.html"
    saved.write_text(report.to_json(), encoding="utf-8")
    assert main(["report", str(saved), "--html", str(path)]) == 0
    assert "The model, colored by fiber" in path.read_text(encoding="utf-8")
    assert "wrote" in capsys.readouterr().err
