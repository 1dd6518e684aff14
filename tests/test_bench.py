"""The benchmark of the coloring checks what it times; no time is asserted here."""

import argparse
import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "bench"))


def options(**changed) -> argparse.Namespace:
    found = {"device": "cpu", "rounds": 2, "limit": 60.0, "memory": 4.0, "seconds": {}}
    return argparse.Namespace(**found | changed)


@pytest.mark.parametrize("kind", ["random", "planted", "network"])
@pytest.mark.parametrize("share", ["0", "1e-2", "half"])
def test_every_provider_is_right(kind: str, share: str) -> None:
    import coloring as bench
    from inputs import Case

    rows = bench.measure(Case(kind, 48, 16, share), options())
    assert {row["status"] for row in rows} == {"right"}
    others = {"torch.cdist", "scipy", "scikit-learn"}
    expected = {"torch.unique", "torch.sum"} if share == "0" else others
    assert {row["provider"] for row in rows} == {"fxfib", "reference"} | expected
    assert all(float(row["seconds"]) > 0 and row["rounds"] == 2 for row in rows)
    if share == "half":
        (ours,) = (row for row in rows if row["provider"] == "fxfib")
        assert 20 <= ours["colors"] <= 28


def test_wrong_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import coloring as bench
    from check import wrong
    from inputs import Case, make
    from registry import PROVIDERS, Provider

    case = Case("planted", 40, 8, "1e-2")
    rows, eps, planted = make(case)
    assert wrong(rows, eps, planted, "colors", planted) is None
    assert "diameter" in wrong(rows, eps, torch.zeros_like(planted), "colors", planted)
    assert "partition" in wrong(rows, eps, torch.arange(40), "colors", planted)
    assert "cuts" in wrong(rows, eps, torch.arange(40), "components", planted)
    assert wrong(rows, eps, torch.zeros_like(planted), "components", planted) is None
    lazy = Provider(
        "lazy", lambda rows, eps: torch.arange(len(rows)), True, True, "colors", 0, ("cpu",)
    )
    monkeypatch.setitem(PROVIDERS, "lazy", lazy)
    found = {row["provider"]: row for row in bench.measure(case, options())}
    assert "partition" in found["lazy"]["status"] and "seconds" not in found["lazy"]
    assert found["fxfib"]["status"] == "right"


def test_what_does_not_fit_is_left_out() -> None:
    import coloring as bench
    from inputs import Case
    from registry import PROVIDERS

    case = Case("random", 65536, 512, "1e-3")
    assert "GiB" in bench.suits(PROVIDERS["scikit-learn"], case, options())
    assert bench.suits(PROVIDERS["fxfib"], case, options()) is None
    assert bench.suits(PROVIDERS["torch.unique"], case, options()) == ""


def test_runs_resumes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import coloring as bench
    from inputs import Case

    some = [Case("random", 40, 8, "1e-3"), Case("planted", 600, 8, "1e-3")]
    monkeypatch.setattr(bench, "cases", lambda quick: some[: 1 + quick])
    output = tmp_path / "rows.csv"
    assert bench.main(["--rounds", "1", "--output", str(output)]) == 0
    first = output.read_text()
    assert bench.main(["--quick", "--rounds", "1", "--output", str(output)]) == 0
    assert output.read_text().startswith(first)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["count"] for row in rows} == {"40", "600"}
    assert "faster than" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    import plot

    for picture in plot.draw(output):
        assert picture.stat().st_size > 10_000


def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    import coloring as bench

    assert bench.main(["--device", "cuda"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
