"""Which implementation takes a block."""

import torch

from mpmae.kernels.pointwise.choice import WIDE_FROM_CHANNELS, path_of


def test_the_border():
    for (dtype, scope), border in WIDE_FROM_CHANNELS.items():
        assert path_of(border - 1, dtype, scope) == "fused"
        assert path_of(border, dtype, scope) == "wide"
    assert path_of(8, torch.float64, "sample") == "wide"
