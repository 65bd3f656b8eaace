"""When a run saves: at once or in the background, and what a save that fails does to the run."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpmae.engine.base import Engine
from mpmae.errors import CheckpointError
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.engine_state import snapshot_engine, write_engine

_LEAVE_S = 30.0
_LOG = logging.getLogger(__name__)


class Saver:
    """Saves an engine's state into checkpoints. A save that fails is told, and the run goes on to the next one.

    in_background: `save` returns when the state is copied to host memory, and a thread writes it; `poll` completes the
    checkpoint at a step boundary. num_failed: saves so far that have not made a checkpoint. took: told the seconds of each
    save, from its beginning to the end of its writing.
    Methods but `close` are collective.
    """

    def __init__(
        self, engine: Engine, checkpoints: Checkpoints, in_background: bool, took: Callable[[float], None] = lambda _: None
    ):
        self._engine, self._checkpoints, self._in_background, self._took = engine, checkpoints, in_background, took
        self._pending: _Pending | None = None
        self.num_failed = 0

    @property
    def is_saving(self) -> bool:
        """Whether a save is pending, which the next one will wait for. Not collective."""
        return self._pending is not None

    def save(self, step: int, meta: dict[str, Any], *, is_last: bool) -> None:
        """Save the state of `step`, once a pending save is done.

        Raises CheckpointError if it fails and `is_last`: then there is no other one to make up for it.
        """
        self._finish()
        started = time.monotonic()
        try:
            if not self._in_background:
                self._checkpoints.save(step, write_engine(self._engine), meta)
                self._took(time.monotonic() - started)
                return
            folder = self._checkpoints.begin(step)
            self._pending = _Pending(step, meta, snapshot_engine(self._engine), folder, started)
        except CheckpointError as error:
            self._failed(step, error, is_last)
        if is_last:
            self._finish(is_last=True)

    def poll(self) -> None:
        """Complete the pending save if every rank has written its part. To be called after each step; cheap."""
        if self._pending and self._pending.is_written_everywhere(self._engine):
            self._finish()

    def close(self) -> None:
        """Leave a pending save, which no other rank may be there to complete; not collective."""
        if self._pending:
            self._pending.thread.join(_LEAVE_S)

    def _finish(self, *, is_last: bool = False) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._checkpoints.complete(pending.step, pending.wait, pending.meta)
            self._took(pending.took_s)
        except CheckpointError as error:
            self._failed(pending.step, error, is_last)

    def _failed(self, step: int, error: CheckpointError, is_last: bool) -> None:
        if is_last:
            raise error
        self.num_failed += 1
        if self._engine.rank == 0:
            _LOG.error(
                "NO CHECKPOINT of step %d; the run goes on, and tries again when the next one is due: %s", step, error
            )


class _Pending:
    """A save that a thread writes. took_s: once it is written, seconds since it began at `started`."""

    def __init__(self, step: int, meta: dict[str, Any], write: Callable[[Path], None], folder: Path, started: float):
        self.step, self.meta, self.took_s = step, meta, 0.0
        self._error: BaseException | None = None
        self._vote: _Vote | None = None

        def run() -> None:
            try:
                write(folder)
            except BaseException as error:  # raised where it is waited for
                self._error = error
            self.took_s = time.monotonic() - started

        self.thread = threading.Thread(target=run, name=f"checkpoint-{step}", daemon=True)
        self.thread.start()

    def wait(self, folder: Path) -> None:
        """Returns, or raises what the thread raised, when the files are in `folder`."""
        self.thread.join()
        if self._error is not None:
            raise self._error

    def is_written_everywhere(self, engine: Engine) -> bool:
        """Whether all ranks had written their part when this was last asked: by then the answer is there on the host."""
        written = self._vote is not None and self._vote.count() == engine.world_size
        if not written:
            self._vote = _Vote(engine, not self.thread.is_alive())
        return written


class _Vote:
    """A sum over ranks that nothing waits for before it is read, a step later."""

    def __init__(self, engine: Engine, mine: bool):
        count = engine.sum_over_ranks(torch.tensor(float(mine), device=engine.device))
        self._event = None
        if count.is_cuda:
            count, self._event = count.to("cpu", non_blocking=True), torch.cuda.Event()
            self._event.record()
        self._count = count

    def count(self) -> int:
        """Ranks that said yes."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._count)
