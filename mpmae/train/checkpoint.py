"""Writing checkpoints that are complete or absent; their layout is in `mpmae.checkpoint_format`.

Written aside, fsync, checkpoint.json, fsync, rename: a folder without `.partial` is whole. Reading it needs no deepspeed.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpmae.checkpoint_format import (
    ABANDONED,
    FORMAT_VERSION,
    LATEST_NAME,
    META_NAME,
    PARTIAL,
    abandoned,
    all_checkpoints,
    folder_name,
    leftovers,
    newest_checkpoint,
    remove_checkpoint,
    step_of,
)
from mpmae.engine.world import World, current_world
from mpmae.errors import CheckpointError
from mpmae.files import sync, write_synced

_LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoint folder of a run. `save` is collective; the rest is for any process, also without a run."""

    def __init__(self, folder: str | Path, keep_last: int, world: World | None = None):
        assert keep_last >= 1, keep_last
        self.folder = Path(folder)
        self.keep_last = keep_last
        self._world = world

    def save(self, step: int, write: Callable[[Path], None], meta: dict[str, Any]) -> Path:
        """The folder of a new complete checkpoint of `step` (steps done so far). All ranks call it together.

        Every rank's `write(folder)` writes its files below the given folder; after an error it still has to have taken part
        in all of its own collectives. `meta` is the plain data of checkpoint.json (see `checkpoint_meta`).

        Afterwards only the newest `keep_last` checkpoints are left. Checkpoints of this or a later step, which a
        run resumed from an older one finds, are set aside as `step-N.abandoned`; of those, too, `keep_last` are left.

        Raises CheckpointError on every rank if any of them failed (disk full, no permission); the checkpoints that were
        there are untouched.
        """
        self.begin(step)
        return self.complete(step, write, meta)

    def begin(self, step: int) -> Path:
        """The first half of `save`: an empty folder, in which `complete` expects to find the files."""
        world, partial = self._world or current_world(), self._partial(step)
        self._together(world, step, lambda: self._start(partial) if world.rank == 0 else None)
        return partial

    def complete(self, step: int, write: Callable[[Path], None], meta: dict[str, Any]) -> Path:
        """The second half of `save`; where the files are already being written, `write` waits for them."""
        world, partial = self._world or current_world(), self._partial(step)
        final = self.folder / folder_name(step)
        try:
            self._together(world, step, lambda: write(partial))
            self._together(world, step, lambda: self._commit(partial, final, step, meta) if world.rank == 0 else None)
        except CheckpointError:
            if world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # the next save removes what is still left
            raise
        if world.rank == 0:
            try:
                self._tidy(final, step)
            except OSError as error:  # the checkpoint is complete by now, and `latest()` finds it without the text file
                _LOG.warning("checkpoint %s is saved, but %s is not tidied up: %s", final, self.folder, error)
        return final

    def latest(self) -> Path | None:
        """See `newest_checkpoint`.

        With several ranks, rank 0 asks and tells the others, so that all agree on a shared file system.
        """
        return newest_checkpoint(self.folder)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps to `step-N.abandoned`. One process calls it."""
        for path in all_checkpoints(self.folder):
            if step_of(path) > step:
                self._set_aside(path, step)

    def _start(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in leftovers(self.folder):
            remove_checkpoint(path)
        partial.mkdir()

    def _commit(self, partial: Path, final: Path, step: int, meta: dict[str, Any]) -> None:
        files = {}
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                files[path.relative_to(partial).as_posix()] = path.stat().st_size
            sync(path)
        content = {**meta, "format_version": FORMAT_VERSION, "step": step, "files": files}
        write_synced(partial / META_NAME, json.dumps(content, indent=2))
        sync(partial)
        if final.exists():
            self._set_aside(final, step)
        partial.rename(final)
        sync(self.folder)

    def _tidy(self, final: Path, step: int) -> None:
        self.set_aside_after(step)
        write_synced(self.folder / (LATEST_NAME + PARTIAL), final.name + "\n")
        (self.folder / (LATEST_NAME + PARTIAL)).replace(self.folder / LATEST_NAME)
        sync(self.folder)
        for path in (*all_checkpoints(self.folder)[: -self.keep_last], *abandoned(self.folder)[: -self.keep_last]):
            remove_checkpoint(path)

    def _partial(self, step: int) -> Path:
        return self.folder / (folder_name(step) + PARTIAL)

    def _set_aside(self, path: Path, step: int) -> None:
        aside = path.with_name(path.name + ABANDONED)
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        _LOG.warning("checkpoint %s is not older than step %d, where the run is now: moved to %s", path, step, aside)

    def _together(self, world: World, step: int, action: Callable[[], None]) -> None:
        """Runs `action`, then raises on all ranks if it failed on any, so that none of them waits for the others."""
        problem = error = None
        try:
            action()
        except Exception as caught:
            error = caught
            problem = f"rank {world.rank}: {type(caught).__name__}: {caught}"
        problems = [p for p in world.gather_objects(problem) if p]
        if problems:
            raise CheckpointError(
                f"checkpoint of step {step} not saved in {self.folder} ({_free_space(self.folder)}): "
                f"{'; '.join(problems)}. "
                f"Earlier checkpoints are untouched; make room or mend the cause"
            ) from error


def _free_space(folder: Path) -> str:
    """In words: a mount that is lost must not hide the error that it caused."""
    try:
        while not folder.exists():
            folder = folder.parent
        return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB free"
    except OSError as error:
        return f"its free space cannot be asked for: {error.strerror}"
