"""The historical baseline of the depthwise convolution: one launch per tap, a neighbour map, atomic adds in float32.

Kernels in `kernels_baseline.cu`; launched by whoever times them. Shapes as in `mpmae.kernels`; M = N*K sites.
"""

from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "kernels_baseline.cu"
NUM_TAPS = 49
THREADS = 256


def neighbour_map(index: Tensor, grid_side: int) -> Tensor:
    """The packed row that each tap of each site sees, -1 where none is: int32 [49, M].

    index: int64 [N, K] of `site_index`. The library builds this map with a hash table, once per layer geometry;
    it is left out of the timed part.
    """
    num_samples, area = len(index), grid_side**2
    border = 3
    width = grid_side + 2 * border
    row, column = index % area // grid_side + border, index % grid_side + border
    place = (index // area * width + row) * width + column
    rows = torch.full((num_samples * width * width,), -1, dtype=torch.int32, device=index.device)
    rows[place.flatten()] = torch.arange(index.numel(), dtype=torch.int32, device=index.device)
    taps = torch.arange(NUM_TAPS, device=index.device)
    shift = (taps // 7 - border) * width + taps % 7 - border
    return rows[place.flatten() + shift[:, None]]


def forward(runtime, x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> Tensor:
    """The convolution [N, K, C] of x float32 [N, K, C], in 50 launches. runtime: `mpmae.kernels.cuda_runtime`."""
    channels = x.shape[-1]
    num_sites, y = x.numel() // channels, torch.empty_like(x)
    grid, sizes = (-(-x.numel() // THREADS), 1, 1), (num_sites, channels)
    runtime.load(SOURCE, "baseline_fill", {}).launch(grid, (THREADS, 1, 1), 0, bias, y, *sizes)
    kernel = runtime.load(SOURCE, "baseline_tap", {})
    for tap in range(NUM_TAPS):
        kernel.launch(grid, (THREADS, 1, 1), 0, x, weight, neighbours, y, tap, *sizes)
    return y


def backward(runtime, grad_y: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight, in 49 launches; their last bits differ from run to run."""
    channels = x.shape[-1]
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    grid, sizes = (-(-x.numel() // THREADS), 1, 1), (x.numel() // channels, channels)
    kernel = runtime.load(SOURCE, "baseline_tap_backward", {})
    for tap in range(NUM_TAPS):
        args = (x, grad_y, weight, neighbours, grad_x, grad_weight, tap, *sizes)
        kernel.launch(grid, (THREADS, 1, 1), 0, *args)
    return grad_x, grad_weight
