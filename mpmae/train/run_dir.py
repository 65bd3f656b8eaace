"""The run folder: one run at a time, never another run's, writable from the first moment on."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mpmae.config import RunConfig
from mpmae.engine import World
from mpmae.errors import ConfigError
from mpmae.run_lock import LOCK_NAME, claim_folder
from mpmae.train.checkpoint import Checkpoints


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
    lock = claim_folder(config.run.dir, "run.dir", "run")
    try:
        check_vacant(config)
    except ConfigError:
        os.close(lock)
        raise
    return lock
