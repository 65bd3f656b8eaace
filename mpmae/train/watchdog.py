"""Ends a run that does not get on, and says which rank holds it up.

Every rank has a thread that sends a beat with the place of its main thread and looks at those of the others: rank 0 at all
of them, the others at rank 0. When a rank has held the run up for `guard.stall_s`, all ranks write their stacks to
`run.dir/stacks/rank-N.txt`, the culprit's also goes to stderr, and all end with status 86. That happens within `stall_s`, a
third of it and 15 s. A rank that cannot speak (a stopped or dead process) is ended by the launcher, which torchrun and
deepspeed do within 30 s more.

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

from mpmae.engine import World, is_lost_peer
from mpmae.train.heartbeats import Heartbeats, num_collectives
from mpmae.train.stalls import FAILED, LEFT, Beat, Heard, Verdict, judge

EXIT_STALLED = 86
STACKS_FOLDER = "stacks"
FIRST_TIME_FACTOR = 3
DUMP_S = 5.0
_READS_AND_WRITES = ("start", "save")
_BUSY_BYTES = 2**20
_MAX_INTERVAL_S = 10.0


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
        self._heard: dict[int, tuple[Beat | None, float]] = {}
        self._deaf_since: float | None = None

    def __enter__(self) -> "Watchdog":
        self._link = Heartbeats(self._rank, timeout_s=max(1.0, self._stall_s / 4))
        watched = range(self._world_size) if self._rank == 0 else (0,)
        self._heard = {rank: (None, time.monotonic()) for rank in watched if rank != self._rank}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        lost = isinstance(error, RuntimeError) and is_lost_peer(error)
        self.note(LEFT if error is None or lost else FAILED)
        self._over.set()  # the thread's last beat tells the others
        self._thread.join(timeout=2 * self._interval_s)
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
        while True:
            # should this thread itself not get its turn any more, a thread of the C library ends the process with status 1
            faulthandler.dump_traceback_later(2 * FIRST_TIME_FACTOR * self._stall_s + 60, exit=True)
            verdict = self._look()
            if verdict:
                self._end(verdict)
            if self._over.wait(self._interval_s):
                self._look()
                return

    def _look(self) -> Verdict | None:
        """Speak and listen once; the verdict, if there is one by now."""
        now = time.monotonic()
        beat = self._beat(now)
        if self._deaf_since is not None:
            return self._judged_alone(beat, now)
        try:
            self._link.send(beat)
            if self._over.is_set():
                return None
            if verdict := self._link.verdict():
                return verdict
            for rank, last in self._link.read(list(self._heard)).items():
                if self._heard[rank][0] is None or self._heard[rank][0].number != last.number:
                    self._heard[rank] = last, now
            heard = {rank: Heard(last, now - at) for rank, (last, at) in self._heard.items()} | {
                self._rank: Heard(beat, 0.0)
            }
            verdict = judge(dict(sorted(heard.items())), self._stall_s) if self._decides(heard) else None
            return verdict and self._link.pronounce(verdict)
        except RuntimeError:
            self._deaf_since = now
            return None

    def _decides(self, heard: dict[int, Heard]) -> bool:
        """Whether this rank judges: rank 0, and the others when that one is silent or has left."""
        if self._rank == 0:
            return True
        beat, silent_s = heard[0]
        return silent_s >= self._stall_s or (beat is not None and beat.phase in (LEFT, FAILED))

    def _judged_alone(self, beat: Beat, now: float) -> Verdict | None:
        """The verdict when the store has gone, with the process that holds it: torchrun's agent, or else rank 0."""
        deaf_s = now - self._deaf_since
        if beat.phase in (LEFT, FAILED) or min(beat.idle_s, deaf_s) < self._stall_s:
            return None
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        text = (
            f"stalled: the rendezvous store at {address} has not answered for {deaf_s:.0f} s (guard.stall_s = "
            f"{self._stall_s:g}): the process that holds it, torchrun's agent or else rank 0, is stopped, dead or out of "
            f"reach; held up: rank {self._rank} ({beat.phase}, step {beat.step + 1})"
        )
        return Verdict((0,), True, text)

    def _beat(self, now: float) -> Beat:
        at = self._at
        if at.phase in _READS_AND_WRITES and (num_bytes := _file_bytes()) - self._num_bytes >= _BUSY_BYTES:
            self._num_bytes, self._busy_at = num_bytes, now
        busy_at = self._busy_at if at.phase in _READS_AND_WRITES else 0.0
        self._num_beats += 1
        return Beat(
            self._num_beats,
            at.phase,
            at.step,
            at.micro_step,
            num_collectives() - at.collectives_before,
            now - max(at.since, busy_at),
            at.patience_s,
            self._host,
            os.getpid(),
        )

    def _end(self, verdict: Verdict) -> None:
        """Say it, write the stacks, and leave. Each part has a bound, as the disk may be what hangs."""
        mute = verdict.culprits if verdict.are_silent else ()
        spokesman = min(set(range(self._world_size)) - set(mute), default=self._rank)
        if self._rank == spokesman or self._rank in verdict.culprits or self._deaf_since is not None:
            print(f"error: rank {self._rank}: {verdict.text}; stacks are in {self._stacks_dir}", file=sys.stderr, flush=True)
        if self._rank in verdict.culprits:
            faulthandler.dump_traceback(all_threads=True)
        dump = threading.Thread(target=self._dump, daemon=True)
        dump.start()
        dump.join(DUMP_S)
        if self._deaf_since is None:
            self._wait_for_dumps(self._world_size - len(mute))
        os._exit(EXIT_STALLED)

    def _dump(self) -> None:
        self._stacks_dir.mkdir(parents=True, exist_ok=True)
        with (self._stacks_dir / f"rank-{self._rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _wait_for_dumps(self, num_ranks: int) -> None:
        """Let the other ranks write theirs, within a bound: a launcher kills them when the first one leaves."""
        deadline = time.monotonic() + DUMP_S
        try:
            num_done = self._link.count_done()
            while num_done < num_ranks and time.monotonic() < deadline:
                time.sleep(0.1)
                num_done = self._link.num_done()
        except RuntimeError:  # rank 0, which holds the store, has left
            return


def _file_bytes() -> int:
    """Bytes that this process has read and written so far, where /proc tells (Linux); else 0."""
    path = Path("/proc/self/io")
    if not path.exists():
        return 0
    counts = dict(line.split(": ") for line in path.read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])
