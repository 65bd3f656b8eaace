"""Block sizes of the fused pointwise kernels: one table, so that a benchmark can try others in its place.

Nothing is tuned at run time: a launch must be capturable in a CUDA graph and give the same bits every time. The entries
follow from registers and shared memory as the assembler reports them (`tests/kernels/test_pointwise_offline.py`), not from
timings.
"""

from typing import NamedTuple

# two programs for each of the 132 multiprocessors of an H100 or H200; a constant, so that sums do not depend on the GPU
RESIDENT_PROGRAMS = 264
MIN_BLOCK = 16


class Blocks(NamedTuple):
    """What one program works on, and with what.

    rows: of [rows, C], at once. hidden: hidden channels at once. num_warps, num_stages: as Triton takes them.
    """

    rows: int
    hidden: int
    num_warps: int
    num_stages: int


# kernel -> (most channels C, bytes of an element) -> its blocks; a C takes the entry with the fewest channels that suffice
TABLE: dict[str, dict[tuple[int, int], Blocks]] = {
    "hidden": {(64, 2): Blocks(64, 64, 4, 2), (128, 2): Blocks(64, 32, 4, 2), (128, 4): Blocks(32, 32, 4, 1)},
    "output": {(64, 2): Blocks(64, 64, 4, 3), (128, 2): Blocks(64, 64, 8, 3), (128, 4): Blocks(32, 32, 8, 1)},
    "outer": {(128, 2): Blocks(64, 64, 8, 3), (128, 4): Blocks(32, 32, 8, 1)},
    "rows": {(64, 2): Blocks(64, 64, 8, 2), (128, 2): Blocks(64, 32, 8, 2), (128, 4): Blocks(32, 32, 8, 1)},
    "weight1": {(128, 2): Blocks(64, 64, 8, 3), (128, 4): Blocks(32, 32, 8, 1)},
    # all of Q, [C, D] in float32, lies in the registers of one program: 255 of them are too few from C = 64 on
    "rows_and_weight1": {(48, 2): Blocks(64, 32, 8, 2)},
}
# kernels that spill registers or overflow shared memory below this compute capability
LEAST_CAPABILITY = {"rows_and_weight1": 9}


def padded(count: int) -> int:
    """`count` rounded up to a power of two that a matrix unit takes."""
    return max(MIN_BLOCK, 1 << (count - 1).bit_length())


def blocks(kernel: str, channels: int, element_bytes: int, group_rows: int, capability: int) -> Blocks | None:
    """The blocks of `kernel` for C channels and groups of so many rows; None where the table has none.

    capability: the major number of the GPU's compute capability.
    """
    fitting = sorted(key for key in TABLE[kernel] if key[0] >= channels and key[1] == element_bytes)
    if not fitting or capability < LEAST_CAPABILITY.get(kernel, 0):
        return None
    entry = TABLE[kernel][fitting[0]]
    hidden, total = entry.hidden, 4 * channels
    while hidden > MIN_BLOCK and -total % hidden > total // 8:
        hidden //= 2
    return entry._replace(rows=min(entry.rows, padded(group_rows)), hidden=hidden)


def num_chunks(num_rows: int, channels: int, programs_per_chunk: int) -> int:
    """In how many chunks the rows are summed for a weight gradient.

    Enough to fill a GPU; more only while writing and reading the partial sums (16C*C bytes each per chunk) stays near 4 % of
    one pass over [rows, D].
    """
    fill = -(-2 * RESIDENT_PROGRAMS // programs_per_chunk)
    return max(1, min(max(fill, num_rows // (100 * channels)), 512, num_rows // MIN_BLOCK))
