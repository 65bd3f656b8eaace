"""What stored vectors lose, for any numbers."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mpmae.embed.storage import decode, encode
from mpmae.errors import EmbeddingError

LARGEST = float(np.float32(1.7e38))
FINITE = st.floats(-LARGEST, LARGEST, width=32)


def matrices(elements):
    return arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=elements)


@given(matrices(FINITE))
@example(np.array([[1e-45, 0], [190e-45, -3e-45]], np.float32))
@example(np.array([[LARGEST, 1]], np.float32))
def test_int8_is_off_by_half_a_scale_at_most(vectors):
    stored, scale = encode(vectors, "int8", ["x"] * len(vectors))
    assert stored.dtype == np.int8
    assert stored.min() >= -127
    largest = np.abs(vectors.astype(np.float64)).max(axis=1)
    assert (scale >= largest / 127).all()
    assert (scale <= largest / 127 * (1 + 2**-22) + 2e-45).all()
    error = np.abs(decode(stored, scale).astype(np.float64) - vectors)
    assert (error <= scale[:, None].astype(np.float64) * (0.5 + 127 * 2**-24)).all()


@given(matrices(st.floats(-65504, 65504, width=32)))
def test_float16_is_off_by_its_rounding(vectors):
    stored, scale = encode(vectors, "float16", ["x"] * len(vectors))
    assert scale is None
    error = np.abs(decode(stored, scale).astype(np.float64) - vectors)
    assert (error <= np.maximum(np.abs(vectors) * 2.0**-11, 2.0**-25)).all()


def test_zeros_come_back():
    for dtype in ("float16", "int8"):
        assert not decode(*encode(np.zeros((2, 3), np.float32), dtype, "ab")).any()
        assert decode(*encode(np.zeros((0, 3), np.float32), dtype, [])).shape == (0, 3)


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (7e4, "float16", r"tiles b .*70000.*65504\); store them with --dtype int8"),
        (np.nan, "int8", r"tiles b .*finite.*overflows"),
        (np.inf, "float16", r"tiles b .*overflows"),
        (3e38, "int8", r"tiles b .*overflows"),
    ],
)
def test_what_cannot_be_stored_is_refused(value, dtype, told):
    with pytest.raises(EmbeddingError, match=told):
        encode(np.array([[1, 2], [3, value]], np.float32), dtype, ["a", "b"])
