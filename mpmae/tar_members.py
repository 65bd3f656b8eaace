"""Members of a shard's tar: USTAR headers that are the same bytes every time, and back."""

import tarfile

TAR_HEADER_BYTES = tarfile.BLOCKSIZE
TAR_END = b"\0" * (2 * tarfile.BLOCKSIZE)
_NAME_BYTES, _SIZE, _CHECKSUM = 100, slice(124, 136), slice(148, 156)


def _blank_header() -> bytearray:
    info = tarfile.TarInfo()
    info.mode, info.mtime = 0o644, 0
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[_SIZE], header[_CHECKSUM] = bytes(12), b" " * 8
    return header


_BLANK_HEADER = _blank_header()
_BLANK_SUM = sum(_BLANK_HEADER)


def tar_header(name: str, size: int) -> bytes:
    """Header block of a USTAR member with fixed owner, mode and time; `name` is ASCII, of at most 100 characters."""
    header, encoded, digits = bytearray(_BLANK_HEADER), name.encode("ascii"), b"%011o\0" % size
    assert len(encoded) <= _NAME_BYTES, name
    assert len(digits) == 12, size
    header[: len(encoded)], header[_SIZE] = encoded, digits
    header[_CHECKSUM] = b"%06o\0 " % (_BLANK_SUM + sum(encoded) + sum(digits))
    return bytes(header)


def tar_size(header: bytes) -> int | None:
    """Data bytes of the member that a header block announces; None for a block that `tar_header` cannot have made."""
    digits = header[_SIZE].removesuffix(b"\0")
    if len(digits) != 11 or digits.strip(b"01234567"):
        return None
    size = int(digits, 8)
    name = header[:_NAME_BYTES].rstrip(b"\0")
    return size if name.isascii() and header == tar_header(name.decode(), size) else None


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one USTAR member."""
    return tar_header(name, len(data)) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE)
