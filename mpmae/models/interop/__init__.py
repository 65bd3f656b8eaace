"""Weights of other programs and of our own checkpoints, in and out."""

from mpmae.models.interop.describe import Architecture, describe
from mpmae.models.interop.load import LoadReport, as_weights, load_encoder, load_reference
from mpmae.models.interop.names_out import to_mmearth, to_timm
from mpmae.models.interop.read import Weights, read_weights

__all__ = [
    "Architecture",
    "LoadReport",
    "Weights",
    "as_weights",
    "describe",
    "load_encoder",
    "load_reference",
    "read_weights",
    "to_mmearth",
    "to_timm",
]
