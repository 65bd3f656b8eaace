"""What torch's flop counter says of a training step, also inside of the project's own ops.

The counter does not see below a custom op: `counted` runs the op's own code, on tensors without data, under a counter of its
own. For the weight gradient of a grouped convolution torch (2.13) counts each group with the channels of all: that
formula is replaced. Convolutions with a group per channel are counted apart, since they run on the whole grid here.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from mpmae.kernels.block import ops as block
from mpmae.kernels.downsample import ops as downsample
from mpmae.kernels.heads import ops as heads
from mpmae.kernels.stem import ops as stem
from mpmae.models import MPMAE

aten, ours = torch.ops.aten, torch.ops.mpmae


@dataclass
class Flops:
    """Operations of matrix products and full convolutions, in the forward and in all, and of depthwise ones by channels."""

    forward: int = 0
    matrix: int = 0
    depthwise: Counter = field(default_factory=Counter)


def counted(model: MPMAE, batch, visible) -> Flops:
    """The operations of a forward and backward of a model and a batch on a `FakeTensorMode`."""
    flops = Flops()
    with FlopCounterMode(display=False, custom_mapping=_mapping(flops)) as counter:
        loss = model(batch, visible).loss
        flops.forward = counter.get_total_flops()
        loss.backward()
    flops.matrix = counter.get_total_flops()
    return flops


def _raw(formula):
    formula._get_raw = True
    return formula


def _mapping(flops: Flops) -> dict:
    def convolution(x, weight, *_, out_val=None, **__) -> int:
        count = conv_flop_count(x.shape, weight.shape, out_val.shape)
        return _sorted(flops, weight, count)

    def convolution_backward(grad, x, weight, *arguments, out_val=None, **_) -> int:
        wanted = arguments[-1]
        return _sorted(flops, weight, sum(wanted[:2]) * conv_flop_count(x.shape, weight.shape, grad.shape))

    def inside(function):
        def formula(*arguments, out_val=None, **keywords) -> int:
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                function(*arguments, **keywords)
            return counter.get_total_flops()

        return _raw(formula)

    mapping = {aten.convolution: _raw(convolution), aten.convolution_backward: _raw(convolution_backward)}
    definitions = {
        ours.block: block._block,
        ours.block_backward: block._block_backward,
        ours.downsample: downsample._forward,
        ours.downsample_backward: downsample._backward,
        ours.stem: stem._forward,
        ours.stem_backward: stem._backward,
        ours.head_loss: heads._head_loss,
    }
    mapping |= {op: inside(definition._init_fn) for op, definition in definitions.items()}
    return mapping


def _sorted(flops: Flops, weight, count: int) -> int:
    if weight.shape[1] == 1:
        flops.depthwise[weight.shape[0], weight.shape[-1]] += count
        return 0
    return count


def fake_mode() -> FakeTensorMode:
    """Tensors without data, among which those of the test may be mixed."""
    return FakeTensorMode(allow_non_fake_inputs=True)
