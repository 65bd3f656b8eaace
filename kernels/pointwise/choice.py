"""Which of the two implementations on a GPU runs the pointwise half of a block, and how long a row their LayerNorm takes."""

import torch

MAX_ROW_LENGTH = 4096

WIDE_FROM_CHANNELS = {
    (torch.bfloat16, "sample"): 128,
    (torch.bfloat16, "batch"): 128,
    (torch.float16, "sample"): 128,
    (torch.float16, "batch"): 128,
    (torch.float32, "sample"): 64,
    (torch.float32, "batch"): 64,
}


def path_of(num_channels: int, dtype: torch.dtype, scope: str) -> str:
    """ "fused" or "wide": the module of this folder that takes a block of C channels.

    Fused moves the fewest bytes and pays with products below cuBLAS's rate; a product of C by 4C channels does 2/3 C
    operations per byte that a fused forward moves in a 2-byte type, 1/3 C in float32 (about 8 C*C operations for 12 C bytes
    a direction), so the narrower the block, the less the rate of the products counts. The borders are estimates, to be
    decided by the benchmark's record; a type that is not listed takes "wide".
    """
    return "wide" if num_channels >= WIDE_FROM_CHANNELS.get((dtype, scope), 0) else "fused"
