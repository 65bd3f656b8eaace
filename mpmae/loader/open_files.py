"""Many files read from many threads with few descriptors: thousands of shards stay under the limit of the process."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_OPEN_FILES = 64


@dataclass
class _Open:
    descriptor: int
    num_readers: int = 0


class Descriptors:
    """Reads ranges of numbered files; `open_file` gives a descriptor of one, and the one unused for longest is closed.

    More than `max_open` exist only while as many threads read at the same time. `open_file` may take long: other files can
    be read meanwhile, and several threads may open the same file at once.
    """

    def __init__(self, open_file: Callable[[int], int], max_open: int = MAX_OPEN_FILES):
        self._open_file, self._max_open = open_file, max_open
        self._open: OrderedDict[int, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes of the `number`-th file from `offset` on, fewer at its end. Raises OSError."""
        with self.descriptor(number) as descriptor:
            return os.pread(descriptor, size, offset)

    @contextmanager
    def descriptor(self, number: int) -> Iterator[int]:
        """A descriptor of the `number`-th file that nobody closes until the context ends."""
        file = self._borrowed(number, None)
        if file is None:
            file = self._borrowed(number, self._open_file(number))
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.num_readers -= 1
                self._trim()

    def _borrowed(self, number: int, descriptor: int | None) -> _Open | None:
        """The open file, which now has one reader more; `descriptor` becomes it when there is none, else is closed."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                if descriptor is None:
                    return None
                file = self._open[number] = _Open(descriptor)
            elif descriptor is not None:
                os.close(descriptor)
            self._open.move_to_end(number)
            file.num_readers += 1
            self._trim()
            return file

    def _trim(self) -> None:
        excess = len(self._open) - self._max_open
        if excess > 0:
            self._close([number for number, file in self._open.items() if not file.num_readers][:excess])

    def _close(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            os.close(self._open.pop(number).descriptor)

    def close_unlinked(self) -> None:
        """Close the files whose name is gone, but for those being read: until then they take room on the disk."""
        with self._lock:
            idle = [(number, file.descriptor) for number, file in self._open.items() if not file.num_readers]
            self._close([number for number, descriptor in idle if os.fstat(descriptor).st_nlink == 0])

    def close(self) -> None:
        """Close every file, those being read as soon as they have been; a later read opens its file for itself alone."""
        with self._lock:
            self._max_open = 0
            self._trim()


class OpenFiles(Descriptors):
    """The shards of a local folder, as a `ShardReader` reads them."""

    def __init__(self, paths: Sequence[Path], max_open: int = MAX_OPEN_FILES):
        super().__init__(lambda number: os.open(paths[number], os.O_RDONLY), max_open)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Nothing: local files are there."""
