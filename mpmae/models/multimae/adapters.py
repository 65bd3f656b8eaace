"""Input adapters: the patches of a domain as tokens.

Shapes: N samples, C channels, H side of a domain's map, P side of its patches, L patches, D width.
Source: MultiMAE (arXiv 2204.01678), `input_adapters.py`.
"""

from torch import Tensor, nn

from mpmae.domains import Domain

CLASS_DIM = 64


class PatchAdapter(nn.Module):
    """One linear layer on the pixels of a patch."""

    position_mode = "bicubic"

    def __init__(self, num_channels: int, dim: int, patch_side: int):
        super().__init__()
        self.proj = nn.Conv2d(num_channels, dim, patch_side, stride=patch_side)

    def forward(self, values: Tensor) -> Tensor:
        """Tokens [N, L, D], without positions, of `values` [N, C, H, H]."""
        return self.proj(values).flatten(2).transpose(1, 2)


class ClassAdapter(nn.Module):
    """An embedding of each pixel's class, then one linear layer on the pixels of a patch."""

    position_mode = "bilinear"  # the published code resizes the positions of images and of class maps in different ways

    def __init__(self, num_classes: int, dim: int, patch_side: int):
        super().__init__()
        self.class_emb = nn.Embedding(num_classes, CLASS_DIM)
        self.proj = nn.Conv2d(CLASS_DIM, dim, patch_side, stride=patch_side)

    def forward(self, ids: Tensor) -> Tensor:
        """Tokens [N, L, D], without positions, of class ids int64 [N, H, H]."""
        return self.proj(self.class_emb(ids).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


def adapter_of(domain: Domain, dim: int, patch_size: int) -> PatchAdapter | ClassAdapter:
    """The adapter of a domain; `patch_size` in pixels of the image."""
    kind = ClassAdapter if domain.num_classes else PatchAdapter
    return kind(domain.num_channels, dim, patch_size // domain.stride)
