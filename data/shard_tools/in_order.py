"""Work for many threads whose results come back in the order of the items, with bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mpmae.errors import ShardError

Item, Result = TypeVar("Item"), TypeVar("Result")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`function` of every item, in the order of the items, on `workers` threads (None: one per core).

    At most twice as many results as threads wait to be taken. An exception of `function` comes out in its turn. Raises
    ShardError for a number of workers below 1.
    """
    workers = num_cores() if workers is None else workers
    if workers < 1:
        raise ShardError(f"workers {workers}; expected at least 1")
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
