"""What the benches share: their CSV files, and the pictures of CIFAR-10."""

from __future__ import annotations

import importlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def tables(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    return importlib.import_module("tables")


@pytest.fixture
def cifar10(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    return importlib.import_module("cifar10")


def test_rows_come_back_as_text(tables: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    assert tables.read(path) == []
    tables.write(path, [{"a": 1 / 3, "b": "x"}, {"a": 2}], ("a", "b"), digits=3)
    assert tables.read(path) == [{"a": "0.333", "b": "x"}, {"a": "2", "b": ""}]


def test_a_write_that_fails_leaves_the_file(tables: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    tables.write(path, [{"a": 1}], ("a",))
    with pytest.raises(ValueError, match="not in fieldnames"):
        tables.write(path, [{"a": 2}, {"a": 3, "typo": 4}], ("a",))
    assert tables.read(path) == [{"a": "1"}] and list(tmp_path.iterdir()) == [path]


def test_the_first_pictures_of_every_class(cifar10: Any, tmp_path: Path) -> None:
    image = importlib.import_module("PIL.Image")  # torchvision brings it
    (tmp_path / "cifar10-jpeg").mkdir()
    with tarfile.open(tmp_path / "cifar10-jpeg" / "test.tar.gz", "w:gz") as archive:
        # Out of order, as an archive may be: names decide.
        for name, shade in (("ship/1", 90), ("cat/2", 30), ("cat/0", 10), ("cat/1", 20)):
            held = io.BytesIO()
            image.new("RGB", (32, 32), (shade, shade, shade)).save(held, "JPEG", quality=100)
            info = tarfile.TarInfo(f"test/{name}.jpg")
            info.size = held.tell()
            held.seek(0)
            archive.addfile(info, held)
    pictures, labels = cifar10.pictures(tmp_path, False, per_class=2)
    assert pictures.dtype == torch.uint8 and labels.tolist() == [0, 0, 1]
    shades = [10.0, 20.0, 90.0]
    assert pictures.float().mean((1, 2, 3)).tolist() == pytest.approx(shades, abs=1)
    assert len(cifar10.pictures(tmp_path, False)[1]) == 4
    wanted = torch.tensor(shades)[:, None] / 255 - torch.tensor(cifar10.MEAN)
    found = cifar10.normalized(pictures).mean((2, 3))
    torch.testing.assert_close(found, wanted / torch.tensor(cifar10.DEVIATION), atol=0.02, rtol=0)
