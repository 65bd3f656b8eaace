"""Members decode to exactly what was encoded, whatever the dtype, shape and bit pattern."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpmae.errors import ShardError
from mpmae.shard_codecs import decode_pixels, encode_pixels, pack_one_hot, unpack_one_hot
from mpmae.shard_format import pixel_entry

DTYPES = ("u1", "i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", ">u2", ">f4")


@st.composite
def bit_patterns(draw):
    """Arrays [C, P, P] of any dtype with any bits: NaN payloads, infinities, negative zeros."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    side = draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 4)), side, side)
    bits = draw(hnp.arrays(f"u{dtype.itemsize}", shape, elements=hnp.from_dtype(np.dtype(f"u{dtype.itemsize}"))))
    return bits.view(dtype.newbyteorder("=")).astype(dtype) if dtype.byteorder == ">" else bits.view(dtype)


@given(bit_patterns(), st.sampled_from(["raw", "lz4"]))
@settings(max_examples=300, deadline=None)
def test_pixels_keep_every_bit(values, codec):
    bands = tuple("ABCD"[: len(values)])
    entry = pixel_entry("sentinel1", "continuous", values.dtype, values.shape, bands, codec)
    decoded = decode_pixels(entry, encode_pixels(entry, values))
    assert decoded.dtype == values.dtype.newbyteorder("<")
    assert decoded.shape == values.shape
    assert decoded.tobytes() == values.astype(values.dtype.newbyteorder("<")).tobytes()


@given(bit_patterns(), st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_members_give_a_shard_error_or_the_right_form(values, data):
    entry = pixel_entry("sentinel1", "continuous", values.dtype, values.shape, ("A",) * len(values), "lz4")
    good = encode_pixels(entry, values)
    end = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.binary(max_size=8))
    try:
        decoded = decode_pixels(entry, good[:end] + junk)
    except ShardError:
        return
    assert (decoded.shape, decoded.dtype) == (values.shape, np.dtype(entry.dtype))


@given(st.sampled_from(["u1", "u2", "i4"]), st.integers(2, 900), st.data())
@settings(max_examples=200, deadline=None)
def test_one_hot_rows_return(dtype, length, data):
    kind = data.draw(st.sampled_from(["class", "zeros", "no data"]))
    row = np.zeros(length, dtype)
    if kind == "class":
        row[data.draw(st.integers(0, length - 1))] = 1
    elif kind == "no data":
        row[:] = np.iinfo(dtype).max
    back = unpack_one_hot(pack_one_hot(row), dtype, length)
    assert back.dtype == row.dtype
    np.testing.assert_array_equal(back, row)


@given(hnp.arrays("u1", st.integers(2, 20)))
@settings(max_examples=200, deadline=None)
def test_packing_refuses_or_is_lossless(row):
    try:
        class_id = pack_one_hot(row)
    except ValueError:
        assert not (row == 0).all()
        assert sorted(row[row != 0].tolist()) != [1]
    else:
        np.testing.assert_array_equal(unpack_one_hot(class_id, "u1", len(row)), row)


def test_wrong_sizes_are_told():
    entry = pixel_entry("aster", "continuous", np.dtype("i2"), (2, 4, 4), ("a", "b"), "raw")
    with pytest.raises(ShardError, match=r"aster: 63 bytes, expected 64"):
        decode_pixels(entry, bytes(63))
