"""Files that are absent (or old) or complete, whatever happens while they are written, and JSON lines read back."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpmae.errors import TrainingError

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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if it is absent; a torn last line (a killed writer) is left out."""
    if not path.exists():
        return []
    objects = []
    for line in path.read_text().splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
        if not isinstance(objects[-1], dict):
            raise TrainingError(f"{path}: line {len(objects)} is not an object; move the file away or give another run.dir")
    return objects


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
