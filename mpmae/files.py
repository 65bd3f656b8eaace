"""Files that are absent (or old) or complete, whatever happens while they are written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMP_SUFFIX = ".mpmae-tmp"


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file (text as UTF-8) aside, onto the disk, then rename it into place. Raises OSError, leaving no rest."""
    temp = path.with_name(path.name + TEMP_SUFFIX)
    try:
        write_synced(temp, data)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes | str) -> None:
    """Write a file (text as UTF-8) onto the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    `path` is absent or an empty folder. Raises OSError.
    """
    temp = path.with_name(path.name + TEMP_SUFFIX)
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    try:
        yield temp
        for file in (*temp.rglob("*"), temp):
            sync(file)
        temp.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
