"""Progress on stderr with rate and remaining time: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Item = TypeVar("Item")

LINE_SECONDS = 30.0
BAR_SECONDS = 0.1
MB = 10**6


def say(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)


class Meter:
    """Counts work against `total`, of which `num_done` was done before; a context manager.

    On a terminal it is a bar. Elsewhere (a log of nohup or SLURM) it is silent but for a line every 30 s of work.
    """

    def __init__(self, description: str, total: int, unit: str = "tiles", num_done: int = 0, enabled: bool = True):
        self._description, self._total, self._unit, self._enabled = description, total, unit, enabled
        self._num_before = self._num_done = num_done
        self._num_bytes = 0
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        self._started = self._shown = time.monotonic()
        console = Console(stderr=True)
        if self._enabled and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(self._description, total=self._total, completed=self._num_done, rate="")
            self._bar.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._num_done, rate=self.rate(time.monotonic() - self._started))
            self._bar.stop()

    def advance(self, num: int = 1, num_bytes: int = 0) -> None:
        """Count `num` more, and the bytes written for them."""
        self._num_done += num
        self._num_bytes += num_bytes
        now = time.monotonic()
        if now - self._shown < (LINE_SECONDS if self._bar is None else BAR_SECONDS):
            return
        self._shown = now
        rate = self.rate(now - self._started)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._num_done, rate=rate)
        elif self._enabled:
            done = f"{self._num_done:,} of {self._total:,} {self._unit} ({self._num_done / max(self._total, 1):.1%})"
            say(f"{self._description}: {done}, {rate}")

    def rate(self, seconds: float) -> str:
        """What the last `seconds`, all of this meter's, tell: rate, bytes written a second, time left."""
        per_second = (self._num_done - self._num_before) / max(seconds, 1e-9)
        parts = [f"{per_second:,.0f} {self._unit}/s"]
        if self._num_bytes:
            parts.append(f"{self._num_bytes / MB / max(seconds, 1e-9):,.0f} MB/s")
        if per_second and self._num_done < self._total:
            parts.append(f"{_duration((self._total - self._num_done) / per_second)} left")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def track(items: Iterable[Item], total: int, description: str, unit: str = "tiles", enabled: bool = True) -> Iterator[Item]:
    """The items, counted by a `Meter`."""
    with Meter(description, total, unit, enabled=enabled) as meter:
        for item in items:
            yield item
            meter.advance()
