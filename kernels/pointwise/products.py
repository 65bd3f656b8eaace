"""Matrix products as the kernels' callers need them: added in place, or with sums that keep float32."""

import torch
from torch import Tensor


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the products of batches of matrices to `out` [B, M, N]; in place, so that torch copies nothing."""
    if len(out) == 1:
        out[0].addmm_(left[0], right[0])
    else:
        out.baddbmm_(left, right)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, or of batches of them, in float32: never rounded to the type of the inputs.

    Float32 inputs take torch's product as it is set (TF32 is the user's choice, off by default).
    """
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    if left.dtype == torch.float32:
        return multiply(left, right)
    if not left.is_cuda:  # torch has products with another type of output on a GPU alone
        return multiply(left.float(), right.float())
    return multiply(left, right, out_dtype=torch.float32)
