"""Rows read outside HDF5 equal what h5py gives, whatever the layout; a damaged chunk is told, never passed on."""

import os
import random
import re
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpmae.errors import SourceError
from mpmae.shard_tools import raw_chunks
from mpmae.shard_tools.build import build
from mpmae.shard_tools.raw_chunks import READ_ERRORS, ChunkError, DatasetReader
from mpmae.shard_tools.source import MMEarthSource

NUM_ROWS = 9
SHAPE = (NUM_ROWS, 2, 8, 8)


def values_of(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, SHAPE).astype(dtype)
    values[3] = 7
    return values


def fill(file: h5py.File, dtype: str = "u2", chunks: tuple | None = (1, 2, 8, 8), **options) -> None:
    dataset = file.create_dataset("data", SHAPE, dtype, chunks=chunks, **options)
    dataset[:] = values_of(dtype)


def half_written(file: h5py.File) -> None:
    dataset = file.create_dataset("data", SHAPE, "u2", chunks=(1, 2, 8, 8), compression="gzip", fillvalue=513)
    for row in (1, 4, 8):
        dataset[row] = values_of("u2")[row]


def masked_filters(file: h5py.File) -> None:
    """As HDF5 writes chunks whose optional filter could not shrink them."""
    fill(file, compression="gzip", shuffle=True)
    plain = values_of("u2")[2]
    file["data"].id.write_direct_chunk((2, 0, 0, 0), plain.tobytes(), filter_mask=0b11)
    shuffled = plain.view(np.uint8).reshape(-1, 2).T.tobytes()
    file["data"].id.write_direct_chunk((3, 0, 0, 0), shuffled, filter_mask=0b10)
    file["data"].id.write_direct_chunk((5, 0, 0, 0), zlib.compress(plain.tobytes()), filter_mask=0b01)


OUTSIDE = {
    "gzip": lambda f: fill(f, compression="gzip"),
    "shuffle and gzip": lambda f: fill(f, compression="gzip", shuffle=True),
    "shuffle of bytes": lambda f: fill(f, "u1", compression="gzip", shuffle=True),
    "shuffle alone": lambda f: fill(f, "f4", shuffle=True),
    "no filter": lambda f: fill(f, "i2"),
    "big-endian": lambda f: fill(f, ">u2", compression="gzip"),
    "big-endian shuffled floats": lambda f: fill(f, ">f4", compression="gzip", shuffle=True),
    "grows": lambda f: fill(f, compression="gzip", maxshape=(None, 2, 8, 8)),
    "unwritten chunks": half_written,
    "all unwritten": lambda f: f.create_dataset("data", SHAPE, "f4", chunks=(1, 2, 8, 8), fillvalue=-1),
    "filter masks": masked_filters,
}
THROUGH_HDF5 = {
    "contiguous": (lambda f: fill(f, chunks=None), "it is not chunked"),
    "lzf": (lambda f: fill(f, compression="lzf"), "filter lzf"),
    "fletcher32": (lambda f: fill(f, compression="gzip", fletcher32=True), "filter fletcher32"),
    "scale-offset": (lambda f: fill(f, scaleoffset=0), "filter"),
    "several rows": (lambda f: fill(f, chunks=(3, 2, 8, 8), compression="gzip"), "not one row"),
    "half a row": (lambda f: fill(f, chunks=(1, 1, 8, 8), compression="gzip"), "not one row"),
}


class Opened:
    def __init__(self, path: Path):
        self.file = h5py.File(path)
        self.descriptor = os.open(path, os.O_RDONLY)
        self.reader = DatasetReader(self.file["data"], self.descriptor, self.file.userblock_size)
        self.reader.load()

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *exc_info) -> None:
        self.file.close()
        os.close(self.descriptor)


