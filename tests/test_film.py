"""The film of a training run: one file, inert names, moves in a real browser without complaint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfib
from fxfib.film import MOST_FRAMES, film, thinned
from fxfib.history import History, Look
from fxfib.vital_signs import VitalSigns

from browsing import HOSTILE, browser, opened

SIGNS = VitalSigns(0, 1.0, 1.0)


def run(names: tuple[str, ...] = ("first", "second"), looks: int = 5) -> History:
    """Two layers of 7 nodes, in which one node more joins node 2 at every look."""
    history = History({names[0]: (), names[1]: (names[0],)})
    for step in range(looks):
        alone = [node if node < 3 else max(2, node - step) for node in range(7)]
        labels = torch.tensor(alone, dtype=torch.int32).unique(return_inverse=True)[1].int()
        found = {names[0]: labels, names[1]: torch.arange(7, dtype=torch.int32)}
        kinds = dict.fromkeys(("fiber", "opfiber", "cover"), found)
        history.add(Look(10 * step, kinds, dict.fromkeys(names, SIGNS)))
    history.logged = {(0, "accuracy"): 0.1, (40, "accuracy"): 0.75, (40, "worse"): float("nan")}
    return history


def write(history: History, path: Path) -> Path:
    path.write_text(film(history, "Net", "cosine 0.7"), encoding="utf-8")
    return path


@browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_looks_in_a_browser(tmp_path: Path, theme: str) -> None:
    path = write(run(), tmp_path / "film.html")
    dom, said = opened(path, theme)
    assert not said, said
    assert f'data-theme="{theme}"' in dom and 'data-ready="yes"' in dom
    assert '<option value="cover" selected="">' in dom
    for text in ("step 40", "Net in training", "7 nodes, 3 covers", "accuracy 0.750",
                 "2–6", "2–5 | 6"):  # fmt: skip
        assert text in dom, text
    dom, said = opened(path, theme, "&frame=0&symmetry=fiber")
    assert not said, said
    assert '<option value="fiber" selected="">' in dom
    for text in ("step 0", "7 nodes, 7 fibers", "Every node is a fiber of its own", "first look"):
        assert text in dom, text


@browser
def test_plays_to_the_end(tmp_path: Path) -> None:
    dom, said = opened(write(run(), tmp_path / "film.html"), "light", "&frame=0&play")
    assert not said, said
    assert "step 40" in dom and "step 0<" not in dom


@browser
def test_a_broken_film_would_be_noticed(tmp_path: Path) -> None:
    path = write(run(), tmp_path / "film.html")
    path.write_text(path.read_text().replace("function moveCursor", "function other"))
    dom, said = opened(path)
    assert said and 'data-ready="yes"' not in dom


@browser
def test_hostile_names_are_inert(tmp_path: Path) -> None:
    for number, name in enumerate(HOSTILE):
        text = film(run((name, "other" + name)), name, name)
        assert text.count("<script") == 2 and text.count("</script>") == 2
        assert "<img" not in text and len(text) < 100_000
        path = tmp_path / f"{number}.html"
        path.write_text(text, encoding="utf-8")
        dom, said = opened(path)
        assert not said, said
        assert 'data-ready="yes"' in dom and "step 40" in dom
        assert re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1].startswith("fxfib: ")


def test_one_file_without_network_of_a_real_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    monitor = fxfib.Monitor(model, torch.randn(4, 3), every=1)
    monitor.step()
    path = tmp_path / "film.html"
    monitor.to_html(path)
    text = path.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|script src)", text)
    assert "default-src 'none'" in text
    with pytest.raises(fxfib.ExportError, match="cannot be written"):
        monitor.to_html(tmp_path / "missing" / "film.html")


def test_long_runs_are_thinned() -> None:
    history = run(looks=1000)
    looks = thinned(history)
    assert len(looks) == MOST_FRAMES
    assert (looks[0], looks[-1]) == (history.looks[0], history.looks[-1])
    assert "240 of 1000 looks" in film(history, "Net", "cosine")
    assert len(thinned(run(looks=7))) == 7


@browser
def test_one_look_is_a_picture(tmp_path: Path) -> None:
    path = write(run(looks=1), tmp_path / "picture.html")
    dom, said = opened(path)
    assert not said, said
    assert 'data-ready="yes"' in dom and "Net in training" not in dom
    assert '<option value="opfiber">' in dom
    for name in ("play", "frame", "speed", "curves-card", "changes"):
        assert re.search(rf'id="{name}"[^>]*hidden', dom), name
