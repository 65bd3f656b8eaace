"""The loops over pixels, compiled: the filter of the shards, both ways, and from stored bytes to a batch.

Compiled when first called with a dtype, kept in numba's cache (beside this file, or in the user's cache folder where that
cannot be written), and run without the interpreter's lock. Slices, not sums of indices, go into the inner loops: LLVM
vectorises only what provably starts at 0.

Shapes: C bands, P tile side, H image side (pixels), B bytes of a word, W words of an array.
"""

import numpy as np
from numba import njit

_compiled = njit(nogil=True, cache=True, error_model="numpy")


def delta_planes(values: np.ndarray) -> np.ndarray:
    """The filter: horizontal difference, zigzag, then one plane per byte of the word; uint8 [B, W] from values [..., P]."""
    words = np.ascontiguousarray(values).view(f"<u{values.itemsize}")
    planes = np.empty((values.itemsize, words.size), np.uint8)
    _filter(words.reshape(-1, words.shape[-1]), planes)
    return planes


def undo_delta_planes(stored: np.ndarray, word_bytes: int, width: int) -> np.ndarray:
    """The words, unsigned [..., W], whose filtered bytes are `stored`, uint8 [..., B * W]; rows have `width` words."""
    num_words = stored.shape[-1] // word_bytes
    words = np.empty((*stored.shape[:-1], num_words), f"<u{word_bytes}")
    _unfilter_all(stored.reshape(-1, stored.shape[-1]), words.reshape(-1, num_words), width)
    return words


@_compiled
def _filter(words, planes):
    one, sign = words.dtype.type(1), words.dtype.type(8 * words.itemsize - 1)
    num_rows, width = words.shape
    folded = np.empty(width, words.dtype)
    for y in range(num_rows):
        row = words[y]
        folded[0] = (row[0] << one) ^ (words.dtype.type(0) - (row[0] >> sign))
        now, before, rest = row[1:], row[: width - 1], folded[1:]
        for x in range(rest.size):
            delta = words.dtype.type(now[x] - before[x])
            rest[x] = (delta << one) ^ (words.dtype.type(0) - (delta >> sign))
        for k in range(words.itemsize):
            shift, part = words.dtype.type(8 * k), planes[k, y * width : (y + 1) * width]
            for x in range(width):
                part[x] = np.uint8(folded[x] >> shift)


@_compiled
def _unfilter_all(stored, words, width):
    for i in range(len(words)):
        _unfilter(stored[i], words.shape[1], 0, words[i], width, width)


@_compiled
def _unfilter(stored, num_words, first, words, width, used):
    """`words` from the filtered bytes of whole rows, starting at word `first` of `num_words`; `used` words of each row."""
    one, zero = words.dtype.type(1), words.dtype.type(0)
    plane = stored[first : first + words.size]
    for x in range(words.size):
        words[x] = plane[x]
    for k in range(1, words.itemsize):
        shift = words.dtype.type(8 * k)
        plane = stored[k * num_words + first : k * num_words + first + words.size]
        for x in range(words.size):
            words[x] |= words.dtype.type(plane[x]) << shift
    for x in range(words.size):
        words[x] = (words[x] >> one) ^ (zero - (words[x] & one))
    for start in range(0, words.size, width):
        row, total = words[start : start + used], zero
        for x in range(row.size):
            total = words.dtype.type(total + row[x])
            row[x] = total
