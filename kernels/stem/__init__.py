"""The encoder's stem: 3x3 convolution, LayerNorm, GELU, depthwise pooling, LayerNorm; recomputed in the backward."""

from mpmae.kernels.stem.ops import stem
from mpmae.kernels.stem.reference import StemWeights

__all__ = ["StemWeights", "stem"]
