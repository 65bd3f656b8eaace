"""The whole training step under torch.compile: one graph, no second compilation for the next batch."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mpmae
from mpmae.masking import draw_visible

TARGETS = ("sentinel2", "aster", "esa_worldcover", "biome", "era5")


def build(**options):
    torch.manual_seed(0)
    options = {"img_size": 24, "patch_size": 8, "decoder_dim": 16, "decoder_depth": 1, "modalities_out": TARGETS} | options
    model = mpmae.create_model("mpmae_atto", **options)
    for stage in model.encoder.stages:  # one block of each is enough, and the compiler's time goes by their number
        del stage[1:]
    return model


def step(run, model, batch, visible):
    """The loss of a forward pass and the gradients of a backward one."""
    model.zero_grad()
    out = run(batch, visible)
    out.loss.backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def num_compilations(model, backend, batches):
    """How often steps on these batches are compiled; each has eager's loss and gradients."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number, batch in enumerate(batches):
        visible = draw_visible(0, number, batch.sample_ids, model.num_patches, model.num_visible)
        for got, expected in zip(*(step(run, model, batch, visible) for run in (compiled, model)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return counter.frame_count


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gaps", [False, True])
def test_one_graph_for_a_step(make_batch, backend, gaps):
    batches = [make_batch(seed=seed) for seed in (0, 1)]
    if gaps:
        for batch in batches:
            batch.valid["sentinel2"][0, :, :9, 3:] = False
    assert num_compilations(build(), backend, batches) == 1


@pytest.mark.slow
def test_another_number_of_present_samples_compiles_once_more(make_batch):
    """How many samples of a global batch have a modality is an int: its second value makes it a symbol."""
    batch = make_batch()
    others = [dataclasses.replace(batch, num_present=dict.fromkeys(batch.num_present, count)) for count in (3, 5, 8)]
    assert num_compilations(build(modalities_out=("sentinel2", "biome")), "aot_eager", [batch, *others]) == 2


def test_autocast_and_an_index_drawn_inside(make_batch):
    model = build(modalities_out=("sentinel2", "biome"))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(make_batch())
    out.loss.backward()
    assert out.visible.shape == (2, model.num_visible)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
