"""What a run folder says of its run; reads it, and writes nothing."""

import fcntl
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mpmae.errors import ReportError
from mpmae.files import read_jsonl
from mpmae.probe_record import scores_of
from mpmae.run_lock import LOCK_NAME

RUN_JSON, METRICS, VALIDATION, STOPPED = "run.json", "metrics.jsonl", "validation.jsonl", "stopped.json"
_TAIL_BYTES = 1 << 16
_PROBE = b'"probe":'
_DEFAULT_STALL_S = 600.0
_TRACES = {"bad_batch.json": "no finite loss or gradient", "stacks/rank-*.txt": "stalled"}


@dataclass(frozen=True)
class RunFolder:
    """A run folder and the run.json of its last launch."""

    path: Path
    record: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as a tree."""
        return self.record["config"]

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to do."""
        return self.record.get("total_steps")

    @property
    def resumed_at(self) -> list[int]:
        """The steps from which later launches went on, ascending."""
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.path.glob("run-until-step-*.json"))

    @property
    def engine(self) -> str:
        """Engine and ranks, such as "ZeRO-2 x 8"."""
        stage = ((self.record.get("ds_config") or {}).get("zero_optimization") or {}).get("stage")
        name = self.config.get("engine", {}).get("name", "?")
        return f"{name if stage is None else f'ZeRO-{stage}'} x {self.record.get('world_size', '?')}"

    @property
    def commit(self) -> str:
        """The first digits of the commit, with a + where the tree had other changes."""
        return (self.record.get("commit") or "")[:8] + ("+" if self.record.get("dirty") else "")

    def last_lines(self, name: str) -> list[dict[str, Any]]:
        """The last objects of a JSON-lines file, some tens of them at most; a torn one is left out."""
        path = self.path / name
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            is_cut = file.tell() > 0
            lines = file.read().split(b"\n")[1 if is_cut else 0 :]
        return [found for line in lines if isinstance(found := _parsed(line), dict)]

    def metrics(self) -> list[dict[str, Any]]:
        """All metric records, with one of step 0 where there was a probe; of a step that was done twice, the later one."""
        return list({line["step"]: line for line in read_jsonl(self.path / METRICS) if "step" in line}.values())

    def last_probe(self) -> dict[str, Any]:
        """The last metric record with a probe's scores; empty without one. Looks for it from the end of the file."""
        path = self.path / METRICS
        if not path.exists() or not path.stat().st_size:
            return {}
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            found = lines.rfind(_PROBE)
            while found >= 0:
                start, end = lines.rfind(b"\n", 0, found) + 1, lines.find(b"\n", found)
                record = _parsed(lines[start : end if end >= 0 else len(lines)])
                if isinstance(record, dict) and "step" in record and scores_of(record):
                    return record
                found = lines.rfind(_PROBE, 0, start)
        return {}

    def active_at(self) -> float:
        """When the run last wrote something, in seconds since 1970."""
        return max((self.path / name).stat().st_mtime for name in (RUN_JSON, METRICS) if (self.path / name).exists())


@dataclass(frozen=True)
class State:
    """name: running, stalled, complete, preempted or failed. why: in a few words, may be empty."""

    name: str
    why: str = ""


def open_run(path: Path) -> RunFolder:
    """The run in a folder. Raises ReportError where there is none."""
    try:
        record = json.loads((path / RUN_JSON).read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} is not a run folder: its {RUN_JSON} cannot be read ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ReportError(f"{path / RUN_JSON} is not the record of a run: expected an object with a `config`")
    return RunFolder(path, record)


def find_runs(folders: Iterable[Path]) -> list[RunFolder]:
    """The runs in or below these folders, the last active first. Raises ReportError for a folder that is absent."""
    found: dict[Path, RunFolder] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"{folder} is not a folder; give run folders, or folders of runs")
        for base, below, files in os.walk(folder):
            if RUN_JSON in files:
                below.clear()
                found.setdefault(Path(base).resolve(), open_run(Path(base)))
    return sorted(found.values(), key=lambda run: -run.active_at())


def state_of(run: RunFolder, now: float) -> State:
    """What became of a run by `now`, in seconds since 1970."""
    last_step = next((line["step"] for line in reversed(run.last_lines(METRICS)) if "step" in line), 0)
    is_held = is_locked(run.path / LOCK_NAME)
    idle_s = now - run.active_at()
    stall_s = run.config.get("guard", {}).get("stall_s", _DEFAULT_STALL_S)
    if is_held or (is_held is None and idle_s < stall_s):
        return State("running") if idle_s < stall_s else State("stalled", f"no step for {idle_s:.0f} s")
    if run.total_steps is not None and last_step >= run.total_steps:
        return State("complete")
    if _is_of_this_launch(run, STOPPED):
        told = _parsed((run.path / STOPPED).read_bytes())
        told = told if isinstance(told, dict) else {}
        return State("preempted" if told.get("requeue") else "failed", str(told.get("reason", "")))
    traces = (why for pattern, why in _TRACES.items() if _is_of_this_launch(run, pattern))
    return State("failed", next(traces, "ended without a word"))


def _is_of_this_launch(run: RunFolder, pattern: str) -> bool:
    """Whether the run has left such a file since it was last launched."""
    launched_at = (run.path / RUN_JSON).stat().st_mtime
    return any(path.stat().st_mtime >= launched_at for path in run.path.glob(pattern))


def is_locked(path: Path) -> bool | None:
    """Whether a run holds its lock file; None where the file system has no locks.

    The lock is tried and given back at once; a run that starts in this very moment waits for it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def recent_rate(lines: list[dict[str, Any]]) -> float | None:
    """Median images a second of the last metric records."""
    rates = [line["images_per_s"] for line in lines[-20:] if line.get("images_per_s")]
    return median(rates) if rates else None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
