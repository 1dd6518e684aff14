"""The benchmark checks what it times, keeps what it has, says what holds; no time is asserted."""

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch, repository) -> None:
    monkeypatch.syspath_prepend(str(repository / "bench"))


def options(**changed) -> argparse.Namespace:
    found = {"device": "cpu", "rounds": 2, "limit": 60.0, "memory": 4.0, "peak": False}
    return argparse.Namespace(**found | changed)


def measured(*key, **changed):
    """Rows of a case, by provider."""
    from measure import measure
    from registry import PROVIDERS, Case

    case = Case(*key)
    names = [p.name for p in PROVIDERS[case.operation].values() if p.answers(case, "cpu")]
    return {row["provider"]: row for row in measure(case, names, options(**changed))}


@pytest.mark.parametrize("kind", ["random", "planted"])
# Distances of 16-bit numbers are full of ties, where scipy has an order of its own: none at "half".
@pytest.mark.parametrize(
    ("share", "dtype"),
    [("0", "float32"), ("1e-2", "float32"), ("half", "float32"), ("0", "bfloat16"),
     ("1e-2", "float16"), ("1e-2", "float64")],
)  # fmt: skip
def test_every_provider_is_right(kind, share, dtype):
    rows = measured("color", kind, 1, 48, 16, dtype, share)
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "right")
    others = {"torch.cdist", "scipy", "scikit-learn"}
    expected = {"torch.unique", "torch.sum"} if share == "0" else others
    assert set(rows) == {"fxfib", "reference"} | expected
    assert all(float(row["seconds_min"]) > 0 and row["rounds"] == 2 for row in rows.values())
    assert float(rows["fxfib"]["ratio_max"]) == 1.0
    if share == "half":
        assert 20 <= rows["fxfib"]["colors"] <= 28


@pytest.mark.parametrize(
    "key",
    [
        ("color_batch", "planted", 3, 41, 16, "float32", "1e-3"),
        ("color_batch", "random", 3, 41, 16, "bfloat16", "0"),
        ("collapse", "random", 1, 31, 43, "float32", "0"),
        ("merge", "random", 1, 43, 31, "float64", "0"),
    ],
)
def test_other_operations(key):
    rows = measured(*key)
    assert len(rows) >= 2
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "right")


def liar(monkeypatch, gives, answer, operation="color"):
    import measure  # noqa: F401  (the others are registered first)
    from registry import PROVIDERS, Provider

    monkeypatch.setitem(PROVIDERS[operation], "liar", Provider("liar", answer, gives))


@pytest.mark.parametrize("kind", ["random", "planted"])
@pytest.mark.parametrize(
    ("gives", "answer", "fault"),
    [
        ("colors", lambda p: torch.zeros(len(p.rows), dtype=torch.int64), "diameter"),
        ("colors", lambda p: torch.zeros(3, dtype=torch.int64), "labels for"),
        ("components", lambda p: torch.zeros(len(p.rows), dtype=torch.int64), "away from"),
        ("pairs", lambda p: torch.tensor(-1), "close pairs"),
    ],
)
def test_wrong_answers_have_no_time(monkeypatch, kind, gives, answer, fault):
    liar(monkeypatch, gives, answer)
    rows = measured("color", kind, 1, 40, 8, "float32", "1e-2")
    assert rows["liar"]["status"].startswith("wrong: ") and fault in rows["liar"]["status"]
    assert "seconds" not in rows["liar"] and rows["fxfib"]["status"] == "right"


def test_answers_that_promise_too_little_are_wrong(monkeypatch):
    liar(monkeypatch, "colors", lambda p: torch.arange(len(p.rows)))
    rows = measured("color", "planted", 1, 40, 8, "float32", "1e-2")
    assert "could be one" in rows["liar"]["status"]
    liar(monkeypatch, "components", lambda p: torch.arange(len(p.rows)))
    rows = measured("color", "planted", 1, 40, 8, "float32", "1e-2")
    assert "cuts a color" in rows["liar"]["status"]


