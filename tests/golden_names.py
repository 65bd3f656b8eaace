"""Our parameters, or anything of their shape, under the names and in the layout of the published code."""

import torch
from torch import Tensor, nn

from mpmae.models import MPMAE
from mpmae.models.encoder import SparseEncoder
from mpmae.models.interop import to_mmearth
from mpmae.models.interop.names_in import canonical_name


def published(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published name -> value, for `values` by parameter name of an MP-MAE, a ConvNeXtV2 or a UNet."""
    canonical = {canonical_name(name, "mpmae", False): value for name, value in values.items()}
    if isinstance(model, MPMAE):
        return to_mmearth(canonical, sparse=isinstance(model.encoder, SparseEncoder))
    return {name.removeprefix("encoder."): value for name, value in to_mmearth(canonical, sparse=False).items()}


def published_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter under its published name."""
    return published(model, {name: parameter.grad for name, parameter in model.named_parameters()})


def published_names(model: nn.Module) -> dict[str, str]:
    """Our name of every parameter -> its published name; of the copies of the shared decoder the first modality's."""
    names = [name for name, _ in model.named_parameters()]
    marks = {
        name: torch.full_like(value, index, dtype=torch.int64)
        for index, (name, value) in enumerate(model.named_parameters())
    }
    found: dict[str, str] = {}
    for name, mark in published(model, marks).items():
        found.setdefault(names[int(mark.flatten()[0])], name)
    return found
