"""The loops over values behind the band statistics, compiled, free of the interpreter lock.

Shapes: C bands, N values of a band.
"""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def add_integers(values: np.ndarray, valid: np.ndarray, sums: np.ndarray, limits: np.ndarray) -> None:
    """Adds the valid of `values` (integers of up to 16 bits, [C, N]) to `sums` int64 [3, C] and `limits` int64 [2, C].

    sums: number, sum, sum of squares, exact while they stay below 2^63. limits: minimum, maximum.
    """
    for band in range(values.shape[0]):
        num, total, squares = np.int64(0), np.int64(0), np.int64(0)
        low, high = limits[0, band], limits[1, band]
        for i in range(values.shape[1]):
            x, counts = np.int64(values[band, i]), valid[band, i]
            kept = x if counts else np.int64(0)
            num += np.int64(counts)
            total += kept
            squares += kept * kept
            low = min(low, x if counts else low)
            high = max(high, x if counts else high)
        sums[0, band] += num
        sums[1, band] += total
        sums[2, band] += squares
        limits[0, band], limits[1, band] = low, high


@njit(nogil=True, cache=True)
def add_floats(values: np.ndarray, valid: np.ndarray, num: np.ndarray, moments: np.ndarray) -> None:
    """Merges the moments of the valid of `values` ([C, N]) into `num` int64 [C] and `moments` float64 [4, C].

    moments: mean, sum of squared deviations, minimum, maximum. The sums run in four lanes, in an order that only N decides.
    """
    lanes = np.zeros(4, np.float64)
    for band in range(values.shape[0]):
        count = np.int64(0)
        low, high = moments[2, band], moments[3, band]
        lanes[:] = 0
        for i in range(values.shape[1]):
            if valid[band, i]:
                x = np.float64(values[band, i])
                count += 1
                lanes[i & 3] += x
                low, high = min(low, x), max(high, x)
        if count == 0:
            continue
        mean = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) / count
        lanes[:] = 0
        for i in range(values.shape[1]):
            if valid[band, i]:
                deviation = np.float64(values[band, i]) - mean
                lanes[i & 3] += deviation * deviation
        m2 = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
        together = num[band] + count
        delta, share = mean - moments[0, band], count / together
        moments[0, band] += delta * share
        moments[1, band] += m2 + delta * delta * num[band] * share
        moments[2, band], moments[3, band] = low, high
        num[band] = together
