"""Advisory locks (flock) on files that others may rename or remove meanwhile; a killed process loses its own."""

import fcntl
import os
from pathlib import Path


def try_lock(descriptor: int, kind: int) -> bool:
    """Whether a lock (`fcntl.LOCK_EX` or `LOCK_SH`) was to be had at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def open_if_locked(path: Path) -> int | None:
    """A descriptor of a file that somebody has locked; one that nobody has is removed."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    if not try_lock(descriptor, fcntl.LOCK_EX):
        return descriptor
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return None
