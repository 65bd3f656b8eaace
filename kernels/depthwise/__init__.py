"""Depthwise KxK convolution over the visible sites."""

from mpmae.kernels.depthwise.ops import chosen, depthwise_conv, implementation, input_problems

__all__ = ["chosen", "depthwise_conv", "implementation", "input_problems"]
