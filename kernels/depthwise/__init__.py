"""Depthwise KxK convolution over the visible sites."""

from mpmae.kernels.depthwise.reference import depthwise_conv

__all__ = ["depthwise_conv"]
