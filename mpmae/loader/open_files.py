"""Many files read from many threads with few descriptors: thousands of shards stay under the limit of the process."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_OPEN_FILES = 64


@dataclass
class _Open:
    descriptor: int
    num_readers: int = 0


class OpenFiles:
    """Reads ranges of `paths`; opens a file when it is first read and closes the one unused for longest.

    More than `max_open` descriptors exist only while as many threads read at the same time.
    """

    def __init__(self, paths: Sequence[Path], max_open: int = MAX_OPEN_FILES):
        self._paths, self._max_open = paths, max_open
        self._open: OrderedDict[int, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes of the `number`-th file from `offset` on, fewer at its end. Raises OSError."""
        with self._descriptor(number) as descriptor:
            return os.pread(descriptor, size, offset)

    @contextmanager
    def _descriptor(self, number: int) -> Iterator[int]:
        """A descriptor that nobody closes until the context ends."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = _Open(os.open(self._paths[number], os.O_RDONLY))
            self._open.move_to_end(number)
            file.num_readers += 1
            self._trim()
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.num_readers -= 1
                self._trim()

    def _trim(self) -> None:
        excess = len(self._open) - self._max_open
        if excess <= 0:
            return
        for number in [number for number, file in self._open.items() if not file.num_readers][:excess]:
            os.close(self._open.pop(number).descriptor)

    def close(self) -> None:
        """Close every file, those being read as soon as they have been; a later read opens its file for itself alone."""
        with self._lock:
            self._max_open = 0
            self._trim()
