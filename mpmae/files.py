"""Files that are absent (or old) or complete, whatever happens while they are written."""

import os
from pathlib import Path

TEMP_SUFFIX = ".mpmae-tmp"


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file (text as UTF-8) aside, onto the disk, then rename it into place. Raises OSError, leaving no rest."""
    temp = path.with_name(path.name + TEMP_SUFFIX)
    try:
        with temp.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
