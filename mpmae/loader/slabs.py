"""Memory for batches: one block per batch, taken again once nothing refers to any part of it."""

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT_BYTES = 64


def _num_references(items: list, position: int) -> int:
    return sys.getrefcount(items[position])


_UNSHARED = _num_references([np.empty(0)], 0)


class Slabs:
    """Gives tensors that share one block of memory, pinned where there is a GPU.

    Fresh pages cost as much as filling them, so up to `max_kept` blocks are kept. A block is free when no tensor or array
    made from it exists any more, which its reference count tells: whoever still holds a part of a batch keeps its block.
    PyTorch recycles pinned blocks by itself, after the copies to the GPU that read them.
    """

    def __init__(self, max_kept: int):
        self._max_kept, self._pinned = max_kept, torch.cuda.is_available()
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, forms: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[torch.Tensor]:
        """One tensor per (shape, dtype), contents undefined."""
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in forms]
        starts = np.cumsum([0, *(size + -size % ALIGNMENT_BYTES for size in sizes)]).tolist()
        slab = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True) if self._pinned else self._slab(starts[-1])
        parts = zip(starts, sizes, forms, strict=False)
        if self._pinned:
            dtypes = [torch.from_numpy(np.empty(0, dtype)).dtype for _, dtype in forms]
            return [slab[a : a + n].view(d).view(form[0]) for (a, n, form), d in zip(parts, dtypes, strict=True)]
        return [torch.from_numpy(slab[a : a + n].view(dtype).reshape(shape)) for a, n, (shape, dtype) in parts]

    def _slab(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            for i in range(len(self._kept) - 1, -1, -1):
                if _num_references(self._kept, i) > _UNSHARED:
                    continue
                if len(self._kept[i]) == num_bytes:
                    return self._kept[i]
                del self._kept[i]
            slab = np.empty(num_bytes, np.uint8)
            if len(self._kept) < self._max_kept:
                self._kept.append(slab)
            return slab
