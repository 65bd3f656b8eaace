"""Pieces of the Triton kernels of several ops: a product, and the rounding of what it takes and gives.

Both do in Triton's interpreter what they do on a GPU.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 `x` rounded to DTYPE; the interpreter cuts bfloat16 off instead, so there it is rounded by hand."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(a, b, total):
    """total + a b, summed in float32; the interpreter can't multiply bfloat16, nor float16 fast."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