def test_ours_can_be_wrong_too(monkeypatch):
    import measure  # noqa: F401
    from registry import OURS, PROVIDERS, Provider

    wrong = Provider(OURS, lambda p: torch.zeros(len(p.rows), dtype=torch.int64), "colors")
    monkeypatch.setitem(PROVIDERS["color"], OURS, wrong)
    rows = measured("color", "random", 1, 40, 8, "float32", "1e-2")
    assert rows[OURS]["status"].startswith("wrong") and "seconds" not in rows[OURS]
    assert rows["scipy"]["status"] == "right" and "ratio" not in rows["scipy"]


def test_wrong_sums(monkeypatch):
    liar(monkeypatch, "sums", lambda p: torch.zeros(31, 10), "collapse")
    assert "off by" in measured("collapse", "random", 1, 31, 43, "float32", "0")["liar"]["status"]


def test_colors_that_could_be_one_are_found_wherever_they_are():
    from check import differing, joinable

    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.integers(0, 4, (rng.integers(1, 9), 3)) / 4
        high = low + rng.integers(0, 2, low.shape) / 4
        eps = 0.5
        together = [
            (np.maximum(high[i], high[k]) - np.minimum(low[i], low[k])).max() <= eps
            for i in range(len(low))
            for k in range(i)
        ]
        assert joinable(low, high, eps) == any(together)
    assert differing(np.array([0, 0, 1, 2]), np.array([5, 5, 3, 4])) == 0
    assert differing(np.array([0, 0, 1, 2]), np.array([5, 5, 3, 3])) == 2


def test_what_does_not_fit_or_is_not_there_is_left_out(monkeypatch):
    monkeypatch.delenv("FXFIB_DATA", raising=False)
    rows = measured("color", "random", 1, 64, 8, "float32", "1e-2", memory=1e-5)
    assert "GiB" in rows["scikit-learn"]["status"] and "seconds" not in rows["scikit-learn"]
    assert rows["fxfib"]["status"] == "right"
    rows = measured("color", "trained", 1, 64, 8, "float32", "1e-2")
    assert {row["status"] for row in rows.values()} == {"left out: FXFIB_DATA is not set"}
    rows = measured("color", "random", 1, 2100, 2, "float32", "1e-5", limit=1e-9)
    assert rows["scipy"]["status"].startswith("left out: about 0 s")
    assert rows["fxfib"]["rounds"] == 1


