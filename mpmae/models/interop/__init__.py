"""Weights of other programs and of our own checkpoints, in and out."""

from mpmae.models.interop.build import build_multimae, fresh_multimae
from mpmae.models.interop.describe import Architecture, describe, describe_convnext
from mpmae.models.interop.describe_multimae import MultiMAEArchitecture, describe_multimae
from mpmae.models.interop.load import LoadReport, as_weights, load_encoder, load_reference
from mpmae.models.interop.names_out import to_mmearth, to_timm
from mpmae.models.interop.read import read_weights
from mpmae.models.interop.weights import Weights

__all__ = [
    "Architecture",
    "LoadReport",
    "MultiMAEArchitecture",
    "Weights",
    "as_weights",
    "build_multimae",
    "describe",
    "describe_convnext",
    "describe_multimae",
    "fresh_multimae",
    "load_encoder",
    "load_reference",
    "read_weights",
    "to_mmearth",
    "to_timm",
]
