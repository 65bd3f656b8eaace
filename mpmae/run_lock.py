"""The lock by which a run holds its folder, for those who want to know whether it runs."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = ".lock"


@contextlib.contextmanager
def lock_if_free(run_dir: Path) -> Iterator[bool]:
    """Hold the lock of a run folder for the block; False where a run holds it. Where there are no locks it counts as free.

    Raises OSError when the lock cannot be opened.
    """
    if not (run_dir / LOCK_NAME).exists():
        yield True
        return
    descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR)
    try:
        try:
            lock_file(descriptor)
        except BlockingIOError:
            yield False
            return
        except OSError:  # some network file systems have none
            pass
        yield True
    finally:
        os.close(descriptor)


def lock_file(descriptor: int, patience_s: float = 0.0) -> None:
    """Lock an open file. Raises BlockingIOError when another process holds it all that time, OSError without locks."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
