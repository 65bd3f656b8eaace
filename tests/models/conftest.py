"""Batches for tests of the models."""

import pytest
import torch

from mpmae.loader.batch import Batch
from mpmae.modalities import TARGETS, spec_of


@pytest.fixture(scope="session")
def make_batch():
    """A function that gives a random batch of `num` samples, images of `size` pixels, every value there."""

    def make(num=2, size=24, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        values, valid = {}, {}
        for name in TARGETS:
            spec = spec_of(name)
            channels = 1 if spec.kind == "categorical" else len(spec.bands)
            shape = (num, channels, size, size) if spec.scope == "pixel" else (num, channels)
            if spec.one_hot:
                shape = (num,)
            if spec.kind == "categorical":
                values[name] = torch.randint(0, spec.num_classes, shape, generator=generator)
            else:
                values[name] = torch.randn(shape, generator=generator, dtype=dtype)
            valid[name] = torch.ones(shape, dtype=torch.bool)
        return Batch(values, valid, torch.arange(num), dict.fromkeys(values, num), num)

    return make
