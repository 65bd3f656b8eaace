"""The samples of a tar found by its headers alone, for when the index cannot be trusted."""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mpmae.errors import ShardError
from mpmae.shard_format import Manifest, member_name, sample_key
from mpmae.tar_members import TAR_END, TAR_HEADER_BYTES, tar_header, tar_size

_EMPTY_BLOCK = bytes(TAR_HEADER_BYTES)
_MAX_NAME = 100


class WalkedSample(NamedTuple):
    """A sample as the headers lay it out: per member the first byte, the size and the data."""

    offsets: list[int]
    sizes: list[int]
    members: list[bytes]


def header_problem(header: bytes, name: str, size: int | None = None) -> str | None:
    """What a header block is instead of that of the file `name` (of `size` bytes, if given); None when it is that."""
    if size is not None and header == tar_header(name, size):
        return None
    if len(header) < TAR_HEADER_BYTES:
        return f"the tar is cut off in the header of {name!r}"
    if header == _EMPTY_BLOCK:
        return f"a block of zeros, as at the end of a tar, expected the header of {name!r}"
    found = tar_size(header)
    if found is None:
        return f"no tar header of {name!r} as the writer makes it ({header[:24]!r}...)"
    found_name = header[:_MAX_NAME].rstrip(b"\0").decode()
    if found_name != name:
        return f"tar member {found_name!r}, expected the file {name!r}"
    if size is not None and found != size:
        return f"{name!r} has {found} bytes by its header, {size} by the index"
    return None


def walk_samples(file: BinaryIO, manifest: Manifest, num_samples: int, first_ordinal: int) -> Iterator[WalkedSample]:
    """The samples of an open tar, `num_samples` with keys from `first_ordinal` on.

    Raises ShardError, naming sample and byte, at the first header that is not the next in order (a member that is missing,
    doubled, renamed or out of order), where the tar is cut off, and when it does not end after the last sample. Never reads
    more than the file has.
    """
    offset, total = 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    for ordinal in range(first_ordinal, first_ordinal + num_samples):
        sample = WalkedSample([], [], [])
        for member in manifest.members:
            name, header = member_name(sample_key(ordinal), member, manifest.codec), file.read(TAR_HEADER_BYTES)
            problem = header_problem(header, name)
            if problem:
                raise ShardError(f"sample {sample_key(ordinal)}: byte {offset}: {problem}")
            size, offset = tar_size(header), offset + TAR_HEADER_BYTES
            num_padded = size + -size % TAR_HEADER_BYTES
            # A header may announce gigabytes that the file does not have, and `read` would make room for them.
            data = file.read(min(num_padded, total - offset))
            if len(data) < num_padded:
                raise ShardError(
                    f"sample {sample_key(ordinal)}: the tar is cut off in {member}, at byte {offset + len(data)}"
                )
            sample.offsets.append(offset)
            sample.sizes.append(size)
            sample.members.append(data[:size])
            offset += num_padded
        yield sample
    if file.read(len(TAR_END) + 1) != TAR_END:
        raise ShardError(f"byte {offset}: the tar does not end after its {num_samples} samples as it must")
