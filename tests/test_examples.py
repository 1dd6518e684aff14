"""The guides run, as they stand."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
WITH_FOLDER = {
    "image_model.py", "recurrent_model.py", "transformer.py", "read_the_report.py",
    "watch_training.py",
}  # fmt: skip
# They set up logging, or register a rule: in a process of their own.
ALONE = {"torch_compile.py", "write_a_rule.py"}
LAUNCHED_BY_ANOTHER = {"run_onnx.py"}


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - ALONE - LAUNCHED_BY_ANOTHER))
def test_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *([str(tmp_path)] if name in WITH_FOLDER else [])])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert any(tmp_path.iterdir()) == (name in WITH_FOLDER), "it writes what it says"


@pytest.mark.parametrize("name", sorted(ALONE))
def test_runs_alone(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_all_are_listed():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"[{name}]({name})" not in text] == []
