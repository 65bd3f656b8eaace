"""How far a long loop of an evaluation is: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0


def progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items; meanwhile standard error shows `what` and how many of `total` are done."""
    console = Console(file=sys.stderr, highlight=False)
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=escape(what))
        return
    shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown >= PLAIN_INTERVAL_S:
            shown = time.monotonic()
            console.print(f"{what}: {done}/{total}", soft_wrap=True, markup=False)
