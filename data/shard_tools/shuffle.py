"""The order of samples within the shards of a split, wherever they come from: a dataset, other sets, a lost index."""

import numpy as np

from mpmae.counter_rng import Stream, random_bits


def shuffle(rows: np.ndarray, seed: int) -> np.ndarray:
    """Positions that put source `rows` [N] into the order of a split, int64 [N]: a pure function of them and the seed."""
    return np.argsort(random_bits(seed, Stream.SHARD_ORDER, 0, rows)[:, 0], kind="stable")
