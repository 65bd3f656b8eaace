"""Problems for the depthwise implementations, what is right for them in float64, and buffers that show stray accesses.

Shapes as in `mpmae.kernels`.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae import kernels

GUARD_ELEMENTS = 4096


class Problem(NamedTuple):
    """One draw: activations and gradients [N, K, C], parameters in float32, positions of the packed tiles."""

    x: Tensor
    grad: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    visible: Tensor
    slots: Tensor
    tile_side: int
    grid_side: int

    @property
    def positions(self) -> tuple[Tensor, Tensor, int]:
        return self.visible, self.slots, self.tile_side


def draw(side, num_patches_side, num_visible, channels, num_samples, dtype, device="cpu", seed=0) -> Problem:
    """A random problem; its activations lie between NaNs, so that a read past either end shows."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(num_patches_side**2, generator=generator) for _ in range(num_samples)]
    visible = torch.stack(order)[:, :num_visible].sort(1).values.contiguous().to(device)
    shape = (num_samples, num_visible * side**2, channels)
    x, grad, residual = (
        guarded(shape, dtype, device).copy_(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)
    )
    weight = torch.randn(channels, 1, 7, 7, generator=generator).to(device)
    bias = torch.randn(channels, generator=generator).to(device)
    slots = kernels.tile_slots(visible, num_patches_side)
    return Problem(x, grad, residual, weight, bias, visible, slots, side, num_patches_side * side)


def expected(problem: Problem, dtype=torch.float64) -> dict[str, Tensor]:
    """Output and gradients in `dtype`: PyTorch's convolution of the zero-filled grid, restricted to the visible sites."""
    side, height, channels = problem.tile_side, problem.grid_side, problem.x.shape[-1]
    morton = kernels.morton_sites(side).to(problem.x.device)
    index = kernels.site_index(problem.visible, height // side, morton).flatten()

    def spread(packed):
        grid = packed.new_zeros(packed.shape[0] * height * height, channels)
        grid[index] = packed.reshape(-1, channels)
        return grid.view(-1, height, height, channels).permute(0, 3, 1, 2)

    x, weight, bias = (t.to(dtype).requires_grad_() for t in (problem.x, problem.weight, problem.bias))
    y = F.conv2d(spread(x), weight, bias, padding=3, groups=channels).permute(0, 2, 3, 1)
    y = y.reshape(-1, channels)[index].view_as(problem.x)
    grads = torch.autograd.grad(y, (x, weight, bias), problem.grad.to(dtype))
    return dict(zip(("y", "grad_x", "grad_weight", "grad_bias"), (y.detach(), *grads), strict=True))


def computed(module, problem: Problem, *, with_residual: bool) -> dict[str, Tensor]:
    """What an implementation gives for the problem; "grad_x" includes the residual where it is asked for."""
    residual = problem.residual if with_residual else None
    with poisoned_outputs():
        grad_weight, grad_bias = module.backward_weight(problem.grad, problem.x, *problem.positions)
        return {
            "y": module.forward(problem.x, problem.weight, problem.bias, *problem.positions),
            "grad_x": module.backward_input(problem.grad, problem.weight, *problem.positions, residual=residual),
            "grad_weight": grad_weight,
            "grad_bias": grad_bias,
        }


def assert_as_good_as_pytorch(module, problem: Problem, *, with_residual: bool, rounds: bool = True) -> dict[str, Tensor]:
    """What `computed` gives, once its error against float64 is at most twice (gradients: three times) that of PyTorch.

    PyTorch runs in the problem's dtype. rounds: False where results are cut to bfloat16 instead of rounded, as the
    interpreter does; one unit in the last place is added to the bound then.
    """
    got = computed(module, problem, with_residual=with_residual)
    exact, plain = expected(problem), expected(problem, problem.x.dtype)
    if with_residual:
        exact["grad_x"] += problem.residual
        plain["grad_x"] += problem.residual
    for name, value in got.items():
        wanted = problem.x.dtype if name in ("y", "grad_x") else torch.float32
        assert value.dtype == wanted, (name, value.dtype)
        assert value.is_contiguous()
        assert value.shape == exact[name].shape, (name, value.shape)
        assert value.isfinite().all(), name
        error, allowed = ((t.double() - exact[name]).abs().max().item() for t in (value, plain[name]))
        unit = 8 * torch.finfo(torch.float32).eps if rounds else torch.finfo(wanted).eps
        bound = (2 if name == "y" else 3) * allowed + unit * exact[name].abs().max().item()
        assert error <= bound, (name, error, bound)
    return got


def guarded(shape, dtype, device) -> Tensor:
    """An uninitialised tensor between two runs of NaN; `guards_hold` looks at these."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2 * GUARD_ELEMENTS,), float("nan"), dtype=dtype, device=device)
    return whole[GUARD_ELEMENTS : GUARD_ELEMENTS + size].view(shape)


def guards_hold(tensor: Tensor) -> bool:
    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
    return bool(whole[:GUARD_ELEMENTS].isnan().all() and whole[-GUARD_ELEMENTS:].isnan().all())


@contextmanager
def poisoned_outputs():
    """Within, `torch.empty` and `torch.empty_like` give guarded NaNs (floats only); at the end no guard may have changed."""
    plain_empty, plain_like, given = torch.empty, torch.empty_like, []

    def poison(tensor):
        if not tensor.is_floating_point():
            return tensor
        given.append(guarded(tensor.shape, tensor.dtype, tensor.device))
        return given[-1]

    torch.empty = lambda *args, **kwargs: poison(plain_empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: poison(plain_like(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = plain_empty, plain_like
    assert given, "nothing was allocated with torch.empty or torch.empty_like: the outputs are not poisoned"
    assert all(map(guards_hold, given)), "a kernel wrote past its output"
