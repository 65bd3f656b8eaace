"""Cases of the downsampling between stages, for the reference, the interpreter and a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.kernels.downsample import reference
from tests.kernels.error_bounds import assert_within

NAMES = ("out", "grad_x", "grad_norm_weight", "grad_norm_bias", "grad_weight", "grad_bias")
SIZES = (3, 28, 12, 20)  # samples, sites, channels before and after


def draw(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, gaps: bool, device: str = "cpu"
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor | None]]:
    """x, the float weights, a gradient of the output and the two validities; a sample without any site if `gaps`."""
    samples, sites, channels, out_channels = sizes
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, grad = (torch.randn(samples, *s, dtype=dtype) for s in ((sites, channels), (sites // 4, out_channels)))
    weights = [
        torch.randn(channels),
        torch.randn(channels),
        torch.randn(out_channels, channels, 2, 2),
        torch.randn(out_channels),
    ]
    valid = [None, None]
    if gaps:
        valid_in = torch.rand(samples, sites) > 0.7
        valid_in[1] = False
        valid = [valid_in, valid_in.unflatten(1, (-1, 4)).any(2)]
        x, grad = (torch.where(v[:, :, None], t, hole) for v, t, hole in zip(valid, (x, grad), (0, torch.nan), strict=True))
    valid = [v if v is None else v.to(device) for v in valid]
    return x.to(device), [w.to(device, wide) for w in weights], grad.to(device), valid


def plain(x: Tensor, weights: list[Tensor], valid: list[Tensor | None], eps: float = 1e-6) -> Tensor:
    """The same by PyTorch's own layers, on a grid: every four sites a 2x2 image."""
    norm_weight, norm_bias, weight, bias = (w.to(x.dtype) for w in weights)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    normed = normed if valid[0] is None else torch.where(valid[0][:, :, None], normed, 0)
    squares = normed.reshape(-1, 2, 2, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(squares, weight, bias, stride=2).reshape(len(x), -1, len(bias))
    return out if valid[1] is None else torch.where(valid[1][:, :, None], out, 0)


def run(module, x, weights, grad, valid, eps: float = 1e-6) -> list[Tensor]:
    """The output and the gradients by `module.forward` and `module.backward`."""
    weights = reference.Weights(*weights)
    out, mean, rstd = module.forward(x, weights, *valid, eps)
    grad_x, grads = module.backward(grad, x, mean, rstd, weights, *valid)
    return [out, grad_x, *grads]


def check(module, sizes: tuple[int, int, int, int], dtype: torch.dtype, gaps: bool, device: str = "cpu") -> None:
    """`module` against the reference, within the bounds."""
    x, weights, grad, valid = draw(sizes, dtype, gaps, device)
    host = [None if v is None else v.cpu() for v in valid]
    exact = run(reference, x.double().cpu(), [w.double().cpu() for w in weights], grad.double().cpu(), host)
    results = run(module, x, weights, grad, valid), run(reference, x, weights, grad, valid), exact
    for name, got, in_dtype, wanted in zip(NAMES, *results, strict=True):
        assert got.dtype == (dtype if name in NAMES[:2] else torch.float32), name
        assert_within(got, in_dtype, wanted, "value" if name == "out" else "gradient", f"{sizes} {dtype} {gaps}: {name}")
    if gaps:
        assert all(t[~v].count_nonzero() == 0 for t, v in zip(results[0][:2], valid[::-1], strict=True))
