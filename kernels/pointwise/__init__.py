"""The pointwise half of a ConvNeXt V2 block: LayerNorm, Linear, GELU, GRN, Linear, residual."""

from mpmae.kernels.pointwise import formulas
from mpmae.kernels.pointwise.formulas import GELUS, Options, Saved, Weights

__all__ = ["GELUS", "Options", "Saved", "Weights", "implementation_for"]


def implementation_for(y, options):
    return formulas
