"""A whole training step of the model on Triton kernels, against the reference: loss and gradients."""

import pytest
import torch

import mpmae
from mpmae.kernels import backends
from mpmae.loader.batch import Batch

SIZE = 16
TARGETS = ("sentinel2", "esa_worldcover", "biome")


def batch():
    generator = torch.Generator().manual_seed(1)
    values = {
        "sentinel2": torch.randn(2, 13, SIZE, SIZE, generator=generator),
        "esa_worldcover": torch.randint(0, 11, (2, 1, SIZE, SIZE), generator=generator),
        "biome": torch.randint(0, 14, (2,), generator=generator),
    }
    valid = {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
    valid["sentinel2"][0, :, :5, 3:] = False
    return Batch(values, valid, torch.arange(2), dict.fromkeys(values, 2), 2)


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
