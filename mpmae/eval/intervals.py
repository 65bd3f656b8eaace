"""How sure an accuracy is, from the images of the test split: bootstrap intervals, also of the difference of two encoders.

Shapes: N images.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from mpmae.eval.scores import CONFIDENCE, Score

NUM_DRAWS = 2000
_DRAWS_AT_ONCE = 50


def by_image(scores: Iterable[Score]) -> dict[str, float]:
    """Sample id -> share of the runs that were right about it, over the runs that had it in their test split."""
    found: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.per_sample.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def bootstrap(values: Mapping[str, float], seed: int = 0, num_draws: int = NUM_DRAWS) -> tuple[float, float, float]:
    """(mean, low, high) of values by image: the middle 95 % of the means of as many images drawn again with replacement.

    NaN without values; low and high are NaN for one image. Source: Efron and Tibshirani, "An introduction to the bootstrap",
    1993, chapter 13 (percentile interval).
    """
    numbers = np.array([values[name] for name in sorted(values)])
    if len(numbers) < 2:
        return float(numbers.mean()) if len(numbers) else math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            numbers[rng.integers(0, len(numbers), (min(_DRAWS_AT_ONCE, num_draws - start), len(numbers)))].mean(1)
            for start in range(0, num_draws, _DRAWS_AT_ONCE)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(numbers.mean()), float(low), float(high)


def paired_bootstrap(
    ours: Mapping[str, float], other: Mapping[str, float], seed: int = 0, num_draws: int = NUM_DRAWS
) -> tuple[float, float, float]:
    """(mean, low, high) of ours - other over the images that both have: the same images are drawn for both."""
    return bootstrap({name: ours[name] - other[name] for name in ours.keys() & other.keys()}, seed, num_draws)
