"""LayerNorm and a 2x2 convolution of stride 2 between two stages of the sparse encoder."""

from mpmae.kernels.downsample.ops import downsample

__all__ = ["downsample"]
