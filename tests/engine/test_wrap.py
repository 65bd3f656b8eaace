"""What counts as a block, and what checkpointing and compilation do to one."""

import pytest
import torch
from torch import nn

from mpmae.config import EngineSection
from mpmae.engine.wrap import blocks_of, unwrap_blocks, wrap_blocks
from tests.engine.toy import Toy, ToyBlock, global_batch
from tests.models.test_fsdp2 import build, gradients, step

BOTH = pytest.mark.parametrize("system", ["mpmae", "multimae"])


def test_blocks_of_the_model():
    names = [name for name, _ in blocks_of(build("mpmae"))]
    stages = [f"encoder.stages.{stage}.{block}" for stage, depth in enumerate((2, 2, 6, 2)) for block in range(depth)]
    assert names == [*(f"encoder.downsamples.{i}" for i in range(3)), *stages, "decoder.blocks.0"]
    assert [name for name, _ in blocks_of(build("multimae"))] == ["encoder.0", "encoder.1", "decoders.blocks.0"]


def test_innermost_list_outermost_block_and_nothing_without_parameters():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.ModuleList([nn.Linear(2, 2)])

    module = nn.Module()
    module.stages = nn.ModuleList([nn.ModuleList([Outer(), nn.GELU()]), nn.ModuleList([nn.Linear(2, 2)])])
    module.heads = nn.ModuleDict({"a": nn.Linear(2, 2)})
    assert [name for name, _ in blocks_of(module)] == ["stages.0.0", "stages.1.0"]


@pytest.mark.parametrize("compiled", [False, True])
def test_names_stay_and_unwrapping_leaves_no_trace(compiled):
    plain = Toy()
    wrapped = Toy()
    wrap_blocks(wrapped, EngineSection(activation_checkpointing=True, compile=compiled))
    assert all("forward" in vars(block) for _, block in blocks_of(wrapped))
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in wrapped.named_modules()] == [name for name, _ in plain.named_modules()]
    unwrap_blocks(wrapped)
    assert not [name for name, module in wrapped.named_modules() if "forward" in vars(module)]


def test_checkpointing_runs_each_block_again_in_the_backward(monkeypatch):
    runs = []
    original = ToyBlock.forward
    monkeypatch.setattr(ToyBlock, "forward", lambda block, x: runs.append(block) or original(block, x))
    toy = Toy()
    wrap_blocks(toy, EngineSection(activation_checkpointing=True))
    loss = toy(**global_batch(0), num_b=5).loss
    assert len(runs) == 2
    loss.backward()
    assert runs == [*toy.blocks, *reversed(toy.blocks)]


@BOTH
def test_the_model_checkpoints_bit_by_bit(system):
    plain, wrapped = build(system), build(system)
    wrap_blocks(wrapped, EngineSection(activation_checkpointing=True))
    assert step(plain, system) == step(wrapped, system)
    wanted = gradients(plain)
    assert all((wanted[name] == grad).all() for name, grad in gradients(wrapped).items())


@BOTH
@pytest.mark.slow
def test_the_model_compiles(system):
    """In float64, where a compiler's order of sums shows in no digit that counts."""
    plain, wrapped = build(system).double(), build(system).double()
    wrap_blocks(wrapped, EngineSection(compile=True))
    assert step(wrapped, system) == pytest.approx(step(plain, system), rel=1e-12)
    wanted = gradients(plain)
    for name, grad in gradients(wrapped).items():
        torch.testing.assert_close(torch.tensor(grad), torch.tensor(wanted[name]), rtol=1e-9, atol=1e-12)
