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


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None, depth: int | None = None
) -> Iterator[Result]:
    """`function` of every item, in the order of the items, on `workers` threads (None: one per core).

    At most `depth` results (None: twice as many as threads) wait to be taken. An exception of `function` comes out in its
    turn. Closing the iterator ends the threads, after the items that they are at. Raises ShardError for fewer than 1 worker.
    """
    workers = num_cores() if workers is None else workers
    if workers < 1:
        raise ShardError(f"workers {workers}; expected at least 1")
    depth = 2 * workers if depth is None else depth
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="in-order")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
