"""The progress line of a run: live on a terminal, one plain line every few seconds elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

PLAIN_INTERVAL_S = 10.0


def make_console(quiet: bool) -> Console:
    """The console of a run; wide enough for a plan in a log file."""
    console = Console(quiet=quiet, highlight=False)
    return console if console.is_terminal else Console(quiet=quiet, highlight=False, width=160, soft_wrap=True)


class ProgressLine:
    """Shows step, time left, loss, rates, data wait, memory and, when there is one, the rank that the others wait for."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._console, self._total, self._last_plain = console, total_steps, 0.0
        self._live = None
        if console.is_terminal:
            line = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            self._live = Progress(TextColumn("step {task.completed}/{task.total}"), BarColumn(12), line, console=console)
            self._task = self._live.add_task("train", total=total_steps, completed=start_step, text="")
            self._live.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a metrics record."""
        text = describe(record)
        if self._live:
            self._live.update(self._task, completed=record["step"], text=text)
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_INTERVAL_S or record["step"] == self._total:
            self._last_plain = now
            self._console.print(f"step {record['step']}/{self._total}  {text}", soft_wrap=True)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._live:
            self._live.stop()


def describe(record: Mapping[str, Any]) -> str:
    """A metrics record in a line, what matters most first: a narrow terminal cuts off the end."""
    parts = [
        f"{duration(record['left_s'])} left",
        f"loss {record['loss']:.4f}",
        f"{record['images_per_s']:.0f} images/s ({record['images_per_s_per_rank']:.0f} a rank)",
    ]
    if "ranks" in record:
        parts.append(_slowest(record["ranks"]))
    parts += [
        f"data wait {record['data_wait_percent']:.0f} %",
        _rates(record),
        _memory(record),
        f"lr {record['lr']:.2e}",
        f"grad norm {record['grad_norm']:.3g}",
    ]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """As h:mm:ss, or m:ss below an hour; with days from two of them on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _rates(record: Mapping[str, Any]) -> str:
    tflops = record["tflops_per_rank"]
    speed = f"{tflops:.1f} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.1f} GFLOP/s"
    if "mfu_percent" in record:
        speed += f" (MFU {record['mfu_percent']:.1f} %)"
    return f"{speed}, {record['gb_per_s_per_rank']:.3g} GB/s a rank"


def _memory(record: Mapping[str, Any]) -> str:
    text = f"memory {record['memory_bytes'] / 1e9:.2f} GB"
    reserved = record.get("memory_reserved_bytes")
    return text if reserved is None else f"{text} (reserved {reserved / 1e9:.2f})"


def _slowest(ranks: Mapping[str, Any]) -> str:
    return (
        f"rank {ranks['slowest']} is {ranks['behind_percent']:.0f} % slower (data {ranks['data_wait_s']:.3f} s, "
        f"forward {ranks['forward_s']:.3f} s; others {ranks['others_data_wait_s']:.3f}, {ranks['others_forward_s']:.3f})"
    )
