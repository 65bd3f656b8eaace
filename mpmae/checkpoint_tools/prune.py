"""Removing checkpoints that a run no longer needs."""

from dataclasses import dataclass
from pathlib import Path

from mpmae.checkpoint_format import abandoned, all_checkpoints, find_problems, leftovers, remove_checkpoint
from mpmae.errors import CheckpointError
from mpmae.run_lock import lock_if_free


@dataclass(frozen=True)
class Pruned:
    """What was, or would be, removed; is_running: a run holds the folder, so what it may be writing was left alone."""

    removed: tuple[Path, ...]
    is_running: bool


def prune(run_dir: Path, keep: int, *, with_abandoned: bool, dry_run: bool) -> Pruned:
    """Remove all but the newest `keep` complete checkpoints of a run, the torn ones before them and unfinished leftovers.

    with_abandoned: also those that the run has gone back behind. The newest complete one always stays. While a run holds
    the folder, unfinished ones stay as well: one of them may be its present save.
    Raises CheckpointError: no run, or something that cannot be removed.
    """
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{run_dir} is no run: it has no folder checkpoints")
    if keep < 1:
        raise CheckpointError(f"--keep {keep}: expected at least 1; remove the run's folder to be rid of all")
    try:
        with lock_if_free(run_dir) as is_free:
            doomed = _doomed(folder, keep)
            doomed += abandoned(folder) if with_abandoned else []
            doomed += leftovers(folder) if is_free else []
            for path in () if dry_run else doomed:
                remove_checkpoint(path)
    except OSError as error:
        raise CheckpointError(f"{folder}: not all could be removed: {error}") from error
    return Pruned(tuple(doomed), not is_free)


def _doomed(folder: Path, keep: int) -> list[Path]:
    """Complete checkpoints but the newest `keep`, and torn ones older than the newest complete one."""
    paths = all_checkpoints(folder)
    complete = [path for path in paths if not find_problems(path)]
    if not complete:
        return []
    kept = complete[-keep:]
    return [path for path in paths[: paths.index(complete[-1])] if path not in kept]
