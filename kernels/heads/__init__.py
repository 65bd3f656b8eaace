"""Pixel heads at hidden patches fused with their loss: logits never exist in full."""

from mpmae.kernels.heads.ops import head_loss

__all__ = ["head_loss"]
