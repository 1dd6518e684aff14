"""Every kernel compiles for GPUs that are not here, and fits into their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What one block may use: 163 KiB of 164 with compute capability 8.0, 227 of 228 with 9.0.
LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024}

KERNELS = {"collapse", "merge", "tiles", "pairs", "hashes"}


def test_kernels_compile_for_two_architectures(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run(
        [sys.executable, program, *map(str, LARGEST_SHARED)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},  # nothing compiled before
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    for architecture, largest in LARGEST_SHARED.items():
        here = [line for line in compiled if line["architecture"] == architecture]
        assert {line["kernel"].split()[0] for line in here} == KERNELS
        assert max(line["shared"] for line in here) <= largest
