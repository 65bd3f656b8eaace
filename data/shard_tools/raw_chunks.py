"""Rows of HDF5 datasets read past HDF5, whose filters run under one lock for the whole process.

Where a chunk is exactly one row, the row's bytes are one stretch of the file: its address is taken once from the chunk
index, then any thread reads and inflates it. Anything else goes through h5py.

Memory: 12 bytes a row and dataset, 0.22 GB for 1.2 million tiles of 15 modalities.

Shapes: N rows (tiles).
"""

import os
import threading
import zlib
from collections.abc import Callable

import h5py
import numpy as np

try:
    from isal import isal_zlib as inflater
except ImportError:  # no wheel for this processor
    inflater = zlib

# What h5py raises on damaged files, depending on which bytes are wrong.
READ_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError, OverflowError, MemoryError)
NUM_CHECKED_ROWS = 3
MAX_KEPT_BYTES = 256


class ChunkError(Exception):
    """A chunk whose bytes are not what its dataset needs."""


class DatasetReader:
    """Rows of a dataset, from any thread: outside HDF5 where its layout allows, else through h5py.

    `why_hdf5` is empty for a dataset that is read outside HDF5, else it says why it is not. `num_unwritten`: rows without a
    chunk, which are the fill value; 0 where only HDF5 knows. Both are known after `load`.
    `descriptor` is that of the open file.
    """

    def __init__(self, dataset: h5py.Dataset, descriptor: int, user_block_bytes: int = 0):
        self._dataset, self._descriptor, self._user_block_bytes = dataset, descriptor, user_block_bytes
        self._row_shape, self._dtype = dataset.shape[1:], dataset.dtype
        self._row_bytes = int(np.prod(self._row_shape)) * self._dtype.itemsize
        self._native = dataset.dtype.newbyteorder("<")
        self._num_file_bytes = os.fstat(descriptor).st_size
        self._lock = threading.Lock()
        self._is_loaded = False
        self._kept: tuple[bytes, np.ndarray] | None = None
        self.why_hdf5, self.num_unwritten = "", 0

    def load(self) -> None:
        """Take the chunk addresses: 1.4 µs a row, and the index's disk reads. The first row asked for does it otherwise.

        Raises ChunkError for an index with chunks that cannot be: HDF5 would give the rows that they belong to as fill
        values, without a word.
        """
        with self._lock:
            if self._is_loaded:
                return
            self._filters, self.why_hdf5 = _filters(self._dataset)
            if not self.why_hdf5:
                self.why_hdf5 = self._take_addresses()
            self._is_loaded = True

    def __getitem__(self, row: int) -> np.ndarray:
        """The row, little-endian; it may be read-only and shared.

        Raises ChunkError, or what h5py raises (`READ_ERRORS`), for a chunk that is damaged.
        """
        if not self._is_loaded:
            self.load()
        if self.why_hdf5 or not self._size[row]:  # without a chunk the row is the fill value, which h5py knows
            return self._through_hdf5(row)
        return self._outside(row)

    def _through_hdf5(self, row: int) -> np.ndarray:
        return self._dataset[row].astype(self._native, copy=False)

    def _outside(self, row: int) -> np.ndarray:
        size, offset = int(self._size[row]), int(self._offset[row])
        # A damaged size may be gigabytes, and `pread` would make room for them.
        data = os.pread(self._descriptor, size, offset) if offset + size <= self._num_file_bytes else b""
        if len(data) != size:
            raise ChunkError(f"its {size} bytes at {offset} go past the end of the file")
        left_out = self._left_out.get(row, 0)
        # Rows of one value, such as those of an absent modality, repeat byte for byte.
        kept = self._kept
        if kept is not None and data == kept[0] and not left_out:
            return kept[1]
        stored = data
        for i, undo in self._filters:
            if not left_out >> i & 1:
                data = undo(data, self._row_bytes)
        if len(data) != self._row_bytes:
            raise ChunkError(f"it has {len(data)} bytes, expected {self._row_bytes}")
        values = np.frombuffer(data, self._dtype).reshape(self._row_shape)
        if self._dtype != self._native:
            values = values.astype(self._native)
        if size <= MAX_KEPT_BYTES and not left_out:
            values.flags.writeable = False
            self._kept = stored, values
        return values

    def _take_addresses(self) -> str:
        num_rows = len(self._dataset)
        self._offset, self._size = np.zeros(num_rows, np.uint64), np.zeros(num_rows, np.uint32)
        self._left_out: dict[int, int] = {}
        wrong: list[int] = []

        def take(chunk) -> None:
            row = chunk.chunk_offset[0]
            if row >= num_rows or self._size[row]:
                wrong.append(row)
                return
            self._offset[row], self._size[row] = chunk.byte_offset, chunk.size
            if chunk.filter_mask:
                self._left_out[row] = chunk.filter_mask

        try:
            self._dataset.id.chunk_iter(take)
        except READ_ERRORS as error:
            return f"its chunk index cannot be read: {error}"
        if wrong:
            raise ChunkError(
                f"its chunk index is damaged: {len(wrong)} chunks twice or past its {num_rows} rows, first at row {wrong[0]}"
            )
        written = np.flatnonzero(self._size)
        self.num_unwritten = num_rows - len(written)
        rows = written[np.linspace(0, len(written) - 1, min(NUM_CHECKED_ROWS, len(written))).astype(int)].tolist()
        if all(self._agrees(row) for row in rows):
            return ""
        # Versions of HDF5 differ in whether an address counts from the start of the file or behind the user block.
        if self._user_block_bytes:
            self._offset += np.uint64(self._user_block_bytes)
            if all(self._agrees(row) for row in rows):
                return ""
        return "what is read outside HDF5 differs from what HDF5 gives"

    def _agrees(self, row: int) -> bool:
        """Whether both ways give the same bytes, or both find the chunk damaged."""
        results = []
        for read in (self._through_hdf5, self._outside):
            try:
                results.append(read(row).tobytes())
            except (ChunkError, *READ_ERRORS):
                results.append(None)
        return results[0] == results[1]


