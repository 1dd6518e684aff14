"""Files that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxfib.errors import ExportError


@contextmanager
def staging_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `path`, to write in; gone afterwards, whatever happened.

    Beside it, because a file can be renamed only within one file system.

    Raises:
        ExportError: the target is a folder, its parent is missing or cannot be written, or the
            disk is full (any OSError inside the block).
    """
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder, not a file to write.")
    staged: Path | None = None
    try:
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield staged
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def move_into_place(staged: Path, path: str | os.PathLike[str]) -> None:
    """Renames a finished file to its own name, on disk before it is seen."""
    with staged.open("rb+") as file:
        os.fsync(file.fileno())
    # Files get the permissions that `open` would have given them.
    mask = os.umask(0)
    os.umask(mask)
    staged.chmod(0o666 & ~mask)
    staged.replace(path)
