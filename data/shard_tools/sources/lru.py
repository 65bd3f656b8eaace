"""A cache of the things last read, bounded in bytes, shared by threads."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class ByteLru:
    """Keeps what `load` gave for the keys last asked for, up to `max_bytes`.

    Two threads that ask for an absent key at once both load it; nothing waits under the lock.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes, self._held_bytes = max_bytes, 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], tuple[Any, int]]) -> Any:
        """The value of `key`; `load` gives it with its size in bytes."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
        value, num_bytes = load()
        with self._lock:
            if key not in self._items and num_bytes <= self._max_bytes:
                self._items[key] = value, num_bytes
                self._held_bytes += num_bytes
                while self._held_bytes > self._max_bytes:
                    self._held_bytes -= self._items.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._items.clear()
            self._held_bytes = 0
