"""Arrays of zarr format 2 straight from their chunks, as the sets here are stored: no event loop, so threads scale.

zarr-python opens and reads such a sample in 5 ms, one at a time in a process; this takes 1 ms, in any number of threads.
Format: zarr v2 specification (zarr-specs.readthedocs.io). The codecs are numcodecs', those of zarr itself.
"""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mpmae.shard_tools.sources.foreign import UnreadableError, missing_package

MAX_CHUNK_BYTES = 2**31
# Its decoder runs whatever program the file holds.
_UNSAFE_CODECS = {"pickle"}


class V2Array:
    """One array; indexing it with integers, slices of step 1 and `...` reads the chunks it needs.

    Raises UnreadableError, ValueError, KeyError or what the codecs raise when it cannot be read.
    """

    def __init__(self, name: str, read: Callable[[str], bytes | None]):
        """`read` gives the bytes of a member of the zip, None where there is none."""
        described = read(f"{name}/.zarray")
        if described is None:
            raise UnreadableError(f"no array {name}")
        self._name, self._read, meta = name, read, json.loads(described)
        self.attrs: dict[str, Any] = json.loads(read(f"{name}/.zattrs") or b"{}")
        self.shape, self.chunks = tuple(map(int, meta["shape"])), tuple(map(int, meta["chunks"]))
        self.dtype = np.dtype(meta["dtype"])
        self.fill_value = meta["fill_value"]
        self._order, self._separator = meta["order"], meta.get("dimension_separator", ".")
        specs = [*(meta.get("filters") or ()), *([meta["compressor"]] if meta["compressor"] else ())]
        self._codecs = [_codec(spec) for spec in specs]
        if len(self.chunks) != len(self.shape) or min(self.chunks, default=1) < 1 or self._order not in ("C", "F"):
            raise UnreadableError(f"array {name}: shape {self.shape} in chunks of {self.chunks}")
        if math.prod(self.chunks) * self.dtype.itemsize > MAX_CHUNK_BYTES:
            raise UnreadableError(f"array {name}: chunks of {self.chunks}, more than {MAX_CHUNK_BYTES} bytes each")

    def __getitem__(self, where: Any) -> np.ndarray:
        spans, dropped = self._spans(where if isinstance(where, tuple) else (where,))
        result = np.empty([stop - start for start, stop in spans], self.dtype)
        grid = [range(a // c, -(-b // c)) for (a, b), c in zip(spans, self.chunks, strict=True)]
        for place in itertools.product(*grid):
            chunk = self._chunk(place)
            target, source = [], []
            for i, (start, stop), size in zip(place, spans, self.chunks, strict=True):
                first, last = max(start, i * size), min(stop, (i + 1) * size)
                target.append(slice(first - start, last - start))
                source.append(slice(first - i * size, last - i * size))
            result[tuple(target)] = chunk[tuple(source)]
        return result[tuple(0 if i in dropped else slice(None) for i in range(len(spans)))]

    def _spans(self, where: tuple) -> tuple[list[tuple[int, int]], set[int]]:
        """First and last + 1 per axis, and the axes that an integer takes away."""
        if Ellipsis in where:
            at = where.index(Ellipsis)
            where = (*where[:at], *[slice(None)] * (len(self.shape) - len(where) + 1), *where[at + 1 :])
        where = (*where, *[slice(None)] * (len(self.shape) - len(where)))
        spans, dropped = [], set()
        for axis, (part, size) in enumerate(zip(where, self.shape, strict=True)):
            if isinstance(part, slice):
                start, stop, _ = part.indices(size)
                spans.append((start, max(start, stop)))
            elif 0 <= part < size:
                spans.append((int(part), int(part) + 1))
                dropped.add(axis)
            else:
                raise UnreadableError(f"array {self._name}: no place {part} among {size}")
        return spans, dropped

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray:
        key = self._separator.join(map(str, place)) or "0"
        data = self._read(f"{self._name}/{key}")
        if data is None:
            if self.fill_value is None:
                raise UnreadableError(f"array {self._name}: chunk {key} is missing")
            return np.full(self.chunks, self.fill_value, self.dtype)
        for codec in reversed(self._codecs):
            data = codec.decode(data)
        values = data if isinstance(data, np.ndarray) and data.dtype == self.dtype else np.frombuffer(data, self.dtype)
        return values.reshape(self.chunks, order=self._order)


def _codec(spec: dict[str, Any]):
    try:
        import numcodecs
    except ImportError as error:
        raise missing_package("numcodecs", "reading zarr files", error) from error
    if spec.get("id") in _UNSAFE_CODECS:
        raise UnreadableError(f"the codec {spec['id']} runs code of the file: not read")
    return numcodecs.get_codec(spec)
