"""Depthwise KxK convolution over the visible sites."""

from mpmae.kernels.depthwise.ops import depthwise_conv, implementation, slot_table

__all__ = ["depthwise_conv", "implementation", "slot_table"]
