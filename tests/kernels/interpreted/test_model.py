"""A whole training step of the model on Triton kernels, against the reference: loss and gradients."""

import pytest
import torch

import mpmae
from mpmae.kernels import backends
from tests.models.small_batch import TARGETS, small_batch

SIZE = 16


def batch():
    batch = small_batch(SIZE)
    batch.valid["sentinel2"][0, :, :5, 3:] = False
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step(dtype, monkeypatch):
    torch.manual_seed(0)
    options = {"img_size": SIZE, "patch_size": 8, "decoder_dim": 16, "decoder_depth": 1, "modalities_out": TARGETS}
    model = mpmae.create_model("mpmae_atto", **options)
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv(backends.VARIABLE, backend)
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(batch(), torch.tensor([[0, 3], [1, 2]])).loss
        loss.backward()
        results.append((loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    bound = 1e-4 if dtype == torch.float32 else 0.1
    for got, wanted in zip(*results, strict=True):
        assert ((got - wanted).norm() / wanted.norm().clamp(min=1e-6)).item() < bound
