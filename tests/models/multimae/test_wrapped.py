"""MultiMAE under torch.compile, and with its blocks checkpointed and compiled as the engines do."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mpmae.config import EngineSection
from mpmae.engine.wrap import blocks_of, wrap_blocks
from tests.models.multimae.small import SIZE, build, gradients, step
from tests.models.small import drop


def test_blocks_are_found():
    names = [name for name, _ in blocks_of(build(decoder_depth=2))]
    assert names == ["encoder.0", "encoder.1", "decoders.blocks.0", "decoders.blocks.1"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_for_a_step(make_batch, backend):
    """Whatever data the samples lack, and with other tokens: no second compilation, eager's loss and gradients."""
    domains = ("rgb", "depth", "semseg")
    model = build(torch.float32, loss_weighting="uncertainty", domains_in=domains, domains_out=domains)
    del model.encoder[1:]
    counter = CompileCounterWithBackend(backend)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 1):
        batch = make_batch(2, SIZE, seed=seed)
        if seed:
            drop(batch, "aster", 0)
            drop(batch, "sentinel2", (1, slice(None), slice(0, 16)))
        draw = model.draw(0, seed, batch.sample_ids)
        want, want_grads = step(model, batch, draw)
        model.zero_grad()
        out = compiled(batch, draw)
        out.loss.backward()
        torch.testing.assert_close(out.losses, want.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients(model), want_grads, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_checkpointed_blocks(make_batch):
    model, batch = build(), make_batch(2, SIZE)
    drop(batch, "sentinel2", 0)
    draw = model.draw(0, 0, batch.sample_ids)
    out, grads = step(model, batch, draw)
    wrap_blocks(model, EngineSection(activation_checkpointing=True))
    wrapped, wrapped_grads = step(model, batch, draw)
    assert torch.equal(out.loss, wrapped.loss)
    torch.testing.assert_close(wrapped_grads, grads, rtol=0, atol=0)


def test_weights_in_bf16_with_a_float32_table(make_batch):
    """What DeepSpeed makes of a module under bf16: it leaves buffers as they are."""
    model = build(torch.float32).bfloat16()
    model.table = model.table.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(make_batch(2, SIZE)).loss
    loss.backward()
    assert loss.isfinite()
