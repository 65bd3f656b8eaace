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


class Prefetcher:
    """Calls `fetch(number, requested_ns, stop)` for the numbers of the latest request, in order, a few at a time.

    fetch: returns False when nothing more fits; raises StoppedError soon after the event `stop` is set.
    """

    def __init__(self, fetch: Callable[[int, int, threading.Event], bool], num_threads: int = NUM_THREADS):
        self._fetch, self._num_threads = fetch, num_threads
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
        while True:
            with self._changed:
                while not self._numbers and not self._stop.is_set():
                    self._changed.wait()
                if self._stop.is_set():
                    return
                number, requested_ns = self._numbers.popleft(), self._requested_ns
            try:
                fits = self._fetch(number, requested_ns, self._stop)
            except StoppedError:
                return
            except MpmaeError as error:
                _LOG.warning("fetching ahead failed, the read that needs it tries again: %s", error)
                continue
            with self._changed:
                if not fits and requested_ns == self._requested_ns:
                    self._numbers.clear()

    def close(self) -> None:
        """Call off what is being fetched and end the threads."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        end = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
