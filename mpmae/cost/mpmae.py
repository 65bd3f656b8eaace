"""Operations and bytes of an MP-MAE's training step, from the model itself: a count, made once and timed by nobody.

What counts and what does not is said in `mpmae.cost.parts`. A sparse encoder counts visible sites alone, and of the 49 taps
of a depthwise convolution those that meet one, on average over the masks. Sites that hold no data count as if they did. A
dense encoder counts every site and all 49 taps. Parts: stem, stage 0, downsample 1, stage 1, ..., decoder, heads.

Shapes: L patches, V visible ones, s sites on a side of a tile, K sites of a sample, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from mpmae.cost import operators
from mpmae.cost.operators import TAPS, Work, added
from mpmae.cost.parts import (
    ITEM_BYTES,
    PIXEL_BYTES,
    Cost,
    Part,
    linear,
    part_of,
    pixel_head,
    pixel_target_bytes,
    size_of,
    together,
)
from mpmae.models import MPMAE, blocks
from mpmae.models.encoder import FIRST_TILE_SIDE, SparseEncoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def mpmae_cost(model: MPMAE, precision: str, capability: int | None = None) -> Cost:
    """The cost of a training step of `model`; arguments as in `mpmae.cost.model_cost`."""
    item_bytes = ITEM_BYTES[precision]
    num_patches, num_visible, encoder = model.num_patches, model.num_visible, model.encoder
    sparse = isinstance(encoder, SparseEncoder)
    shown = num_visible if sparse else num_patches

    def way(block: nn.Module, num_sites: int) -> str:
        if capability is None or not isinstance(block, blocks.Block):
            return "least"
        return blocks.pointwise_way(block, num_sites, _DTYPES[precision], capability)

    def taps(num_shown: int, tile_side: int, packed: bool) -> float:
        return operators.expected_taps(num_shown, model.num_patches_side, tile_side) if packed else TAPS

    parts = {"stem": _stem(model, shown, item_bytes)}
    for stage, stage_blocks in enumerate(encoder.stages):
        tile_side = FIRST_TILE_SIDE >> stage
        if stage:
            parts[f"downsample {stage}"] = _downsample(encoder.downsamples[stage - 1], shown * 4 * tile_side**2, item_bytes)
        num_sites = shown * tile_side**2
        parts[f"stage {stage}"] = _blocks(stage_blocks, num_sites, item_bytes, taps(shown, tile_side, sparse), way)
    decoder = _blocks(model.decoder.blocks, num_patches, item_bytes, taps(num_patches, 1, True), way)
    projection = model.decoder.proj
    projection = linear(projection.in_features, projection.out_features, num_visible, item_bytes)
    parts["decoder"] = together([projection, decoder], size_of(model.decoder))
    parts["heads"] = _heads(model, item_bytes)
    return Cost(parts, precision, size_of(model))


def _stem(model: MPMAE, num_patches: int, item_bytes: int) -> Part:
    stem = model.encoder.stem
    sizes = (model.patch_size, len(model.bands_in), stem.conv.out_channels, item_bytes, PIXEL_BYTES)
    if hasattr(stem, "pool"):
        forward, backward = operators.stem_forward, operators.stem_backward
    else:
        forward, backward = operators.patch_stem_forward, operators.patch_stem_backward
    part = part_of(lambda count: forward(count, *sizes), lambda count: backward(count, *sizes), num_patches, size_of(stem))
    matrix, vector = part.forward.matrix_flops, part.forward.vector_flops
    return replace(part, backward=Work(part.backward.num_bytes, matrix, 2 * vector))


def _blocks(
    stage: Sequence[nn.Module], num_sites: int, item_bytes: int, taps: float, way: Callable[[nn.Module, int], str]
) -> Part:
    return together([_block(block, num_sites, item_bytes, taps, way(block, num_sites)) for block in stage], size_of(stage))


def _block(block: nn.Module, num_sites: int, item_bytes: int, taps: float, way: str) -> Part:
    channels = block.dwconv.in_channels

    def forward(count: int) -> Work:
        depthwise = operators.depthwise_forward(count, channels, item_bytes, taps)
        return added([depthwise, operators.pointwise_forward(count, channels, item_bytes, way)])

    def backward(count: int) -> Work:
        return added(
            [
                operators.depthwise_input_grad(count, channels, item_bytes, taps, residual=True),
                operators.depthwise_weight_grad(count, channels, item_bytes, taps),
                operators.pointwise_backward(count, channels, item_bytes, way),
            ]
        )

    return part_of(forward, backward, num_sites, size_of(block))


def _downsample(module: nn.Module, num_sites: int, item_bytes: int) -> Part:
    sizes = (module.conv.in_channels, module.conv.out_channels, item_bytes)
    return part_of(
        lambda count: operators.downsample_forward(count, *sizes),
        lambda count: operators.downsample_backward(count, *sizes),
        num_sites,
        size_of(module),
    )


def _heads(model: MPMAE, item_bytes: int) -> Part:
    """Pixel heads at hidden patches with their losses, tile heads on the mean over the patches."""
    heads, hidden = model.heads, model.num_patches - model.num_visible
    parts = []
    for name, head in heads.pixel.items():
        target_bytes = pixel_target_bytes(name, len(model.bands_out.get(name, ()))) * model.patch_size**2
        parts.append(pixel_head(head, hidden, item_bytes, target_bytes))
    if heads.tile:
        parts += [linear(head.in_features, head.out_features, 1, item_bytes) for head in heads.tile.values()]
        # their norm and mean read the grid, and read it again to write its gradient
        grid = model.num_patches * model.decoder.proj.out_features * item_bytes
        parts.append(Part(Work(grid), Work(2 * grid), 0, 0))
    return together(parts, size_of(heads))
