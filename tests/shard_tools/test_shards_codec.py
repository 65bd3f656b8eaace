"""Members decode to exactly what was encoded, whatever the dtype, shape and bit pattern; damaged ones never do harm."""

from contextlib import suppress

import cramjam
import lz4.block
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpmae.errors import ShardError
from mpmae.shard_codecs import decode_pixels, decompress_into, encode_pixels, pack_one_hot, unpack_one_hot
from mpmae.shard_format import pixel_entry

DTYPES = ("u1", "i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8", ">u2", ">f4")
CODECS = ("raw", "lz4", "zstd")


@st.composite
def bit_patterns(draw):
    """Arrays [C, P, P] of any dtype with any bits: NaN payloads, infinities, negative zeros."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    side = draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 4)), side, side)
    bits = draw(hnp.arrays(f"u{dtype.itemsize}", shape, elements=hnp.from_dtype(np.dtype(f"u{dtype.itemsize}"))))
    return bits.view(dtype.newbyteorder("=")).astype(dtype) if dtype.byteorder == ">" else bits.view(dtype)


def entry_of(values, codec, **options):
    return pixel_entry("sentinel1", "continuous", values.dtype, values.shape, ("A",) * len(values), codec, **options)


@given(bit_patterns(), st.sampled_from(CODECS))
@settings(max_examples=300, deadline=None)
def test_pixels_keep_every_bit(values, codec):
    entry = entry_of(values, codec)
    decoded = decode_pixels(entry, encode_pixels(entry, values))
    assert decoded.dtype == values.dtype.newbyteorder("<")
    assert decoded.shape == values.shape
    assert decoded.tobytes() == values.astype(values.dtype.newbyteorder("<")).tobytes()


def filtered_by_numpy(values: np.ndarray) -> bytes:
    """The filter as the format defines it: horizontal difference, zigzag, one plane per byte of the word."""
    unsigned = values.view(f"<u{values.itemsize}")
    delta = unsigned.copy()
    delta[..., 1:] -= unsigned[..., :-1]
    signed = delta.view(f"<i{values.itemsize}")
    zigzag = (signed << 1) ^ (signed >> (8 * values.itemsize - 1))
    return zigzag.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


@given(bit_patterns(), st.sampled_from(["lz4", "zstd"]))
@settings(max_examples=200, deadline=None)
def test_the_stored_bytes_are_those_of_the_format(values, codec):
    """What earlier versions and nvCOMP read and wrote: plain LZ4 blocks of the filter's planes; zstd frames of the same."""
    entry = entry_of(values, codec)
    values = values.astype(entry.dtype)
    plain = filtered_by_numpy(values) if values.itemsize > 1 else values.tobytes()
    data = encode_pixels(entry, values)
    if codec == "lz4":
        assert lz4.block.decompress(data, uncompressed_size=len(plain)) == plain
        written_before = lz4.block.compress(plain, store_size=False)
        assert decode_pixels(entry, written_before).tobytes() == values.tobytes()
    else:
        assert bytes(cramjam.zstd.decompress(data)) == plain


def filler(codec: str, data: bytes) -> bytes:
    return lz4.block.compress(data, store_size=False) if codec == "lz4" else bytes(cramjam.zstd.compress(data))


@given(bit_patterns(), st.sampled_from(CODECS), st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_members_give_a_shard_error_or_the_right_form(values, codec, data):
    """Cut, extended, overwritten, or made for another size: never more or fewer bytes than the array has."""
    entry = entry_of(values, codec)
    good = encode_pixels(entry, values)
    bad = bytearray(good[: data.draw(st.integers(0, len(good)))] + data.draw(st.binary(max_size=8)))
    for position, byte in data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), max_size=4)):
        if position < len(bad):
            bad[position] = byte
    room = np.full(entry.stored_bytes + 64, 0xA5, np.uint8)
    with suppress(ShardError):
        decompress_into(entry, bytes(bad), room[:-64])
        decoded = decode_pixels(entry, bytes(bad))
        assert (decoded.shape, decoded.dtype) == (values.shape, np.dtype(entry.dtype))
    assert (room[-64:] == 0xA5).all()


@given(st.sampled_from(["lz4", "zstd"]), st.integers(1, 300), st.integers(0, 600), st.randoms())
@settings(max_examples=200, deadline=None)
def test_blocks_of_another_size_are_refused(codec, side, other_bytes, random):
    entry = pixel_entry("esa_worldcover", "categorical", np.dtype("u1"), (1, side, side), ("Map",), codec)
    data = filler(codec, random.randbytes(other_bytes) if random.random() < 0.5 else bytes(other_bytes))
    if other_bytes == side * side:
        assert decode_pixels(entry, data).size == other_bytes
    else:
        with pytest.raises(ShardError, match="esa_worldcover"):
            decode_pixels(entry, data)


@pytest.mark.parametrize("num_bytes", [64, 4096, 131072])
def test_a_block_with_its_size_in_front_is_refused(num_bytes):
    """nvCOMP could not read it. Blocks whose first bytes merely look like a size are read: zeros give such a block."""
    entry = pixel_entry("sentinel1", "continuous", np.dtype("f4"), (num_bytes // 4, 1, 1), ("A",) * (num_bytes // 4), "lz4")
    with pytest.raises(ShardError, match="sentinel1"):
        decode_pixels(entry, lz4.block.compress(bytes(num_bytes), store_size=True))
    plain = lz4.block.compress(bytes(num_bytes), store_size=False)
    assert not decode_pixels(entry, plain).any()
    if num_bytes == 131072:
        assert int.from_bytes(plain[:4], "little") < num_bytes


@pytest.mark.parametrize("num_bytes", [0x40 + 256, 0x73, 0xE0 + 512])
def test_a_plain_block_that_begins_with_its_own_size(num_bytes):
    """Literals (the other bytes of the size first), one match, literals: read as any other, and cut it is refused."""
    size = num_bytes.to_bytes(4, "little")
    num_literals, num_matched = size[0] >> 4, (size[0] & 15) + 4
    rest = num_bytes - num_literals - num_matched
    extra = [255] * ((rest - 15) // 255) + [(rest - 15) % 255]
    block = size + bytes(num_literals - 3) + b"\x01\x00\xf0" + bytes(extra) + bytes(range(256)) * 4
    block = block[: len(block) - 1024 + rest]
    expected = lz4.block.decompress(block, uncompressed_size=num_bytes)
    entry = pixel_entry("esa_worldcover", "categorical", np.dtype("u1"), (num_bytes, 1, 1), ("Map",) * num_bytes, "lz4")
    assert decode_pixels(entry, block).tobytes() == expected
    with pytest.raises(ShardError, match="esa_worldcover"):
        decode_pixels(entry, block[:-1])


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
