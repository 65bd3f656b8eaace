"""Random batches made straight on the device, so that no loader takes part in a measurement."""

import torch
from torch import Tensor

from mpmae.loader.batch import Batch
from mpmae.masking import draw_visible, num_visible
from mpmae.modalities import spec_of
from mpmae.models.mpmae import MPMAE
from mpmae.models.multimae.model import MultiMAE


def synthetic_batch(model: MPMAE | MultiMAE, num_samples: int, device: torch.device, seed: int = 0) -> Batch:
    """Normal and uniformly drawn values of everything that `model` reads, all valid."""
    generator = torch.Generator(device).manual_seed(seed)
    values = {}
    for name in model.modalities:
        spec = spec_of(name)
        sides = (model.img_size, model.img_size) if spec.scope == "pixel" else ()
        if spec.kind == "categorical":
            shape = (num_samples,) if spec.one_hot else (num_samples, 1, *sides)
            values[name] = torch.randint(0, spec.num_classes, shape, generator=generator, device=device)
        else:
            shape = (num_samples, len(model.bands_available[name]), *sides)
            values[name] = torch.randn(shape, generator=generator, device=device)
    return Batch(
        values=values,
        valid={name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()},
        sample_ids=torch.arange(num_samples, device=device),
        num_present=dict.fromkeys(values, num_samples),
        global_batch_size=num_samples,
    )


def random_visible(num_samples: int, num_patches: int, mask_ratio: float, device: torch.device) -> Tensor:
    """Visible patches of each sample, ascending: int64 [N, V] on `device`."""
    count = num_visible(num_patches, mask_ratio)
    return draw_visible(0, 0, torch.arange(num_samples), num_patches, count).to(device)
