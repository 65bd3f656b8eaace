"""Ending a run on request: SIGTERM, SIGUSR1 or its time limit, agreed over the ranks and saved, to be queued again.

A request is noted on the rank that gets it and becomes a vote in the sums that every step passes around anyway (see
`mpmae.train.meter`), so all ranks stop after the same step, and no step waits for it.

Launchers and signals (torch 2.13, deepspeed 0.19.8):
- torchrun sends SIGTERM on to its ranks and kills what is left after 30 s (`--shutdown-timeout`). SIGUSR1 kills it, unless
  `--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1` is given.
- `deepspeed` (the outer command) does not send SIGTERM on: its ranks would live on. Its child `deepspeed.launcher.launch`
  does, to one rank after another, and kills each after 30 s. Signal the child, or the whole process group.
- srun and `scancel` signal every process of a step: a rank below torchrun gets SIGTERM twice.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mpmae.durations import seconds_of
from mpmae.files import write_whole

EXIT_REQUEUE = 75  # EX_TEMPFAIL: try again later
STOPPED_NAME = "stopped.json"
TIME_LIMIT = "time limit"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = (*(each.name for each in SIGNALS), TIME_LIMIT)
REPEAT_S = 5.0  # a SIGTERM so soon after the first is the same one, by another way
MAX_MARGIN_S = 60.0


class Stop(NamedTuple):
    """Why and after which step a run has been stopped to be queued again."""

    reason: str
    step: int

    def write(self, run_dir: Path) -> None:
        """Write stopped.json: launchers replace the exit status of a rank, so a job script reads this instead."""
        name = None if self.reason == TIME_LIMIT else self.reason
        record = {"reason": "signal" if name else TIME_LIMIT, "step": self.step, "signal": name, "requeue": True}
        write_whole(run_dir / STOPPED_NAME, json.dumps(record) + "\n")


def stop_before_restart(run_dir: Path) -> Stop | None:
    """What this run stopped for, if its launcher has only started the ranks again since (torchrun --max-restarts).

    torchrun takes status 75 for a failure; the job's time is up all the same.
    """
    path = run_dir / STOPPED_NAME
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not path.exists():
        return None
    # older than the job: left by the one before, and not yet removed as this one's ranks failed at their start
    if 0 < job_age_s() < time.time() - path.stat().st_mtime:
        return None
    record = json.loads(path.read_text())
    return Stop(record["signal"] or record["reason"], record["step"])


def forget_stop(run_dir: Path) -> None:
    """Remove stopped.json: the run goes on."""
    (run_dir / STOPPED_NAME).unlink(missing_ok=True)


class TimeLimit:
    """Whether it is time to save and stop, so that both are over when `limit_s` (None: never) is.

    Left for it: one and a half times the longest save so far for each that is to come, the longest lap (from one question to
    the next: a step, with a validation or a save if one fell into it; the first, which compiles, left out) times `num_laps`,
    and a margin of 5 % of the limit, at most a minute. Before the first save only laps and margin count. The clock starts
    with the job (see `job_age_s`).
    """

    def __init__(self, limit_s: float | None, num_laps: int, clock=time.monotonic, age_s: float | None = None):
        self._limit_s, self._num_laps, self._clock = limit_s, num_laps, clock
        self._started = clock() - (job_age_s() if age_s is None else age_s)
        self._asked_at: float | None = None
        self._laps, self._longest_lap_s, self._longest_save_s = 0, 0.0, 0.0

    def saved(self, duration_s: float) -> None:
        """Note how long a save took."""
        self._longest_save_s = max(self._longest_save_s, duration_s)

    def is_up(self, num_saves: int = 1) -> bool:
        """To be asked once a step. num_saves: how many there are to wait for, with one that a thread is writing."""
        now = self._clock()
        if self._asked_at is not None:
            self._laps += 1
            if self._laps > 1:
                self._longest_lap_s = max(self._longest_lap_s, now - self._asked_at)
        self._asked_at = now
        if self._limit_s is None:
            return False
        margin_s = min(MAX_MARGIN_S, 0.05 * self._limit_s)
        needed_s = 1.5 * num_saves * self._longest_save_s + self._num_laps * self._longest_lap_s + margin_s
        return now - self._started + needed_s >= self._limit_s


class StopRequests:
    """What this rank has been asked; a context manager, for the main thread.

    Signals arrive by a thread, as Python runs handlers in the main thread only, which may be waiting in a collective. A
    second SIGTERM, and SIGINT after any, end the process at once with 128 + their number; so does SIGTERM after SIGINT, by
    which a launcher clears up. SIGINT alone is left to Python (KeyboardInterrupt).
    """

    def __init__(self, time_limit: str | None = None):
        self.time_limit_s = None if time_limit is None else seconds_of(time_limit)
        self._asked: dict[int, float] = {}
        self._is_over = False

    def __enter__(self) -> "StopRequests":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._before_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop-requests", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._before_fd)
        for number, handler in self._before.items():
            # a late SIGTERM of a launcher that clears up must not spoil the exit status of a run that has stopped well
            signal.signal(number, signal.SIG_IGN if self._is_over else handler)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def votes(self) -> list[int]:
        """Numbers (in REASONS) of the signals that have asked this rank to stop."""
        return [index for index, number in enumerate(SIGNALS) if number in self._asked]

    def over(self) -> None:
        """The checkpoint is on the disk: whatever comes now only says that a launcher clears up."""
        self._is_over = True

    def _listen(self) -> None:
        while (number := os.read(self._reader, 1)[0]) != 0:
            if number in (signal.SIGINT, *SIGNALS) and not self._is_over:
                self._note(number, time.monotonic())

    def _note(self, number: int, now: float) -> None:
        interrupted = signal.SIGINT in self._asked
        again = now - self._asked.get(signal.SIGTERM, now) >= REPEAT_S
        if self._asked and (number == signal.SIGINT or (number == signal.SIGTERM and (interrupted or again))):
            name = signal.Signals(number).name
            print(f"error: {name} while the run is stopping: ended at once, nothing saved", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._asked.setdefault(number, now)


def job_age_s() -> float:
    """Seconds since the job began, where /proc tells (Linux); else 0.

    That is this process, or torchrun's agent, which starts ranks again within the same job.
    """
    path = Path(f"/proc/{os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else 'self'}/stat")
    if not path.exists():
        return 0.0
    started_ticks = int(path.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
