"""What every test may rely on: a fixed seed, one thread, and the data where there is any."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No deadline: the first example of a run pays for imports.  Derandomized: a red test stays red.
settings.register_profile("fxfib", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fxfib")
torch.set_num_threads(1)

# Triton decides at its import whether kernels are interpreted, as they must be without a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """The same random numbers whatever ran before; the global state of torch is put back."""
    default_dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(default_dtype)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that holds the tests; a wheel test has the package from elsewhere."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it are skipped where there is none."""
    value = os.environ.get("FXFIB_DATA")
    if not value:
        pytest.skip("FXFIB_DATA is not set: no real data here")
    root = Path(value)
    if not root.is_dir():
        pytest.fail(f"FXFIB_DATA={value} is not a folder")
    return root.resolve()
