"""The stored bytes of a batch's samples in memory, and their members decompressed.

Shapes: N samples, M members of a sample, B stored bytes of a member.
"""

import numpy as np

from mpmae.errors import ShardError
from mpmae.loader.read import ShardReader
from mpmae.shard_codecs import decompress_into
from mpmae.shard_format import SCALARS_MEMBER, PixelEntry


class StoredSamples:
    """Samples int64 [N] as their shards hold them, one read each. Raises ShardError naming shard and sample."""

    def __init__(self, reader: ShardReader, sample_ids: np.ndarray):
        self._reader, self._ids = reader, sample_ids.tolist()
        self._position = {name: i for i, name in enumerate(reader.manifest.members)}
        self._spans = reader.spans(sample_ids)
        rows = reader.index[sample_ids]
        offset = rows["offset"].astype(np.int64)
        start = offset - offset[:, :1]
        end = start + rows["size"]
        outside = ((start < 0) | (end > end[:, -1:])).any(axis=1)
        if outside.any():
            sample_id = self._ids[int(np.argmax(outside))]
            raise reader.error(sample_id, "members out of order in the index; restore or rebuild the shard's index")
        self._start, self._end = start.T.tolist(), end.T.tolist()

    def decompress(self, entry: PixelEntry, first: int, out: np.ndarray) -> None:
        """Fill `out`, uint8 [n, B], with the still filtered bytes of a modality of the samples from the `first`-th on."""
        position = self._position[entry.name]
        start, end = self._start[position], self._end[position]
        for i, row in enumerate(out, first):
            try:
                decompress_into(entry, self._spans[i][start[i] : end[i]], row)
            except ShardError as error:
                raise self._reader.error(self._ids[i], str(error)) from error

    def records(self) -> np.ndarray:
        """The scalars, [N] of `manifest.scalars_dtype`."""
        dtype = self._reader.manifest.scalars_dtype
        start, end = self._start[-1], self._end[-1]
        for sample_id, a, b in zip(self._ids, start, end, strict=True):
            if b - a != dtype.itemsize:
                raise self._reader.error(sample_id, f"{SCALARS_MEMBER}: {b - a} bytes, expected {dtype.itemsize}")
        data = b"".join(span[a:b] for span, a, b in zip(self._spans, start, end, strict=True))
        return np.frombuffer(data, dtype)
