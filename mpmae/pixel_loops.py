"""The loops over pixels, compiled: the filter of the shards, both ways, and from stored bytes to a batch.

Compiled when first called with a dtype (about a second each), kept in numba's cache (beside this file, or in the user's
cache folder where that cannot be written), and run without the interpreter's lock. Slices, not sums of indices, go into the
inner loops: LLVM vectorises only what provably starts at 0. Unsigned indices serve where a slice a row would cost more than
the row.

Shapes: C bands, P tile side, H image side (pixels), B bytes of a word, W words of an array.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

from mpmae.shard_format import QUANTISED_MINUS_INF, QUANTISED_NAN, QUANTISED_PLUS_INF


def _compiled(function: Callable) -> Callable:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written: every process compiles for itself
        return njit(**options)(function)


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


@_compiled
def normalise_maps(stored, plain, filtered, step, views, levels, mean, std, codes, check_finite, room, values, valid):
    """Fill `values` float32 and `valid` bool, [N, C, H, H], with the normalised crops of N maps, as `Batch` says.

    stored: uint8 [N, bytes], the maps as the filter left them, if `filtered`; else `plain` [N, C * P * P] holds their words.
    step: what a stored count means, 0 for maps that are not quantised. views: int64 [N, 4], top, left, hflip, vflip.
    levels: int64 [N], each map's row of `mean` and `std`, float32 [L, C]. codes: no-data codes, in the maps' dtype.
    check_finite: whether NaN and infinities do too. room: `words` [P * H] unsigned, `rows` the same memory in the stored
    dtype, `row` [P] in the maps' dtype.
    """
    words, rows, row = room
    num_maps, num_bands, size = values.shape[0], values.shape[1], values.shape[2]
    side = row.size
    flat_values, flat_valid = values.reshape(-1), valid.reshape(-1)
    for i in range(num_maps):
        top, left, hflip, vflip = views[i]
        for c in range(num_bands):
            first = (c * side + top) * side
            if filtered:
                _unfilter(stored[i], num_bands * side * side, first, words, side, left + size)
                block = rows
            else:
                block = plain[i, first : first + size * side]
            band_mean, band_std = mean[levels[i], c], std[levels[i], c]
            for y in range(size):
                start = y * side + left
                target = ((i * num_bands + c) * size + (size - 1 - y if vflip else y)) * size
                if step != 0:
                    _dequantise(block, start, size, step, hflip, row)
                elif hflip:
                    _reverse(block, start, size, row)
                else:
                    _copy(block, start, size, row)
                _normalise(row, size, band_mean, band_std, codes, check_finite, flat_values, flat_valid, target)


@_compiled
def class_maps(stored, plain, filtered, step, views, lookup, room, values, valid):
    """Fill `values` int64 and `valid` bool [N, C, H, H] with the class ids of `lookup`, int8 [256], for the crops of N maps.

    What lies outside the table counts as 0. The rest as in `normalise_maps`.
    """
    words, rows, row = room
    num_maps, num_bands, size = values.shape[0], values.shape[1], values.shape[2]
    side = row.size
    flat_values, flat_valid = values.reshape(-1), valid.reshape(-1)
    for i in range(num_maps):
        top, left, hflip, vflip = views[i]
        for c in range(num_bands):
            first = (c * side + top) * side
            if filtered:
                _unfilter(stored[i], num_bands * side * side, first, words, side, left + size)
                block = rows
            else:
                block = plain[i, first : first + size * side]
            for y in range(size):
                start = y * side + left
                target = ((i * num_bands + c) * size + (size - 1 - y if vflip else y)) * size
                if step != 0:
                    _dequantise(block, start, size, step, hflip, row)
                elif hflip:
                    _reverse(block, start, size, row)
                else:
                    _copy(block, start, size, row)
                _look_up(row, size, lookup, flat_values, flat_valid, target)


@_compiled
def _normalise(raw, size, mean, std, codes, check_finite, values, valid, target):
    size, target, zero = np.uint64(size), np.uint64(target), np.float32(0)
    for x in range(size):
        values[target + x] = (np.float32(raw[x]) - mean) / std
    if check_finite:
        for x in range(size):
            valid[target + x] = np.isfinite(raw[x])
    else:
        for x in range(size):
            valid[target + x] = True
    for code in codes:
        for x in range(size):
            valid[target + x] &= raw[x] != code
    for x in range(size):
        values[target + x] = values[target + x] if valid[target + x] else zero


@_compiled
def _look_up(raw, size, lookup, values, valid, target):
    size, target = np.uint64(size), np.uint64(target)
    for x in range(size):
        code = raw[x]
        class_id = lookup[np.uint64(code)] if code >= 0 and code < 256 else lookup[0]
        values[target + x] = class_id
        valid[target + x] = class_id >= 0


@_compiled
def _dequantise(counts, start, size, step, reverse, values):
    start, last = np.uint64(start), np.uint64(size - 1)
    for x in range(np.uint64(size)):
        count = counts[start + (last - x if reverse else x)]
        value = values.dtype.type(count * step)
        if count == QUANTISED_MINUS_INF:
            value = values.dtype.type(-np.inf)
        elif count == QUANTISED_PLUS_INF:
            value = values.dtype.type(np.inf)
        elif count == QUANTISED_NAN:
            value = values.dtype.type(np.nan)
        values[x] = value


@_compiled
def _reverse(source, start, size, target):
    start, last = np.uint64(start), np.uint64(size - 1)
    for x in range(np.uint64(size)):
        target[x] = source[start + last - x]


@_compiled
def _copy(source, start, size, target):
    start = np.uint64(start)
    for x in range(np.uint64(size)):
        target[x] = source[start + x]
