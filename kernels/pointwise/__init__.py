"""The pointwise half of a ConvNeXt V2 block: LayerNorm, Linear, GELU, GRN, Linear, residual."""

from mpmae.kernels.pointwise.choice import chosen, way_of, weight_problems
from mpmae.kernels.pointwise.formulas import GELUS, Options, Saved, Weights

__all__ = ["GELUS", "Options", "Saved", "Weights", "chosen", "way_of", "weight_problems"]
