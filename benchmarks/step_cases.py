"""The ways to take a training step, to run a block and to run the encoder: sparse, and dense with masking.

Each is a generator: a side is made when its turn comes, so that the memory of the one before can be told from its own, and
both stay for the turns. Shapes as in `mpmae.kernels`.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dense_masked
import kernel_cases
import torch
from dense_masked import DenseMasked
from gpu_timing import Run
from synthetic import random_visible, synthetic_batch
from torch import Tensor, nn

from mpmae.kernels import morton_sites, site_index, unpack_sites
from mpmae.models.encoder import ENCODER_GRN_EPS
from mpmae.models.mpmae import MPMAE
from mpmae.models.presets import create_model

MASK_RATIO = 0.6
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Way:
    """side: "sparse" or "dense". run: gives a scalar that both sides agree on. bytes_before: allocated before its side."""

    name: str
    side: str
    run: Callable[[], Tensor]
    bytes_before: int


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU; many a CPU would take minutes with it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(function: Callable, **options: Any) -> Callable:
    """`function` compiled anew for each shape."""
    return torch.compile(function, dynamic=False, **options)


def models(
    device: torch.device, size: str, img_size: int, patch_size: int, mask_ratio: float, tiny: bool
) -> Iterator[MPMAE]:
    """The sparse model, then the dense one with the same weights."""
    state = None
    for encoder in ("sparse", "dense"):
        torch.manual_seed(0)
        decoder_dim = 16 if tiny else 512
        model = create_model(
            f"mpmae_{size}",
            img_size=img_size,
            patch_size=patch_size,
            mask_ratio=mask_ratio,
            encoder=encoder,
            decoder_dim=decoder_dim,
        )
        state = copy.deepcopy(model.state_dict()) if state is None else state
        model.load_state_dict(state)
        yield model.to(device)


def step_ways(
    device: torch.device, *, size: str, img_size: int, patch_size: int, batch_size: int, tiny: bool
) -> Iterator[Way]:
    """Forward, backward and AdamW; the result is the loss."""
    sides = models(device, size, img_size, patch_size, MASK_RATIO, tiny)
    before = allocated(device)
    sparse = next(sides)
    batch = synthetic_batch(sparse, batch_size, device)
    visible = random_visible(batch_size, sparse.num_patches, MASK_RATIO, device)
    batch_bytes = allocated(device) - before - sum(t.nbytes for t in sparse.state_dict().values())
    before += batch_bytes  # it is the same for both
    optimizer = adamw(sparse)

    def sparse_loss() -> Tensor:
        return sparse(batch, visible).loss

    yield Way("sparse", "sparse", training_step(device, sparse_loss, optimizer), before)
    if not tiny:
        run = training_step(device, compiled(sparse_loss, fullgraph=True), optimizer)
        yield Way("sparse, compiled", "sparse", run, before)
    before = allocated(device)
    dense = next(sides)
    optimizer = adamw(dense)
    wrap = kernel_cases.same if tiny else compiled
    masked = DenseMasked(dense, wrap)
    name = "dense masked" if tiny else "dense masked, compiled"
    yield Way(name, "dense", training_step(device, lambda: masked(batch, visible), optimizer), before)
    if size == "atto" and not tiny:
        whole = compiled(DenseMasked(dense))
        yield Way(
            "dense masked, compiled whole", "dense", training_step(device, lambda: whole(batch, visible), optimizer), before
        )


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that changes nothing: it does all its work with a learning rate of 0."""
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=on_gpu, capturable=on_gpu)


def training_step(device: torch.device, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Run:
    """A call that takes one step and gives the loss."""

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def encoder_ways(
    device: torch.device, *, size: str, img_size: int, patch_size: int, batch_size: int, mask_ratio: float, tiny: bool
) -> Iterator[Way]:
    """Forward and backward of the encoder with a random gradient; the result is the norm of the features."""
    sides = models(device, size, img_size, patch_size, mask_ratio, tiny)
    before = allocated(device)
    sparse = next(sides)
    batch = synthetic_batch(sparse, batch_size, device)
    visible = random_visible(batch_size, sparse.num_patches, mask_ratio, device)
    torch.manual_seed(1)
    grad = torch.randn(batch_size, visible.shape[1], sparse.decoder.proj.in_features, device=device)
    yield Way("sparse", "sparse", backward_of(device, lambda: sparse.encode(batch, visible), grad, sparse.encoder), before)
    dense = next(sides)
    masked = DenseMasked(dense, kernel_cases.same if tiny else compiled)
    side = dense.num_patches_side
    index = site_index(visible, side, morton_sites(1).to(device))
    grid_grad = unpack_sites(grad, index, side)
    image = masked.image(batch)
    name = "dense masked" if tiny else "dense masked, compiled"
    run = backward_of(device, lambda: masked.encode(image, visible), grid_grad, dense.encoder)
    yield Way(name, "dense", run, allocated(device))


def backward_of(device: torch.device, forward: Callable[[], Tensor], grad: Tensor, module: nn.Module) -> Run:
    """A call that runs forward and backward, and gives the norm of the output."""
    parameters = list(module.parameters())

    def run() -> Tensor:
        with autocast(device):
            out = forward()
        torch.autograd.grad(out, parameters, grad.to(out.dtype))
        return torch.linalg.vector_norm(out.detach(), dtype=torch.float32)

    return run


def block_ways(device: torch.device, *, size: str, stage: int, batch_size: int, tiny: bool) -> Iterator[Way]:
    """Forward and backward of the first block of a stage with a random input and gradient."""
    sides = models(device, size, 24 if tiny else 56, 8, MASK_RATIO, tiny)
    before = allocated(device)
    sparse = next(sides)
    tile_side, side = 8 >> stage, sparse.num_patches_side
    visible = random_visible(batch_size, side**2, MASK_RATIO, device)
    part = sparse.encoder.stages[stage][0]
    torch.manual_seed(1)
    shape = batch_size, visible.shape[1] * tile_side**2, part.norm.weight.numel()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()

    def packed() -> Tensor:
        return kernel_cases.block(sparse.encoder, stage, x, visible)

    yield Way("sparse", "sparse", backward_of(device, packed, grad, part), before)
    if not tiny:
        yield Way("sparse, compiled", "sparse", backward_of(device, compiled(packed, fullgraph=True), grad, part), before)
    before = allocated(device)
    weights = dense_masked.block_weights(next(sides).encoder.stages[stage][0])
    index = site_index(visible, side, morton_sites(tile_side).to(device))
    grid, grid_grad = (unpack_sites(t.detach(), index, side * tile_side) for t in (x, grad))
    grid.requires_grad_()
    shown = dense_masked.shown_sites(visible, side, tile_side)
    function = dense_masked.block if tiny else compiled(dense_masked.block)

    def dense() -> Tensor:
        return function(grid, shown, weights, ENCODER_GRN_EPS)

    yield Way("dense masked, compiled", "dense", backward_of(device, dense, grid_grad, nn.ParameterList(weights)), before)
