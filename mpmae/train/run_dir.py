"""The run folder: one run at a time, never another run's, writable from the first moment on."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from mpmae.config import RunConfig
from mpmae.engine import World
from mpmae.errors import ConfigError
from mpmae.run_lock import LOCK_NAME, lock_file
from mpmae.train.checkpoint import Checkpoints

PATIENCE_S = 1.0  # `mpmae-runs list` and `mpmae-checkpoint prune` hold the lock for an instant
_LOG = logging.getLogger(__name__)


def check_vacant(config: RunConfig) -> None:
    """ConfigError when the run would start anew in a folder that holds something; writes nothing."""
    folder, resume = config.run.dir, config.checkpoint.resume
    if resume == "auto" or _is_own_checkpoint(config):
        return
    if folder.is_dir() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        hint = "pass --resume auto to continue the run in it, or another run.dir"
        if resume != "never":
            hint = f"to start from {resume}, which is not one of its own checkpoints, give another run.dir"
        raise ConfigError(f"run.dir = {folder} is not empty; {hint}")


@contextlib.contextmanager
def claimed(config: RunConfig, world: World) -> Iterator[None]:
    """Hold the run folder for this run; every rank enters together.

    Raises ConfigError on every rank: another run is in it, it is not vacant (see `check_vacant`), or it cannot be written.
    """
    lock, problem = None, None
    if world.rank == 0:
        try:
            lock = _claim(config)
        except ConfigError as error:
            problem = str(error)
    problem = world.broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def find_start(config: RunConfig, world: World, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to continue from, the same on every rank; None to start anew."""
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return world.broadcast_object(checkpoints.latest() if world.rank == 0 else None)
    return Path(resume)


def _is_own_checkpoint(config: RunConfig) -> bool:
    folder = config.run.dir / "checkpoints"
    return folder.is_dir() and Path(config.checkpoint.resume).resolve().parent == folder.resolve()


def _claim(config: RunConfig) -> int:
    """The descriptor of the locked lock file."""
    folder = config.run.dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run.dir = {folder} cannot be written: {error.strerror}; give another run.dir") from error
    try:
        lock_file(lock, PATIENCE_S)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(f"run.dir = {folder} is in use by another run; wait for it, or give another run.dir") from None
    except OSError as error:  # some network file systems have no locks, and runs must work there too
        _LOG.warning("%s cannot be locked (%s): nothing keeps a second run out of it", folder, error.strerror)
    try:
        check_vacant(config)
    except ConfigError:
        os.close(lock)
        raise
    return lock