def _filters(dataset: h5py.Dataset) -> tuple[list[tuple[int, Callable[[bytes, int], bytes]]], str]:
    """The steps that undo the filters of a dataset, each with its place in the filter mask, or why h5py must do it."""
    if not hasattr(dataset.id, "chunk_iter"):
        return [], "this h5py cannot list chunks"
    properties = dataset.id.get_create_plist()
    if properties.get_layout() != h5py.h5d.CHUNKED:
        return [], "it is not chunked"
    if dataset.chunks != (1, *dataset.shape[1:]):
        return [], f"its chunks are {dataset.chunks}, not one row"
    undo = []
    for i in range(properties.get_nfilters()):
        code, _, options, name = properties.get_filter(i)
        if code == h5py.h5z.FILTER_DEFLATE:
            undo.append((i, _inflate))
        elif code == h5py.h5z.FILTER_SHUFFLE:
            undo.append((i, _unshuffle(options[0] if options else dataset.dtype.itemsize)))
        else:
            return [], f"filter {name.decode(errors='replace') or code}"
    return undo[::-1], ""


def _inflate(data: bytes, num_bytes: int) -> bytes:
    """The `num_bytes` that `data` holds; ChunkError when it is damaged. Never makes more, whatever the bytes say."""
    stream = inflater.decompressobj()
    try:
        result = stream.decompress(data, num_bytes + 1)
    except (zlib.error, inflater.error) as error:
        raise ChunkError(f"bad deflate data: {error}") from error
    if len(result) > num_bytes:
        raise ChunkError(f"its deflate data gives more than the {num_bytes} bytes of a row")
    if not stream.eof:
        raise ChunkError(f"its deflate data is cut off after {len(result)} of {num_bytes} bytes")
    return result


def _unshuffle(word_bytes: int) -> Callable[[bytes, int], bytes]:
    def undo(data: bytes, num_bytes: int) -> bytes:
        if word_bytes <= 1 or len(data) % word_bytes:
            return data
        return np.frombuffer(data, np.uint8).reshape(word_bytes, -1).T.tobytes()

    return undo
