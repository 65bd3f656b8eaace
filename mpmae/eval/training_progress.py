"""The progress line of a fine-tuning: live on a terminal, one plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

PLAIN_INTERVAL_S = 10.0


class EpochLine:
    """Shows epoch, loss, the validation metric and its best epoch on standard error. metric: the one that decides."""

    def __init__(self, title: str, metric: str, num_epochs: int, first_epoch: int, quiet: bool = False):
        self._title, self._metric, self._num_epochs, self._last_plain = title, metric, num_epochs, 0.0
        self._console = Console(file=sys.stderr, highlight=False, quiet=quiet)
        self._live = None
        if self._console.is_terminal and not quiet:
            text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            columns = (TextColumn("{task.description}"), BarColumn(12), TimeRemainingColumn(), text)
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task(escape(title), total=num_epochs, completed=first_epoch, text="")
            self._live.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the record of an epoch."""
        done = record["epoch"] + 1
        text = (
            f"loss {record['loss']:.4f}  val {self._metric} {record[f'val_{self._metric}']:.4f} "
            f"(best: epoch {record['best_epoch']})  {record['epoch_s']:.1f} s  lr {record['lr']:.2e}"
        )
        if self._live:
            self._live.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_INTERVAL_S or done == self._num_epochs:
            self._last_plain = now
            self._console.print(f"{self._title}: epoch {done}/{self._num_epochs}  {text}", soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._live:
            self._live.stop()