def assert_equal_rows(opened: Opened) -> None:
    for row in range(NUM_ROWS):
        expected, found = opened.file["data"][row], opened.reader[row]
        assert found.dtype == expected.dtype.newbyteorder("<")
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("userblock_size", [0, 1024])
@pytest.mark.parametrize("case", OUTSIDE)
def test_rows_outside_hdf5(case, userblock_size, libver, tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w", libver=libver, userblock_size=userblock_size) as file:
        OUTSIDE[case](file)
    with Opened(tmp_path / "a.h5") as opened:
        assert opened.reader.why_hdf5 == ""
        assert_equal_rows(opened)
        if case not in ("unwritten chunks", "all unwritten"):
            monkeypatch.setattr(DatasetReader, "_through_hdf5", lambda *args: pytest.fail("read through HDF5"))
            opened.reader[3]


@pytest.mark.parametrize("case", THROUGH_HDF5)
def test_other_layouts_go_through_hdf5_and_say_so(case, tmp_path):
    make, why = THROUGH_HDF5[case]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        make(file)
    with Opened(tmp_path / "a.h5") as opened:
        assert why in opened.reader.why_hdf5
        assert_equal_rows(opened)


def test_works_without_isal(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_chunks, "inflater", zlib)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file, compression="gzip")
    with Opened(tmp_path / "a.h5") as opened:
        assert_equal_rows(opened)


def test_rows_that_differ_from_hdf5_are_left_to_it(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file, compression="gzip")
    monkeypatch.setattr(raw_chunks, "_inflate", lambda data, num_bytes: bytes(num_bytes))
    with Opened(tmp_path / "a.h5") as opened:
        assert opened.reader.why_hdf5 == "what is read outside HDF5 differs from what HDF5 gives"
        assert_equal_rows(opened)


def cut_deflate(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def another_size(data: bytes) -> bytes:
    return zlib.compress(bytes(17))


def bomb(data: bytes) -> bytes:
    return zlib.compress(bytes(10**7), 9)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: b"\xff" * len(data), "bad deflate data"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "bad deflate data"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (cut_deflate, "bad deflate data|more than"),
        (another_size, "it has 17 bytes, expected 256"),
        (bomb, "more than the 256 bytes of a row"),
    ],
)
def test_a_damaged_chunk_is_told(damage, why, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file, compression="gzip")
        _, data = file["data"].id.read_direct_chunk((2, 0, 0, 0))
        file["data"].id.write_direct_chunk((2, 0, 0, 0), damage(data))
    with Opened(tmp_path / "a.h5") as opened:
        assert opened.reader.why_hdf5 == ""
        with pytest.raises(ChunkError, match=why):
            opened.reader[2]
        np.testing.assert_array_equal(opened.reader[1], values_of("u2")[1])


def test_a_chunk_past_the_end_is_told(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file, compression="gzip")
    with Opened(tmp_path / "a.h5") as opened:
        opened.reader._offset[6] = 10**12
        with pytest.raises(ChunkError, match="1000000000000 go past the end of the file"):
            opened.reader[6]


def test_a_damaged_chunk_index_is_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w", libver="earliest") as file:
        fill(file, compression="gzip")
    data = (tmp_path / "a.h5").read_bytes()
    place = data.rindex(b"TREE")
    (tmp_path / "a.h5").write_bytes(data[:place] + b"TREX" + data[place + 4 :])
    with Opened(tmp_path / "a.h5") as opened:
        assert "its chunk index cannot be read" in opened.reader.why_hdf5
        with pytest.raises(READ_ERRORS):
            opened.reader[0]


def test_a_damaged_chunk_size_is_told_before_it_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file, compression="gzip")
    with Opened(tmp_path / "a.h5") as opened:
        opened.reader._size[6] = 2**32 - 1
        tracemalloc.start()
        with pytest.raises(ChunkError, match=r"4294967295 bytes at .* go past the end of the file"):
            opened.reader[6]
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()


