"""The progress line of a run: live on a terminal, one plain line every few seconds elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0


def make_console(quiet: bool) -> Console:
    """The console of a run; wide enough for a plan in a log file."""
    console = Console(quiet=quiet, highlight=False)
    return console if console.is_terminal else Console(quiet=quiet, highlight=False, width=160)


class ProgressLine:
    """Shows step, loss, rate, data wait, memory and time left."""

    def __init__(self, console: Console, total_steps: int, start_step: int, world_size: int):
        self._console, self._total, self._world_size = console, total_steps, world_size
        self._started, self._start_step, self._last_plain = time.monotonic(), start_step, 0.0
        self._live = None
        if console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(20), TextColumn("{task.fields[text]}"))
            self._live = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._live.add_task("train", total=total_steps, completed=start_step, text="")
            self._live.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a metrics record."""
        text = (
            f"loss {record['loss']:.4f}  {record['images_per_s']:.0f} images/s "
            f"({record['images_per_s'] / self._world_size:.0f} a rank)  data wait {record['data_wait_percent']:.0f} %  "
            f"lr {record['lr']:.2e}  grad norm {record['grad_norm']:.3g}  memory {record['memory_bytes'] / 1e9:.2f} GB"
        )
        if self._live:
            self._live.update(self._task, completed=record["step"], text=text)
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_INTERVAL_S or record["step"] == self._total:
            self._last_plain = now
            per_step = (now - self._started) / max(1, record["step"] - self._start_step)
            left = round(per_step * (self._total - record["step"]))
            self._console.print(
                f"step {record['step']}/{self._total}  {text}  {left // 60}:{left % 60:02d} left", highlight=False
            )

    def close(self) -> None:
        """Leave the line as it is."""
        if self._live:
            self._live.stop()
