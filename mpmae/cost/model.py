"""Operations and bytes of an MP-MAE's training step, from the model itself: a count, made once and timed by nobody.

Counted: multiply-adds of convolutions and matrix products, as 2 operations each. A backward is twice its forward, once for
the input's gradient and once for the weight's; the first convolution of the stem has no input gradient to make, so it takes
once. What a backward computes again (the stem, checkpointed blocks) is no progress, and not counted.
Left out: norms, GELU, GRN, losses and every other operation on elements, gathers, the optimizer's arithmetic. They cost
time through their bytes, and those are counted, in `mpmae.cost.operators`.

A sparse encoder counts visible sites alone, and of the 49 taps of a depthwise convolution those that meet one, on average
over the masks. Sites that hold no data count as if they did. A dense encoder counts every site and all 49 taps.

Shapes: L patches, V visible ones, s sites on a side of a tile, K sites of a sample, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mpmae.cost import operators
from mpmae.cost.operators import PARAMETER_BYTES, TAPS, Work, added
from mpmae.modalities import spec_of
from mpmae.models import MPMAE, blocks
from mpmae.models.encoder import FIRST_TILE_SIDE, SparseEncoder

ITEM_BYTES = {"fp32": 4, "bf16": 2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PIXEL_BYTES = 4
_CLASS_BYTES = 8
_VALID_BYTES = 1
# AdamW reads weight, gradient and two moments and writes weight and moments; the norm before it reads the gradient once more
ADAMW_PASSES = 8
CLIPPING_PASSES = 2


@dataclass(frozen=True)
class Part:
    """A part of the model.

    forward, backward: work of one image, its parameters left out. parameter_bytes: of reading them and writing their
    gradients, once a micro step. num_parameters: how many.
    """

    forward: Work
    backward: Work
    parameter_bytes: int
    num_parameters: int


@dataclass(frozen=True)
class Cost:
    """A model's work by part: stem, stage 0, downsample 1, stage 1, ..., decoder, heads.

    precision: "fp32" or "bf16". num_parameters: of the whole model, whose weights, gradients and moments are float32.
    """

    parts: dict[str, Part]
    precision: str
    num_parameters: int

    @property
    def forward_flops(self) -> int:
        """Of one image."""
        return sum(part.forward.flops for part in self.parts.values())

    @property
    def backward_flops(self) -> int:
        """Of one image."""
        return sum(part.backward.flops for part in self.parts.values())

    @property
    def flops(self) -> int:
        """Forward and backward of one image."""
        return self.forward_flops + self.backward_flops

    @property
    def image_bytes(self) -> int:
        """Through device memory for forward and backward of one image, parameters left out."""
        return sum(part.forward.num_bytes + part.backward.num_bytes for part in self.parts.values())

    @property
    def micro_step_bytes(self) -> int:
        """Of parameters and gradients in a micro step, whatever its size."""
        return sum(part.parameter_bytes for part in self.parts.values())

    @property
    def gradient_bytes(self) -> int:
        """What a step sums over the ranks: a float32 number for each parameter."""
        return self.num_parameters * PARAMETER_BYTES

    def optimizer_bytes(self, clipped: bool = False) -> int:
        """Through device memory for AdamW with all its state on one rank; clipped: gradients are scaled to a norm first."""
        return (ADAMW_PASSES + (CLIPPING_PASSES if clipped else 0)) * self.num_parameters * PARAMETER_BYTES

    def step_bytes(self, num_images: int, num_micro_steps: int, clipped: bool = False) -> int:
        """Through the device memory of one rank in a step on so many images of its own."""
        return num_images * self.image_bytes + num_micro_steps * self.micro_step_bytes + self.optimizer_bytes(clipped)

    def reduction_bytes(self, world_size: int) -> int:
        """What a rank sends, and receives, to sum the gradients: a ring's reduce-scatter and all-gather.

        Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 2009.
        """
        return round(2 * (world_size - 1) / world_size * self.gradient_bytes)


def model_cost(model: MPMAE, precision: str, capability: int | None = None) -> Cost:
    """The cost of a training step of `model`, on any device (meta too); ask before ZeRO takes the parameters apart.

    precision: "fp32" or "bf16", of activations. capability: the major compute capability of the GPU whose kernels' bytes are
    counted; None, and in a dense encoder: the least that any implementation moves.
    """
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
    projection = _linear(model.decoder.proj, num_visible, item_bytes)
    parts["decoder"] = _together([projection, decoder], model.decoder)
    parts["heads"] = _heads(model, item_bytes)
    return Cost(parts, precision, _count(model))


def _stem(model: MPMAE, num_patches: int, item_bytes: int) -> Part:
    stem = model.encoder.stem
    sizes = (model.patch_size, len(model.bands_in), stem.conv.out_channels, item_bytes, _PIXEL_BYTES)
    if hasattr(stem, "pool"):
        forward, backward = operators.stem_forward, operators.stem_backward
    else:
        forward, backward = operators.patch_stem_forward, operators.patch_stem_backward
    part = _part(lambda count: forward(count, *sizes), lambda count: backward(count, *sizes), num_patches, stem)
    matrix, vector = part.forward.matrix_flops, part.forward.vector_flops
    return _with(part, backward=Work(part.backward.num_bytes, matrix, 2 * vector))


def _blocks(
    stage: Sequence[nn.Module], num_sites: int, item_bytes: int, taps: float, way: Callable[[nn.Module, int], str]
) -> Part:
    return _together([_block(block, num_sites, item_bytes, taps, way(block, num_sites)) for block in stage], stage)


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

    return _part(forward, backward, num_sites, block)


def _downsample(module: nn.Module, num_sites: int, item_bytes: int) -> Part:
    sizes = (module.conv.in_channels, module.conv.out_channels, item_bytes)
    return _part(
        lambda count: operators.downsample_forward(count, *sizes),
        lambda count: operators.downsample_backward(count, *sizes),
        num_sites,
        module,
    )


def _linear(layer: nn.Linear, num_rows: int, item_bytes: int) -> Part:
    sizes = (layer.in_features, layer.out_features, item_bytes)
    return _part(
        lambda count: operators.linear_forward(count, *sizes),
        lambda count: operators.linear_backward(count, *sizes),
        num_rows,
        layer,
    )


def _heads(model: MPMAE, item_bytes: int) -> Part:
    """Pixel heads at hidden patches with their losses, tile heads on the mean over the patches."""
    heads, dim = model.heads, model.decoder.proj.out_features
    hidden = model.num_patches - model.num_visible
    parts = []
    for name, head in heads.pixel.items():
        target_bytes = _target_bytes(model, name) * model.patch_size**2

        def step(count: int, head: nn.Linear = head, target_bytes: int = target_bytes) -> Work:
            return operators.heads_step(count, dim, head.out_features, item_bytes, count * target_bytes)

        part = _part(step, lambda count: Work(0), hidden, head)
        flops = part.forward.matrix_flops // 3  # logits and gradients come from one call; two thirds are the backward's
        parts.append(_with(part, forward=part.forward._replace(matrix_flops=flops), backward=Work(0, 2 * flops)))
    if heads.tile:
        parts += [_linear(head, 1, item_bytes) for head in heads.tile.values()]
        # their norm and mean read the grid, and read it again to write its gradient
        grid = model.num_patches * dim * item_bytes
        parts.append(Part(Work(grid), Work(2 * grid), 0, 0))
    return _together(parts, heads)


def _target_bytes(model: MPMAE, name: str) -> int:
    """Of a pixel's targets and their validity."""
    if spec_of(name).kind == "categorical":
        return _CLASS_BYTES + _VALID_BYTES
    return len(model.bands_out[name]) * (_PIXEL_BYTES + _VALID_BYTES)


def _part(forward: Callable[[int], Work], backward: Callable[[int], Work], count: int, module: nn.Module) -> Part:
    """The part whose work on `count` sites these give; what is left at 0 sites belongs to the parameters."""
    alone = forward(0).num_bytes, backward(0).num_bytes
    works = [
        work._replace(num_bytes=work.num_bytes - fixed)
        for work, fixed in zip((forward(count), backward(count)), alone, strict=True)
    ]
    return Part(*works, sum(alone), _count(module))


def _together(parts: Sequence[Part], module: nn.Module) -> Part:
    return Part(
        added(part.forward for part in parts),
        added(part.backward for part in parts),
        sum(part.parameter_bytes for part in parts),
        _count(module),
    )


def _with(part: Part, forward: Work | None = None, backward: Work | None = None) -> Part:
    return Part(forward or part.forward, backward or part.backward, part.parameter_bytes, part.num_parameters)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
