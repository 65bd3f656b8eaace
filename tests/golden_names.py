"""Our parameters, or anything of their shape, under the names and in the layout of the published code."""

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
