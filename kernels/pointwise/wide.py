"""The pointwise half of a wide ConvNeXt V2 block: products by cuBLAS, what lies between them in few Triton passes.

From about C = 128 on the products take most of the time, and cuBLAS comes closest to the matrix rate; what is left to win is
the traffic between them. Signatures and results are those of `mpmae.kernels.pointwise.formulas`, its oracle.

Shapes as there; M = N*K sites. One unit is one pass over [M, C] in the type of y, so [M, D] takes 4. Products count what
they read and write, small tensors (weights, statistics) count nothing.

    forward                                  folded  scaled    backward                           folded  scaled
    LayerNorm: y -> n                             2       2    zero g where no data, sum it         1-2     1-2
    a = n W1                                      5       5    dz = g W2                              5       5
    GELU: a -> h in place, slope, norms          12      12    U = g h, or sums of h dz               5       8
    z = h s                                       -       8    da in place of dz (writes z)          16      20
    out = x + b2 + W2 beta, 0 where no data       2       2    dW2 = g z                              -       5
    out += h (s W2), or z W2                      6       6    dn = da W1                             5       5
                                                               LayerNorm: n again, dy                 4       4
                                                               dW1 = da n                             5       5
    sum                                          27      35    sum                                41-42   53-54

GRN's beta goes through Linear2 ahead of time (W2 beta joins its bias), so z is 0 where h is, and what the product adds to
`out` is already 0 at sites that do not exist. Folded: GRN's factors s go into W2, one product per norm; then U, the product
of g and h over the sites of each norm, holds both dW2 and GRN's sums P. With scope "batch" there is one norm and folding is
free. With scope "sample" it costs one [C, D] matrix per sample and direction: `folds` says when.
"""

import torch
from torch import Tensor

from mpmae.kernels.pointwise import hidden_passes, norm_passes, row_passes
from mpmae.kernels.pointwise.choice import MAX_ROW_LENGTH, folds
from mpmae.kernels.pointwise.formulas import GELUS, Options, Saved, Weights
from mpmae.kernels.pointwise.products import add_product, float32_product

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCOPES = ("sample", "batch")


def supports(y: Tensor, options: Options) -> str | None:
    """Why this implementation does not take `y` [N, K, C], all reasons at once; None if it does."""
    num_channels, dtype = y.shape[-1], y.dtype
    problems = []
    if not 1 <= num_channels <= MAX_ROW_LENGTH:
        problems.append(f"{num_channels} channels, expected 1 to {MAX_ROW_LENGTH}")
    if dtype not in DTYPES:
        problems.append(f"{dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if options.scope not in SCOPES:
        problems.append(f"scope {options.scope!r}, expected one of {SCOPES}")
    if options.gelu not in GELUS:
        problems.append(f"gelu {options.gelu!r}, expected one of {GELUS}")
    return "; ".join(problems) or None


def forward(residual: Tensor, y: Tensor, weights: Weights, valid: Tensor | None, options: Options) -> tuple[Tensor, Saved]:
    """As `formulas.forward`; all tensors contiguous and on one device, `residual` and `y` of one of DTYPES."""
    num_samples, num_sites, num_channels = y.shape
    dtype, flat = y.dtype, y.view(-1, num_channels)
    normed, mean, rstd = row_passes.layer_norm(flat, weights.norm_weight, weights.norm_bias, valid, options.norm_eps)
    by_norm = (num_samples, num_sites) if options.scope == "sample" else (1, len(flat))
    h = (normed @ weights.weight1.to(dtype).t()).view(*by_norm, -1)
    del normed
    slope, squares = hidden_passes.gelu(h, weights.bias1, valid, options.gelu)
    norm = squares.sqrt_()
    factor = norm_passes.factors(norm, weights.grn_gamma, options.grn_eps)

    offset = torch.addmv(weights.bias2.float(), weights.weight2.float(), weights.grn_beta.float().flatten())
    out = row_passes.add_row(residual.view_as(flat), offset, valid, torch.empty_like(flat)).view(*by_norm, -1)
    if folds(options.scope, num_sites, num_channels):
        add_product(out, h, norm_passes.fold(weights.weight2, factor, dtype).transpose(1, 2))
    else:
        out.view_as(flat).addmm_(hidden_passes.scale(h, factor).view(len(flat), -1), weights.weight2.to(dtype).t())
    shape = (num_samples, num_sites, -1)
    return out.view(y.shape), Saved(mean.view(shape[:2]), rstd.view(shape[:2]), h.view(shape), slope.view(shape), norm)


def backward(
    grad: Tensor, y: Tensor, weights: Weights, saved: Saved, valid: Tensor | None, options: Options
) -> tuple[Tensor, Weights]:
    """As `formulas.backward`; the gradients of the weights are float32."""
    num_samples, num_sites, num_channels = y.shape
    dtype, flat = y.dtype, y.view(-1, num_channels)
    by_norm = (num_samples, num_sites) if options.scope == "sample" else (1, len(flat))
    h, slope = (t.view(*by_norm, -1) for t in (saved.h, saved.slope))
    grad, grad_sum = row_passes.masked_sums(grad.reshape(flat.shape), valid)
    factor = norm_passes.factors(saved.norm, weights.grn_gamma, options.grn_eps)
    hidden_grad = (grad @ weights.weight2.to(dtype)).view(h.shape)

    folded = folds(options.scope, num_sites, num_channels)
    if folded:
        outer = _products_by_norm(grad.view(*by_norm, -1), h)
        grad_weight2, products = norm_passes.unfold(outer, weights.weight2, factor)
        del outer
    else:
        products = hidden_passes.product_sums(h, hidden_grad)
    pull, grad_gamma = norm_passes.pulls(products, saved.norm, weights.grn_gamma, options.grn_eps)
    response, grad_bias1 = hidden_passes.hidden_backward(hidden_grad, h, slope, factor, pull, with_response=not folded)
    if not folded:
        grad_weight2 = float32_product(grad.t(), response.view(len(flat), -1))
        del response
    grad_weight2.addr_(grad_sum, weights.grn_beta.float().flatten())

    flat_a = hidden_grad.view(len(flat), -1)
    grad_y, grad_norm_weight, grad_norm_bias, normed = row_passes.layer_norm_backward(
        flat_a @ weights.weight1.to(dtype), flat, saved.mean, saved.rstd, weights.norm_weight, weights.norm_bias, valid
    )
    return grad_y.view(y.shape), Weights(
        grad_norm_weight,
        grad_norm_bias,
        float32_product(flat_a.t(), normed),
        grad_bias1,
        grad_gamma,
        torch.mv(weights.weight2.float().t(), grad_sum),
        grad_weight2,
        grad_sum,
    )


def _products_by_norm(grad: Tensor, h: Tensor) -> Tensor:
    """The products of `grad` [S, R, C] and `h` [S, R, D] over the sites of each norm: float32 [S, C, D]."""
    if len(grad) == 1:
        return float32_product(grad[0].t(), h[0])[None]
    return float32_product(grad.transpose(1, 2), h)
