"""A small model with batches to match, for tests of losses and quirks."""

import dataclasses

import torch

import mpmae
from mpmae.masking import draw_visible

SIZE, PATCHES = 24, 9


def build(dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = mpmae.create_model("mpmae_atto", img_size=SIZE, decoder_dim=16, init="convnextv2", **options).to(dtype)
    if model.log_vars is not None:
        with torch.no_grad():
            model.log_vars.copy_(torch.linspace(-0.5, 0.5, len(model.log_vars)))
    return model


def draw(batch):
    return draw_visible(0, 0, batch.sample_ids, PATCHES, 3)


def cut(batch, start, end):
    part = slice(start, end)
    return dataclasses.replace(
        batch,
        values={name: value[part] for name, value in batch.values.items()},
        valid={name: valid[part] for name, valid in batch.valid.items()},
        sample_ids=batch.sample_ids[part],
        padding=batch.padding[part],
    )


def drop(batch, name, where=...):
    """No data for `name` at `where`: the values a loader gives, and their validity."""
    batch.values[name][where] = -1 if batch.values[name].dtype == torch.int64 else 0
    batch.valid[name][where] = False
