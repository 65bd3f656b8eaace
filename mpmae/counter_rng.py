"""Counter-based random bits: a pure function of (seed, stream, epoch, sample id, position).

The same numbers come out at any world size, number of workers or batch cut, which is what makes a run resumable and
independent of its launch. The mixer is the SplitMix64 finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014).

Shapes: N samples, K numbers per sample.
"""

from enum import IntEnum

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """What a draw is for: streams never share numbers."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    SHARD_ORDER = 5
    SYNTH = 6
    WINDOW = 7
    TOKENS = 8
    SHARES = 9
    AUGMENT = 10
    DROP_PATH = 11


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, stream: Stream, epoch: int, sample_ids: np.ndarray, num: int = 1) -> np.ndarray:
    """Uniform 64-bit integers, uint64 [N, K], for `num` = K draws of each sample id (int [N], >= 0)."""
    with np.errstate(over="ignore"):  # 64-bit wrap-around is the arithmetic of the generator
        state = np.zeros(1, np.uint64)
        for word in (seed, int(stream), epoch):
            state = _mix(state + _GOLDEN_GAMMA + np.uint64(word & 0xFFFFFFFFFFFFFFFF))
        per_sample = _mix(state + _GOLDEN_GAMMA * (np.asarray(sample_ids, np.uint64) + np.uint64(1)))
        counters = np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN_GAMMA
        return _mix(per_sample[:, None] + counters[None, :])


def random_integers(seed: int, stream: Stream, epoch: int, sample_ids: np.ndarray, bound: int, num: int = 1) -> np.ndarray:
    """Integers in [0, bound), int64 [N, K]; bound <= 2**32 keeps the bias below 2**-32."""
    bits = random_bits(seed, stream, epoch, sample_ids, num)
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)