def test_runs_resumes_and_draws(tmp_path: Path, monkeypatch, capsys):
    import coloring as bench
    from registry import Case

    some = [Case("color", "planted", 1, n, 512, "float32", "1e-3") for n in (40, 60)]
    monkeypatch.setattr(bench, "cases", lambda quick, device: some[: 1 + quick])
    output = tmp_path / "rows.csv"
    arguments = ["--rounds", "1", "--no-peak", "--output", str(output)]
    assert bench.main(arguments) == 0
    first = output.read_text()
    # An interruption leaves part of a line; the row that was lost is measured again.
    output.write_text(first[: first.rindex("torch.cdist") + 20])
    assert bench.main([*arguments, "--quick"]) == 0
    kept = "".join(first.splitlines(keepends=True)[:-1])
    assert output.read_text().replace("\r", "").startswith(kept.replace("\r", ""))
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(r["count"] for r in rows) == sorted(["40", "60"] * (len(rows) // 2))
    assert len({(r["count"], r["provider"]) for r in rows}) == len(rows)
    before = output.read_text()
    assert bench.main([*arguments, "--quick"]) == 0 and output.read_text() == before
    assert bench.main([*arguments, "--quick", "--force", "--only", "60"]) == 0
    assert len(output.read_text().splitlines()) == len(before.splitlines())
    assert "not measured" in capsys.readouterr().out
    output.with_name("old.csv").write_text("kind,count\nrandom,3\n")
    assert bench.main(["--output", str(output.with_name("old.csv"))]) == 1
    pytest.importorskip("matplotlib")
    import plot

    (picture,) = plot.draw(output)
    assert picture.stat().st_size > 10_000


def test_goals_hold_or_not(tmp_path: Path):
    import gates
    from coloring import COLUMNS

    def row(provider, count, share="1e-3", **figures):
        key = dict.fromkeys(COLUMNS, "") | {"operation": "color", "kind": "random", "batch": "1"}
        key |= {"count": str(count), "width": "512", "dtype": "float32", "share": share}
        return key | {"provider": provider, "status": "right", "rows_mib": "16"} | figures

    def verdict(rows, words):
        (found,) = (gate for gate in gates.cpu_gates(rows) if words in gate.goal)
        return found.holds

    spread = {"ratio_min": "1", "ratio_max": "99", "rounds": "3"}
    fast = [row(n, 8192, ratio=r, **spread) for n, r in (("scipy", "41"), ("scikit-learn", "50"))]
    goal = "random, n = 8192, eps 1e-3"
    assert verdict(fast, goal) is True and verdict([], goal) is None
    assert verdict([*fast, row("torch.cdist", 8192, ratio="39", **spread)], goal) is False
    assert verdict([*fast, row("fxfib", 8192) | {"status": "wrong: x"}], goal) is False
    for power, holds in ((1.2, True), (1.4, False)):
        counts = (4096, 8192, 16384, 32768, 65536)
        grown = [row("fxfib", n, seconds=str(n**power)) for n in counts]
        assert verdict(grown, "random, eps 1e-3: time grows") is holds
        assert verdict(grown[:-1], "random, eps 1e-3: time grows") is None
    for peak, holds in (("4000", True), ("4090", False)):
        held = [row("fxfib", 65536, peak_mib=peak, seconds="1")]
        assert verdict(held, "random, n = 65536, eps 1e-3") is holds
    assert any(line.startswith("wrong: y: scipy") for line in gates.summary(
        [row("scipy", 8192) | {"status": "wrong: y"}], "cpu"))  # fmt: skip
    table = tmp_path / "compile_cost.csv"
    table.write_text("model,lifted_by,compile_s\nresnet50,1.0,1.4\nresnet50,1.5,9\n")
    assert [gate.holds for gate in gates.compile_gates(table)] == [True, None, None]


def test_memory_is_measured_in_a_process_of_its_own():
    from inputs import make
    from measure import peak
    from registry import Case

    problem = make(Case("color", "random", 1, 1500, 8, "float32", "1e-3"))
    # All distances in float64, then the square of them.
    assert float(peak(problem, "scikit-learn", "cpu")) > 1500**2 * 8 / 2**20


def test_rows_of_trained_networks(data_root, monkeypatch):
    from inputs import make
    from registry import Case

    monkeypatch.setenv("FXFIB_DATA", str(data_root))
    problem = make(Case("color", "trained", 1, 300, 144, "float32", "1e-3"))
    assert problem.rows.shape == (300, 144) and problem.eps > 0


def test_compare_kernel_of_the_ceiling():
    pytest.importorskip("triton")
    from ceilings import close_pairs

    device = "cuda" if HAS_GPU else "cpu"
    columns = torch.randn(3, 128, device=device)
    expected = (columns.T[:, None] - columns.T[None]).abs().amax(dim=2) <= 0.5
    assert int(close_pairs(columns, 0.5)) == int(expected.sum())


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_no_gpu_is_one_line(capsys):
    import coloring as bench

    assert bench.main(["--device", "cuda"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_forms_of_a_residual_stream(monkeypatch):
    import residual
    from residual_networks import CifarResNet, copied

    monkeypatch.setattr(residual, "ROUNDS", 2)
    model, generator = CifarResNet(1).eval(), torch.Generator().manual_seed(1)
    for block in (model.layer1[0], model.layer2[0], model.layer3[0]):
        copied((block.conv2, block.bn2), generator)
    rows = residual.measure("copies", model, torch.randn(1, 3, 32, 32), None, 0.0)
    original, joint, index, auto = rows
    assert original["parameters"] == joint["parameters"] > index["parameters"]
    assert joint["indices"] == 0 < index["indices"]
    assert index["parameters"] <= auto["parameters"] <= joint["parameters"]
    assert all(row["error_float64"] < 1e-6 for row in rows[1:])
