"""What a model's training step is counted as: parts with their operations and bytes, and how parts are put together.

Counted: multiply-adds of convolutions and matrix products, as 2 operations each. A backward is twice its forward, once for
the input's gradient and once for the weight's; a layer whose input is the image has no input gradient to make, so it takes
once. What a backward computes again (recomputed activations, checkpointed blocks) is no progress, and not counted.
Left out: norms, activations, softmax, losses and every other operation on elements, gathers, the optimizer's arithmetic.
They cost time through their bytes, and those are counted, in `mpmae.cost.operators`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mpmae.cost import operators
from mpmae.cost.operators import PARAMETER_BYTES, Work, added
from mpmae.modalities import spec_of

ITEM_BYTES = {"fp32": 4, "bf16": 2}
PIXEL_BYTES = 4
CLASS_BYTES = 8
VALID_BYTES = 1
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
    """A model's work by part, in the order of the forward pass.

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

    def optimizer_bytes(self, clipped: bool = False, num_shards: int = 1) -> int:
        """Through the device memory of one rank for AdamW.

        clipped: gradients are scaled to a norm first. num_shards: ranks that share the optimizer's state.
        """
        passes = ADAMW_PASSES + (CLIPPING_PASSES if clipped else 0)
        return passes * self.num_parameters * PARAMETER_BYTES // num_shards

    def step_bytes(self, num_images: int, num_micro_steps: int, clipped: bool = False, num_shards: int = 1) -> int:
        """Through the device memory of one rank in a step on so many images of its own; the rest as in `optimizer_bytes`."""
        compute = num_images * self.image_bytes + num_micro_steps * self.micro_step_bytes
        return compute + self.optimizer_bytes(clipped, num_shards)

    def reduction_bytes(self, world_size: int) -> int:
        """What a rank sends, and receives, to sum the gradients: a ring's reduce-scatter and all-gather.

        Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 2009.
        """
        return round(2 * (world_size - 1) / world_size * self.gradient_bytes)


def part_of(forward: Callable[[int], Work], backward: Callable[[int], Work], count: int, num_parameters: int) -> Part:
    """The part whose work on `count` sites these give; what is left at 0 sites belongs to the parameters."""
    alone = forward(0).num_bytes, backward(0).num_bytes
    works = [
        work._replace(num_bytes=work.num_bytes - fixed)
        for work, fixed in zip((forward(count), backward(count)), alone, strict=True)
    ]
    return Part(*works, sum(alone), num_parameters)


def together(parts: Sequence[Part], num_parameters: int) -> Part:
    """The parts as one, of so many parameters: parts may share some."""
    return Part(
        added(part.forward for part in parts),
        added(part.backward for part in parts),
        sum(part.parameter_bytes for part in parts),
        num_parameters,
    )


def linear(dim_in: int, dim_out: int, num_rows: int, item_bytes: int) -> Part:
    """A linear layer on so many rows."""
    sizes = (dim_in, dim_out, item_bytes)
    return part_of(
        lambda count: operators.linear_forward(count, *sizes),
        lambda count: operators.linear_backward(count, *sizes),
        num_rows,
        (dim_in + 1) * dim_out,
    )


def pixel_head(head: nn.Linear, num_patches: int, item_bytes: int, target_bytes: int) -> Part:
    """A head on so many patches with its loss, the logits never in memory; `target_bytes` of a patch with its validity."""

    def step(count: int) -> Work:
        return operators.heads_step(count, head.in_features, head.out_features, item_bytes, count * target_bytes)

    part = part_of(step, lambda count: Work(0), num_patches, size_of(head))
    flops = part.forward.matrix_flops // 3  # logits and gradients come from one call; two thirds are the backward's
    return replace(part, forward=part.forward._replace(matrix_flops=flops), backward=Work(0, 2 * flops))


def pixel_target_bytes(modality: str, num_bands: int) -> int:
    """Of a pixel's targets and their validity."""
    if spec_of(modality).kind == "categorical":
        return CLASS_BYTES + VALID_BYTES
    return num_bands * (PIXEL_BYTES + VALID_BYTES)


def size_of(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())
