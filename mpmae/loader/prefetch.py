"""Shards fetched ahead of their use, in threads of their own."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mpmae.errors import MpmaeError
from mpmae.retries import StoppedError

_LOG = logging.getLogger(__name__)
NUM_THREADS = 4
STOP_S = 5.0

Fetch = Callable[[threading.Event], None]


class Prefetcher:
    """Fetches the numbers of the latest request, a few at a time; `reserve(number, requested_ns)` takes their room in order.

    reserve: returns what fetches the number, None when nothing more fits. What it returns gets an event and raises
    StoppedError soon after that is set.
    """

    def __init__(self, reserve: Callable[[int, int], Fetch | None], num_threads: int = NUM_THREADS):
        self._reserve, self._num_threads = reserve, num_threads
        self._in_order = threading.Lock()
        self._numbers: deque[int] = deque()
        self._requested_ns = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def request(self, numbers: Sequence[int], requested_ns: int) -> None:
        """Fetch these, in this order; what an earlier request has not begun is forgotten."""
        with self._changed:
            self._numbers, self._requested_ns = deque(numbers), requested_ns
            while len(self._threads) < min(self._num_threads, len(self._numbers)) and not self._stop.is_set():
                # Daemons: an exiting interpreter does not wait for a store.
                self._threads.append(threading.Thread(target=self._run, name="prefetch", daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._in_order:  # else a later number could take the room of an earlier one
                    fetch = self._next()
                if fetch is not None:
                    fetch(self._stop)
            except StoppedError:
                return
            except MpmaeError as error:
                _LOG.warning("fetching ahead failed, the read that needs it tries again: %s", error)

    def _next(self) -> Fetch | None:
        """Wait for a number and reserve its room; None when it does not fit or there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._numbers or self._stop.is_set())
            if self._stop.is_set():
                return None
            number, requested_ns = self._numbers.popleft(), self._requested_ns
        fetch = self._reserve(number, requested_ns)
        with self._changed:
            if fetch is None and requested_ns == self._requested_ns:
                self._numbers.clear()
        return fetch

    def close(self) -> None:
        """Call off what is being fetched and end the threads."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        end = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
