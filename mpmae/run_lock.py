"""The lock by which a run holds its folder, for those who want to know whether it runs."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mpmae.errors import ConfigError

LOCK_NAME = ".lock"
PATIENCE_S = 1.0  # `mpmae-runs list` and `mpmae-checkpoint prune` hold the lock for an instant
_LOG = logging.getLogger(__name__)


def claim_folder(folder: Path, key: str, who: str) -> int:
    """The descriptor of a folder's lock, held until it is closed; the folder is made if need be.

    key: of the configuration that names the folder. who: holds such folders, for messages. Raises ConfigError: another
    process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"{key} = {folder} cannot be written: {error.strerror}; give another {key}") from error
    try:
        lock_file(lock, PATIENCE_S)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(f"{key} = {folder} is in use by another {who}; wait for it, or give another {key}") from None
    except OSError as error:  # some network file systems have no locks, and work must go on there too
        _LOG.warning("%s cannot be locked (%s): nothing keeps a second %s out of it", folder, error.strerror, who)
    return lock


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
