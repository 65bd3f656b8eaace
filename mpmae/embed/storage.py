"""Vectors as they are stored, and back.

float16: each number rounded to the nearest float16: off by at most 2^-11 of itself, or 2^-25 where that is more.
int8: each vector has a `scale`, the largest magnitude in it / 127; a number is `scale * q`, off by at most half a `scale`,
which is 0.4 % of the vector's largest number.

Shapes: N vectors, D features.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from mpmae.errors import EmbeddingError

StoredDtype = Literal["float16", "int8"]
STORED_DTYPES: tuple[StoredDtype, ...] = get_args(StoredDtype)
MAX_CODE = 127
_LIMITS = {"float16": 65504.0, "int8": 1.7e38}


def encode(vectors: np.ndarray, dtype: StoredDtype, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 [N, D] as they are stored, [N, D] of `dtype`, and for int8 the scales float32 [N].

    Raises EmbeddingError naming tiles (`ids`, N) whose vector is not finite or too large.
    """
    limit = _LIMITS[dtype]
    with np.errstate(invalid="ignore"):
        broken = ~(np.isfinite(vectors) & (np.abs(vectors) <= limit)).all(axis=1)
    if broken.any():
        named = ", ".join(ids[i] for i in np.flatnonzero(broken)[:5])
        worst = vectors[np.flatnonzero(broken)[0]]
        hint = (
            "store them with --dtype int8"
            if dtype == "float16" and np.isfinite(vectors).all()
            else "look at these tiles' values and at the checkpoint: its encoder overflows"
        )
        raise EmbeddingError(
            f"{int(broken.sum())} vectors cannot be stored as {dtype}: tiles {named} (magnitude {np.abs(worst).max():g}, "
            f"expected finite numbers up to {limit:g}); {hint}"
        )
    if dtype == "float16":
        return vectors.astype(np.float16), None
    # Rounded up, so that no quotient exceeds MAX_CODE, however small the numbers are.
    largest = np.abs(vectors).max(axis=1, initial=0).astype(np.float64)
    scale = (largest / MAX_CODE).astype(np.float32)
    scale = np.where(scale * np.float64(MAX_CODE) < largest, np.nextafter(scale, np.float32(np.inf)), scale)
    divisor = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
    return np.rint(vectors / divisor).astype(np.int8), scale


def decode(stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The vectors float32 [N, D] of `encode`'s answer."""
    vectors = stored.astype(np.float32)
    return vectors if scale is None else vectors * scale.astype(np.float32)[:, None]
