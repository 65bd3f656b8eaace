"""The whole training step under torch.compile: one graph, no second compilation for the next batch."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mpmae
from mpmae.masking import draw_visible

TARGETS = ("sentinel2", "aster", "esa_worldcover", "biome", "era5")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gaps", [False, True])
def test_one_graph_for_a_step(make_batch, backend, gaps):
    torch.manual_seed(0)
    options = {"img_size": 24, "patch_size": 8, "decoder_dim": 16, "decoder_depth": 1, "modalities_out": TARGETS}
    model = mpmae.create_model("mpmae_atto", **options)
    batches = [make_batch(seed=seed) for seed in (0, 1)]
    if gaps:
        for batch in batches:
            batch.valid["sentinel2"][0, :, :9, 3:] = False
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number, batch in enumerate(batches):
        visible = draw_visible(0, number, [0, 1], model.num_patches, model.num_visible)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(batch, visible)
            out.loss.backward()
            results.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