@pytest.mark.parametrize(("row", "why"), [(NUM_ROWS, f"past its {NUM_ROWS} rows"), (2**55, "past"), (4, "twice")])
def test_chunks_that_cannot_be_are_told(row, why, own_source):
    """HDF5 itself gives the row that such a chunk should be as fill values."""
    path = own_source / "tiny.h5"
    with h5py.File(path, "r+", libver="earliest") as file:
        del file["month"]
        file.create_dataset("month", (NUM_ROWS, 2), "f4", chunks=(1, 2))[:] = 1
        chunks = [file["month"].id.get_chunk_info(i) for i in range(NUM_ROWS)]
    # Version 1 B-tree of chunks: a key is the size in bytes, the filter mask, the offsets; an address follows (HDF5 file
    # format specification, III.A.1).
    data = bytearray(path.read_bytes())
    key = struct.pack("<IIQQQ", 8, 0, 5, 0, 0) + struct.pack("<Q", chunks[5].byte_offset)
    assert data.count(key) == 1
    place = data.index(key) + 8
    data[place : place + 8] = struct.pack("<Q", row)
    path.write_bytes(data)
    with h5py.File(path) as file:
        descriptor = os.open(path, os.O_RDONLY)
        reader = DatasetReader(file["month"], descriptor)
        with pytest.raises(ChunkError, match=f"chunk index is damaged: 1 chunks twice or past .* first at row {row}"):
            reader[0]
        os.close(descriptor)


def test_what_a_source_lacks_or_leaves_out_is_told(own_source):
    with h5py.File(own_source / "tiny.h5", "r+") as file:
        num_tiles, form = len(file["month"]), {"chunks": (1, 2), "dtype": "f4"}
        del file["month"]
        file.create_dataset("month", (num_tiles, 2), **form)[: num_tiles - 2] = 1
        file["extra"] = [1, 2]
    with MMEarthSource(own_source) as source:
        left_out, lacking = source.notes()
    assert "no known modality: extra" in left_out
    assert f"fill value: month (2 of {num_tiles} rows)" in lacking


def test_any_damage_to_the_file_is_told(own_source, tmp_path):
    """A build of a file with wrong bytes is a set, or a SourceError; never anything else."""
    path, rng, num_told = own_source / "tiny.h5", random.Random(0), 0
    original = path.read_bytes()
    structure = [i for magic in (b"TREE", b"SNOD", b"HEAP") for i in found_at(original, magic)]
    for _ in range(60):
        data = bytearray(original)
        for _ in range(rng.choice([1, 3])):
            data[rng.choice(structure) + rng.randrange(400)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            build(own_source, tmp_path / "set", splits=["val"], overwrite=True, workers=1, progress=False)
        except SourceError as error:
            num_told += "tiny" in str(error)
    assert num_told > 10


def found_at(data: bytes, magic: bytes) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(magic), data)]


def test_many_threads_read_the_same(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file, compression="gzip", shuffle=True)
    expected, wrong = values_of("u2"), []
    with Opened(tmp_path / "a.h5") as opened:

        def read() -> None:
            for row in np.random.default_rng().integers(0, NUM_ROWS, 200).tolist():
                if not np.array_equal(opened.reader[row], expected[row]):
                    wrong.append(row)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_the_source_names_what_only_hdf5_can_read(own_source):
    with h5py.File(own_source / "tiny.h5", "r+") as file:
        for name, options in (("aster", {}), ("biome", {"compression": "lzf", "chunks": (1, 14)})):
            values = file[name][:]
            del file[name]
            file.create_dataset(name, data=values, **options)
    with MMEarthSource(own_source) as source:
        (note,) = source.notes()
        assert "aster (it is not chunked), biome (filter lzf)" in note
        assert "tiny.h5: read through HDF5's lock" in note


def test_real_tiles_are_read_outside_hdf5(real_source):
    with MMEarthSource(real_source) as source, h5py.File(source.h5_path) as file:
        assert source.notes() == []
        for row in range(0, source.num_tiles, 9):
            tile = source.read_tile(row)
            for name, values in tile.values.items():
                assert values.tobytes() == file[name][row].tobytes()
