"""Where the members of a tar lie, from its headers alone: one small read per member, nothing extracted.

Format: USTAR (POSIX.1-1988); a tar with extended headers (long names) is left to the standard library.

Shapes: M members.
"""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpmae.errors import SourceError

_BLOCK = tarfile.BLOCKSIZE
_EMPTY = b"\0" * _BLOCK
_DAMAGED = "the download is damaged or cut off; download the file again"


@dataclass(frozen=True)
class TarIndex:
    """Members of a tar: keys bytes [M] (file name up to its first dot), data offsets and sizes int64 [M]."""

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def scan_tar(path: Path, suffix: str) -> TarIndex:
    """The members of `path` whose names end with `suffix`, by key in ascending order.

    Raises SourceError with what is wrong: a damaged header, a tar that is cut off, a key twice.
    """
    try:
        members = _scan(path)
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{path} cannot be read as a tar ({error}); {_DAMAGED}") from error
    found = [(name.rpartition("/")[2].partition(".")[0].encode(), *at) for name, *at in members if name.endswith(suffix)]
    if not found:
        raise SourceError(f"{path} has no *{suffix} among its {len(members)} members")
    keys, offsets, sizes = zip(*found, strict=True)
    index = TarIndex(np.array(keys), np.array(offsets, np.int64), np.array(sizes, np.int64))
    order = np.argsort(index.keys, kind="stable")
    index = TarIndex(index.keys[order], index.offsets[order], index.sizes[order])
    twice = np.flatnonzero(index.keys[1:] == index.keys[:-1])
    if len(twice):
        raise SourceError(f"{path}: {len(twice)} samples twice, first {index.keys[twice[0]].decode(errors='replace')}")
    return index


def _scan(path: Path) -> list[tuple[str, int, int]]:
    """(name, data offset, size) of every file in the tar; tarfile.TarError for a damaged one."""
    members, offset = [], 0
    with path.open("rb") as file:
        fd, num_bytes = file.fileno(), path.stat().st_size
        while True:
            header = os.pread(fd, _BLOCK, offset)
            if header == _EMPTY:
                return members
            if len(header) < _BLOCK:
                raise tarfile.ReadError(f"it ends at {num_bytes} bytes without an end mark")
            kind, size = header[156:157], _size(header, offset)
            if kind not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE):
                return _scan_extended(path, num_bytes)
            if offset + _BLOCK + size > num_bytes:
                raise tarfile.ReadError(
                    f"the member at byte {offset} needs {size} bytes, {num_bytes - offset - _BLOCK} are left"
                )
            if kind in tarfile.REGULAR_TYPES:
                prefix = _text(header[345:500]) if header[257:262] == b"ustar" else ""
                name = _text(header[:100])
                members.append((f"{prefix}/{name}" if prefix else name, offset + _BLOCK, size))
            offset += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _size(header: bytes, offset: int) -> int:
    stored = header[148:156].strip(b" \0")
    try:
        checksum, size = int(stored, 8), int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise tarfile.ReadError(f"no tar header at byte {offset}") from None
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise tarfile.ReadError(f"wrong checksum of the header at byte {offset}")
    return size


def _scan_extended(path: Path, num_bytes: int) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        members = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
        end = tar.offset
    last = max((offset + size for _, offset, size in members), default=0)
    if last > num_bytes or end + _BLOCK > num_bytes:
        raise tarfile.ReadError(f"it ends at {num_bytes} bytes without an end mark")
    return members


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")
