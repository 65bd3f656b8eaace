"""Ends a run that does not get on, and says which rank holds it up.

Every rank sends beats with the place of its main thread (`mpmae.train.heartbeats`), from which rank 0 judges who holds the
run up (`mpmae.train.stalls`). When one has for `guard.stall_s`, all ranks write their stacks to `run.dir/stacks/rank-N.txt`,
the culprit's also go to stderr, and all end with status 86: within `stall_s`, a third of it and 15 s. A rank that cannot do
so, as its process is stopped, is left to the launcher, which kills it when the others end (torchrun and deepspeed: 30 s
later).

A place may take three times as long when a rank comes to it for the first time (compiling, building kernels), and as long as
it likes while it reads or writes files in start-up and saving. A validation counts its batches.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mpmae.engine import World, lost_peer_message
from mpmae.train.heartbeats import Heartbeats, num_collectives
from mpmae.train.stalls import FAILED, LEFT, Beat, Verdict

EXIT_STALLED = 86
STACKS_FOLDER = "stacks"
FIRST_TIME_FACTOR = 3
DUMP_S = 5.0
_READS_AND_WRITES = ("start", "save")
_BUSY_BYTES = 2**20
_MAX_INTERVAL_S = 10.0
_STDERR = 2  # the descriptor: sys.stderr may have none, as in a notebook


class _Place(NamedTuple):
    phase: str
    step: int
    micro_step: int
    collectives_before: int
    since: float
    patience_s: float


class Watchdog:
    """Watches a run from `with` on; the main thread says where it is by `note`.

    stall_s: as guard.stall_s. stacks_dir: where stacks go, made only when there is something to write.
    """

    def __init__(self, world: World, stall_s: float, stacks_dir: Path):
        self._rank, self._world_size, self._stall_s, self._stacks_dir = world.rank, world.world_size, stall_s, stacks_dir
        self._interval_s = min(_MAX_INTERVAL_S, stall_s / 10)
        self._host, self._over = socket.gethostname(), threading.Event()
        self._known_phases: set[str] = set()
        self._at = _Place("start", -1, 0, 0, time.monotonic(), FIRST_TIME_FACTOR * stall_s)
        self._num_beats, self._num_bytes, self._busy_at = 0, 0, 0.0

    def __enter__(self) -> "Watchdog":
        self._beats = Heartbeats(self._rank, self._world_size, self._stall_s, self._interval_s, self._beat)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        lost = isinstance(error, RuntimeError) and lost_peer_message(error) is not None
        self.note(LEFT if error is None or lost else FAILED)
        self._over.set()
        self._thread.join()
        self._beats.stop()
        faulthandler.cancel_dump_traceback_later()

    def note(self, phase: str, step: int | None = None, micro_step: int = 0) -> None:
        """Say what this rank begins to do; `step` counts from 0, None: the same as before."""
        at = self._at
        self._known_phases.add(at.phase)
        patience_s = self._stall_s * (1 if phase in self._known_phases else FIRST_TIME_FACTOR)
        before = at.collectives_before
        if step is not None and step != at.step:
            before = num_collectives()
        self._at = _Place(phase, at.step if step is None else step, micro_step, before, time.monotonic(), patience_s)

    def tick(self) -> None:
        """Say that this rank got on within its phase."""
        self._at = self._at._replace(micro_step=self._at.micro_step + 1, since=time.monotonic())

    def _watch(self) -> None:
        while not self._over.wait(self._interval_s):
            # should this thread not get its turn any more, a thread of the C library ends the process with status 1
            faulthandler.dump_traceback_later(2 * FIRST_TIME_FACTOR * self._stall_s + 60, exit=True, file=_STDERR)
            verdict = self._beats.verdict or self._verdict_alone()
            if verdict:
                self._end(verdict)

    def _verdict_alone(self) -> Verdict | None:
        """The verdict when the store does not answer: the process that holds it is torchrun's agent, or else rank 0."""
        unheard_s, idle_s = self._beats.unheard_s(), self._idle_s()
        if unheard_s < self._stall_s / 2 or idle_s < self._at.patience_s:
            return None
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        text = (
            f"stalled: the store at {address} has not answered for {unheard_s:.0f} s: the process that holds it (torchrun's "
            f"agent, else rank 0) is stopped, dead or out of reach (guard.stall_s = {self._stall_s:g}); held up: rank "
            f"{self._rank}, {self._at.phase} of step {self._at.step + 1}, for {idle_s:.0f} s"
        )
        return Verdict([], 0, text)

    def _beat(self) -> Beat:
        at, now = self._at, time.monotonic()
        if at.phase in _READS_AND_WRITES and (num_bytes := _file_bytes()) - self._num_bytes >= _BUSY_BYTES:
            self._num_bytes, self._busy_at = num_bytes, now
        self._num_beats += 1
        num_begun = num_collectives() - at.collectives_before
        place = self._num_beats, at.phase, at.step, at.micro_step, num_begun
        return Beat(*place, self._idle_s(), at.patience_s, self._host, os.getpid())

    def _idle_s(self) -> float:
        at = self._at
        got_on_at = max(at.since, self._busy_at) if at.phase in _READS_AND_WRITES else at.since
        return time.monotonic() - got_on_at

    def _end(self, verdict: Verdict) -> None:
        """Say it, write the stacks, and leave. Each part has a bound, as the disk may be what hangs."""
        is_culprit = self._rank in verdict.culprits
        mute = verdict.culprits if verdict.num_mute else []
        spokesman = min(set(range(self._world_size)) - set(mute), default=self._rank)
        if is_culprit or self._rank == spokesman or verdict is not self._beats.verdict:
            print(f"error: rank {self._rank}: {verdict.text}; stacks are in {self._stacks_dir}", file=sys.stderr, flush=True)
        if is_culprit:
            faulthandler.dump_traceback(_STDERR, all_threads=True)
        dump = threading.Thread(target=self._dump, daemon=True)
        dump.start()
        dump.join(DUMP_S)
        self._beats.dumped.set()
        if verdict is self._beats.verdict:  # a launcher kills the other ranks when the first one leaves
            self._beats.all_dumped.wait(DUMP_S)
        os._exit(EXIT_STALLED)

    def _dump(self) -> None:
        self._stacks_dir.mkdir(parents=True, exist_ok=True)
        with (self._stacks_dir / f"rank-{self._rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


def _file_bytes() -> int:
    """Bytes that this process has read and written so far, where /proc tells (Linux); else 0."""
    path = Path("/proc/self/io")
    if not path.exists():
        return 0
    counts = dict(line.split(": ") for line in path.read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])
