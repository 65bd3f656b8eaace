"""Fixed sin-cos positions of the patches of an image.

Shapes: D width, G patches on a side, L = G*G patches.
Source: multimae-meets-eo and MultiMAE (arXiv 2204.01678), `multimae_utils.py`; Chen et al., MoCo v3, arXiv 2104.02057.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TABLE_SIZE_PX = 224  # the published tables are built for this image size, whatever the images are
TEMPERATURE = 10_000.0


def sincos_table(dim: int, side: int) -> Tensor:
    """float32 [1, D, side, side]: sin and cos of the row, then sin and cos of the column, a quarter of D each."""
    frequency = 1.0 / TEMPERATURE ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    angles = frequency[:, None] * torch.arange(side, dtype=torch.float32)
    waves = torch.cat([angles.sin(), angles.cos()])
    rows, columns = waves[:, :, None].expand(-1, -1, side), waves[:, None, :].expand(-1, side, -1)
    return torch.cat([rows, columns])[None]


def table_side(patch_size: int) -> int:
    """Positions on a side of a table."""
    return TABLE_SIZE_PX // patch_size


def positions(table: Tensor, side: int, mode: str) -> Tensor:
    """[L, D] for `side` patches on a side; `mode` is "bicubic" or "bilinear", as F.interpolate resizes the table."""
    return F.interpolate(table, size=(side, side), mode=mode, align_corners=False)[0].flatten(1).T
