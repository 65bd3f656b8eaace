"""What must hold of a shard's index: the file is a plain array of rows, and the rows lay out exactly the bytes of its tar.

Readers take offsets and sizes from the index without looking at the tar again, so nothing here may be trusted: not the
header of the file, not its length, not the numbers.
"""

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"
MAX_HEADER_BYTES = 1 << 16
TAR_BLOCK_BYTES = 512
TAR_END_BYTES = 2 * TAR_BLOCK_BYTES


def rows_of(data: bytes, dtype: np.dtype, num_rows: int) -> np.ndarray:
    """The rows [num_rows] of `dtype` in the bytes of an .npy file, read-only; ValueError saying what is there instead.

    The header is compared as text, never evaluated, and the length must be exact: memory is bounded by `data`. Layout of
    the file: numpy's NEP 1, version 1.0.
    """
    if data[: len(MAGIC)] != MAGIC or len(data) < len(MAGIC) + 2:
        raise ValueError(f"it begins with {data[:8]!r}, expected {MAGIC!r}")
    start = len(MAGIC) + 2 + int.from_bytes(data[len(MAGIC) : len(MAGIC) + 2], "little")
    header = data[len(MAGIC) + 2 : start]
    expected = f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': ({num_rows},), }}"
    if header.strip() != expected.encode():
        raise ValueError(f"its header is {header.strip()[:300]!r}, expected {expected!r}")
    if len(data) - start != num_rows * dtype.itemsize:
        raise ValueError(f"{len(data) - start} bytes of rows, expected {num_rows * dtype.itemsize} for {num_rows}")
    return np.frombuffer(data, dtype, num_rows, start)


def layout_problem(rows: np.ndarray, members: tuple[str, ...], num_bytes: int) -> str | None:
    """The first place where the rows are not the layout of a tar of `num_bytes`; None when they are.

    In a tar that the writer makes, members follow each other without gaps: a header block, the data, zeros up to a block;
    two blocks of zeros end it.
    """
    sizes = rows["size"].astype(np.uint64).ravel()
    blocks = sizes + (-sizes % np.uint64(TAR_BLOCK_BYTES)) + np.uint64(TAR_BLOCK_BYTES)
    ends = np.cumsum(blocks)
    expected = ends - blocks + np.uint64(TAR_BLOCK_BYTES)
    offsets = rows["offset"].ravel()
    wrong = np.flatnonzero(offsets != expected)
    if len(wrong):
        sample, member = divmod(int(wrong[0]), len(members))
        return (
            f"sample {sample}: {members[member]} at byte {offsets[wrong[0]]}, expected at byte {expected[wrong[0]]}, where "
            "the member before it ends"
        )
    end = int(ends[-1]) + TAR_END_BYTES if len(ends) else TAR_END_BYTES
    if end != num_bytes:
        return f"its members end the tar at byte {end}, the manifest says {num_bytes}"
    return None
