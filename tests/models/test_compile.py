"""The whole model under torch.compile: one graph for forward and backward, compiled once, with eager's numbers."""

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mpmae
from mpmae.masking import draw_visible
from tests.models.small import drop

SIZE, PATCHES, NUM_VISIBLE = 24, 9, 3
MODALITIES = ("sentinel2", "esa_worldcover", "era5", "biome")


def build(**options):
    torch.manual_seed(0)
    options = {"modalities_out": MODALITIES, "img_size": SIZE, "decoder_dim": 16, **options}
    model = mpmae.create_model("mpmae_atto", init="convnextv2", **options)
    for stage in model.encoder.stages:  # one block of each is enough, and the compiler's time goes by their number
        del stage[1:]
    return model


def batches(make_batch):
    """Two batches alike but for their data; the second one has gaps."""
    first, second = make_batch(2, SIZE), make_batch(2, SIZE, seed=1)
    drop(second, "sentinel2", (0, slice(None), slice(5)))
    drop(second, "esa_worldcover", 1)
    return first, second


def visible_of(batch, seed=0):
    return draw_visible(seed, 0, batch.sample_ids, PATCHES, NUM_VISIBLE)


def step(model, batch, visible):
    """Output of a forward pass, and the gradients of a backward one."""
    model.zero_grad()
    out = model(batch, visible)
    out.loss.backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(model, backend, pairs):
    plain, compiled = copy.deepcopy(model), copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend=backend)
    for batch, visible in pairs:
        wanted, wanted_grads = step(plain, batch, visible)
        out, grads = step(compiled, batch, visible)
        assert type(out) is type(wanted)
        torch.testing.assert_close(out._asdict(), wanted._asdict(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, wanted_grads, rtol=1e-3, atol=1e-5)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"stem": "convnext", "reference_quirks": True}, marks=pytest.mark.slow)],
    ids=["default", "convnext_quirks"],
)
def test_one_graph_with_the_numbers_of_eager(make_batch, options):
    counter = CompileCounterWithBackend("aot_eager")
    first, second = batches(make_batch)
    compare(build(**options), counter, [(first, visible_of(first)), (second, visible_of(second, seed=1))])
    assert counter.frame_count == 1


@pytest.mark.slow
def test_another_number_of_tiles_compiles_once_more(make_batch):
    """How many tiles of a global batch have a modality is an int: its second value makes it a symbol."""
    counter = CompileCounterWithBackend("aot_eager")
    first, second = batches(make_batch)
    others = [dataclasses.replace(second, num_present=dict.fromkeys(second.num_present, count)) for count in (3, 5, 8)]
    compare(build(modalities_out=("sentinel2", "biome")), counter, [(b, visible_of(b)) for b in (first, *others)])
    assert counter.frame_count == 2


def test_autocast_and_a_drawn_index(make_batch):
    model, (batch, _) = build(), batches(make_batch)
    model.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch)
    out.loss.backward()
    assert out.visible.shape == (2, NUM_VISIBLE)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_inductor(make_batch):
    first, second = batches(make_batch)
    compare(build(), "inductor", [(first, visible_of(first)), (second, visible_of(second, seed=1))])
