"""The report's page: how large it is, and how long a browser takes to open it.

    python bench/page.py    # needs Chromium or Chrome on PATH; about two minutes

Seconds are the page's own clock (`performance.now`) when it is loaded, its script has run and it is
laid out: the median and the worst of several opens, each in a fresh headless browser.  Rows go to
bench/results/page.csv.
"""

import argparse
import itertools
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import read, write

RESULTS = Path(__file__).resolve().parent / "results" / "page.csv"
NAMES = ("mlp", "resnet50", "thousand_layers")
COLUMNS = (
    "model", "layers", "bytes", "write_s", "open_s", "open_worst_s", "opens", "browser", "machine",
    "fxfib",
)  # fmt: skip
# Reading a height makes the browser lay the page out.
CLOCK = (
    "addEventListener('load', () => { document.body.offsetHeight; "
    "document.body.dataset.took = performance.now(); })"
)


def report_of(name: str) -> Any:
    """The report of a network with fibers."""
    import torch
    from torch import nn

    import fxfib

    torch.manual_seed(0)
    if name == "resnet50":
        import torchvision

        images = torch.randn(2, 3, 64, 64)
        wide = fxfib.lift(torchvision.models.resnet50(weights=None).eval(), 1.5, images)
        return fxfib.compile(wide, 0.0, images).fibration
    widths = (784, 512, 512, 10) if name == "mlp" else (*[64] * 1000, 10)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    with torch.no_grad():
        for layer in layers[:-2:2]:
            layer.weight.normal_(0, (2 / layer.in_features) ** 0.5)
            layer.weight[8:24], layer.bias[8:24] = layer.weight[4], layer.bias[4]
    return fxfib.compile(model, 0.0, torch.randn(2, widths[0])).fibration


def opened(browser: str, path: Path, profile: Path) -> float:
    """Seconds until the page is laid out."""
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--window-size=1300,1600", "--virtual-time-budget=3000", "--dump-dom", f"file://{path}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    if 'data-ready="yes"' not in done.stdout:
        raise SystemExit(f"{path.name} did not finish its script")
    found = re.search(r'data-took="([\d.]+)"', done.stdout)
    if found is None:
        raise SystemExit(f"{path.name} was not laid out")
    return float(found[1]) / 1e3


def measure(name: str, browser: str, opens: int) -> dict[str, Any]:
    """One row."""
    import fxfib
    from fxfib import timing

    report = report_of(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.html"
        start = time.perf_counter()
        report.to_html(path)
        seconds, size = time.perf_counter() - start, path.stat().st_size
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</body>", f"<script>{CLOCK}</script></body>"))
        times = [opened(browser, path, Path(folder) / f"profile{n}") for n in range(opens)]
    version = subprocess.run([browser, "--version"], capture_output=True, text=True).stdout.strip()
    return {
        "model": name, "layers": len(report.layers), "bytes": size, "write_s": seconds,
        "open_s": statistics.median(times), "open_worst_s": max(times), "opens": opens,
        "browser": version, "machine": timing.processor(), "fxfib": fxfib.__version__,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NAMES)}; by default all")
    parser.add_argument("--opens", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, browsers), None)
    if browser is None:
        print("no Chromium or Chrome on PATH", file=sys.stderr)
        return 1
    rows = [measure(name, browser, options.opens) for name in options.models or NAMES]
    write(options.output, rows, COLUMNS, digits=3)
    for row in read(options.output):
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
