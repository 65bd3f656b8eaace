"""From the inflated bytes of stored maps to tensors: un-filter, crop, flip, then normalise or look up classes."""

from mpmae.kernels.unfilter.ops import classify_maps, normalise_maps
from mpmae.kernels.unfilter.reference import StoredMaps, decode_maps

__all__ = ["StoredMaps", "classify_maps", "decode_maps", "normalise_maps"]
