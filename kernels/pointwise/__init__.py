"""The pointwise half of a ConvNeXt V2 block: LayerNorm, Linear, GELU, GRN, Linear, residual."""

from mpmae.kernels.pointwise.reference import global_response_norm, pointwise_block

__all__ = ["global_response_norm", "pointwise_block"]
