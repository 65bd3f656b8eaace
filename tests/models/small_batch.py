"""A small fixed batch of three kinds of modality."""

import torch

from mpmae.loader.batch import Batch

TARGETS = ("sentinel2", "esa_worldcover", "biome")


def small_batch(size_px: int) -> Batch:
    """Two samples, all valid."""
    generator = torch.Generator().manual_seed(1)
    values = {
        "sentinel2": torch.randn(2, 13, size_px, size_px, generator=generator),
        "esa_worldcover": torch.randint(0, 11, (2, 1, size_px, size_px), generator=generator),
        "biome": torch.randint(0, 14, (2,), generator=generator),
    }
    valid = {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
    return Batch(values, valid, torch.arange(2), dict.fromkeys(values, 2), 2)
