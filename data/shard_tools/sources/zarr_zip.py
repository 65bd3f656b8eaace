"""Arrays out of zipped zarr groups (format 2 or 3), whole in memory or in a file: the one module that imports zarr."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mpmae.errors import SourceError
from mpmae.shard_tools.sources.foreign import UnreadableError, missing_package, said
from mpmae.shard_tools.sources.zarr_v2 import V2Array

_UNITS_NS = {"days": 86_400 * 10**9, "hours": 3_600 * 10**9, "minutes": 60 * 10**9, "seconds": 10**9}
_UNITS_NS |= {"milliseconds": 10**6, "microseconds": 10**3, "nanoseconds": 1}


class ZarrZip:
    """A zipped group, given as bytes or as the path of a file; arrays are read as they are asked for.

    Format 2 is read by `zarr_v2`, format 3 by zarr. Raises UnreadableError for anything that does not read; SourceError
    where the package needed is not installed.
    """

    def __init__(self, data: bytes | Path):
        self._arrays: dict[str, Any] = {}
        try:
            self._zip = zipfile.ZipFile(data if isinstance(data, Path) else io.BytesIO(data))
            self._names = set(self._zip.namelist())
            self._group = None if ".zgroup" in self._names else self._open_v3()
        except SourceError:
            raise
        except Exception as error:  # damaged bytes fail anywhere: in the zip, in the JSON, inside zarr
            raise UnreadableError(f"not a whole zarr zip ({said(error)})") from error

    def _open_v3(self):
        zarr = _zarr()
        members = {name: zarr.buffer.cpu.Buffer.from_bytes(self._zip.read(name)) for name in self._names}
        return zarr.open_group(zarr.storage.MemoryStore(members, read_only=True), mode="r")

    def __enter__(self) -> "ZarrZip":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def __contains__(self, name: str) -> bool:
        return f"{name}/.zarray" in self._names if self._group is None else name in self._group

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self._array(name).shape

    def chunks(self, name: str) -> tuple[int, ...]:
        """Shape of its chunks, the least that is read."""
        return self._array(name).chunks

    def dtype(self, name: str) -> np.dtype:
        """Its dtype."""
        return np.dtype(self._array(name).dtype)

    def read(self, name: str, where: Any = ...) -> np.ndarray:
        """Its values at the index `where`."""
        try:
            return np.asarray(self._array(name)[where])
        except (UnreadableError, SourceError):
            raise
        except Exception as error:  # the codecs of damaged chunks raise errors of many kinds
            raise UnreadableError(f"array {name} cannot be read ({said(error)})") from error

    def texts(self, name: str) -> list[str] | None:
        """The values of an array of names; None where there is none."""
        if name not in self:
            return None
        values = self.read(name).ravel().tolist()
        return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]

    def fill(self, name: str) -> float | None:
        """What the array writes for absent values.

        That is the attribute `_FillValue` or, in format 2 as xarray uses it, a fill value other than 0: zarr's own default
        is 0, which in most layers is a value like any other.
        """
        array = self._array(name)
        value = array.attrs.get("_FillValue")
        if value is None and self._group is None:
            value = array.fill_value or None
        return float(value) if isinstance(value, int | float | np.number) else None

    def times_ns(self, name: str, where: Any = ...) -> np.ndarray:
        """Times as nanoseconds since 1970, int64: dates, integers with `units` ("days since 2020-05-03"), or nanoseconds."""
        values = self.read(name, where)
        if values.dtype.kind == "M":
            return values.astype("datetime64[ns]").astype(np.int64)
        units = str(self._array(name).attrs.get("units", ""))
        match = re.fullmatch(r"(\w+) since (\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d(?:\.\d+)?))?.*", units)
        if not match or match[1] not in _UNITS_NS:
            return values.astype(np.int64)
        start = np.datetime64(f"{match[2]}T{match[3] or '00:00:00'}", "ns").astype(np.int64)
        return start + (values * _UNITS_NS[match[1]]).astype(np.int64)

    def _array(self, name: str):
        try:
            if name not in self._arrays:
                self._arrays[name] = V2Array(name, self._member) if self._group is None else self._group[name]
            return self._arrays[name]
        except (UnreadableError, SourceError):
            raise
        except Exception as error:  # absent, or metadata that zarr cannot parse
            raise UnreadableError(f"no usable array {name} ({said(error)})") from error

    def _member(self, name: str) -> bytes | None:
        return self._zip.read(name) if name in self._names else None


def _zarr():
    try:
        import zarr
        import zarr.buffer
        import zarr.storage
    except ImportError as error:
        raise missing_package("zarr", "reading zarr files", error) from error
    return zarr
