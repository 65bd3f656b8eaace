"""The encoders of MP-MAE: the sparse ConvNeXt V2 on the visible patches, and the dense one as its baseline.

Shapes: N samples, B input bands, S image side in pixels, p patch side in pixels, G = S/p patches on a side, L = G*G patches,
V visible ones, s sites on a side of a tile (8, 4, 2, 1 over the stages), K = V*s*s packed sites per sample, C channels.
Source: Nedungadi et al., "MMEarth", arXiv 2405.02771, section 4; Woo et al., "ConvNeXt V2", arXiv 2301.00808.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpmae.models import blocks
from mpmae.models.blocks import NORM_EPS, Block, Downsample, Sites, StemWeights
from mpmae.models.dense import FIRST_TILE_SIDE, Backbone

ENCODER_GRN_EPS = 1e-6


class Pixels(NamedTuple):
    """Which pixels of an image the encoder sees.

    pixel_valid: bool [N, S, S], True where a pixel holds data; None when all visible ones do. visible: int64 [N, V]. slots:
    int16, the tiles' slots. index: int64 [N, V*p*p], row of each packed pixel in the flattened [N*S*S] image. site_valid:
    bool [N, V*64], True where a site behind the stem exists; None when all do.
    """

    pixel_valid: Tensor | None
    visible: Tensor
    slots: Tensor
    index: Tensor
    site_valid: Tensor | None


class MMEarthStem(nn.Module):
    """3x3 convolution at full resolution, LayerNorm, GELU, depthwise convolution of kernel = stride = p/8, LayerNorm."""

    def __init__(self, num_bands: int, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(num_bands, dim, 3, padding=1)
        self.conv_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pool = nn.Conv2d(dim, dim, stride, stride=stride, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, image: Tensor, pixels: Pixels) -> Tensor:
        """[N, V*64, C] from `image` [N, B, S, S]; pixels that do not exist count as 0, whatever it holds there."""
        layers = (self.conv, self.conv_norm, self.pool, self.norm)
        weights = StemWeights(*(parameter for layer in layers for parameter in (layer.weight, layer.bias)))
        return blocks.stem(image, pixels.pixel_valid, pixels.visible, pixels.slots, weights, eps=NORM_EPS)


class ConvNextStem(nn.Module):
    """The stem of ConvNeXt: convolution of kernel = stride = p/8, LayerNorm."""

    def __init__(self, num_bands: int, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(num_bands, dim, stride, stride=stride)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, image: Tensor, pixels: Pixels) -> Tensor:
        """As `MMEarthStem.forward`."""
        image = image.to(self.conv.weight.dtype)
        if pixels.pixel_valid is not None:
            image = torch.where(pixels.pixel_valid[:, None], image, 0)
        x = blocks.merge_conv(blocks.pack_sites(image.permute(0, 2, 3, 1), pixels.index), self.conv)
        return blocks.keep(self.norm(x), pixels.site_valid)


STEMS = {"mmearth": MMEarthStem, "convnext": ConvNextStem}


class SparseEncoder(nn.Module):
    """Four stages of ConvNeXt V2 blocks on visible sites only.

    A site exists only if its patch is visible and it holds data; a missing neighbour contributes 0, and a site of a later
    stage exists if any site under it does.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        num_bands: int,
        img_size: int,
        patch_size: int,
        stem: str,
        grn_scope: str,
        gelu: str = "erf",
    ):
        super().__init__()
        self.num_patches_side, self.patch_size = img_size // patch_size, patch_size
        self.stem_padding, self.grn_eps = "same", ENCODER_GRN_EPS  # what `mpmae.models.dense` calls this geometry
        self.stem_stride = patch_size // FIRST_TILE_SIDE
        self.stem = STEMS[stem](num_bands, dims[0], self.stem_stride)
        self.downsamples = nn.ModuleList(Downsample(*pair) for pair in pairwise(dims))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, grn_scope=grn_scope, grn_eps=ENCODER_GRN_EPS, gelu=gelu) for _ in range(depth))
            for dim, depth in zip(dims, depths, strict=True)
        )
        for side in {patch_size, *self.tile_sides}:
            self.register_buffer(f"morton{side}", blocks.morton_sites(side), persistent=False)

    @property
    def tile_sides(self) -> tuple[int, ...]:
        """Sites on a side of a tile, per stage: 8, 4, 2, 1."""
        return tuple(FIRST_TILE_SIDE >> stage for stage in range(len(self.stages)))

    def site_index(self, visible: Tensor, tile_side: int) -> Tensor:
        """Row of each packed site in the flattened [N*H*H] grid of a stage: int64 [N, V*tile_side**2]."""
        return blocks.site_index(visible, self.num_patches_side, getattr(self, f"morton{tile_side}"))

    def forward(self, image: Tensor, pixel_valid: Tensor, visible: Tensor) -> Tensor:
        """Features of the visible patches: [N, V, C], 0 for a patch without any data.

        image: [N, B, S, S], finite. pixel_valid: bool [N, S, S], True where a pixel holds data. visible: int64 [N, V].
        """
        visible = visible.contiguous()
        index = self.site_index(visible, self.patch_size)
        valid = blocks.pack_sites(pixel_valid[:, :, :, None], index)[:, :, 0]
        if _without_gaps(valid):
            valid = pixel_valid = None
        stage_valid = blocks.merge_valid(valid, self.stem_stride)
        slots = blocks.tile_slots(visible, self.num_patches_side)
        x = self.stem(image, Pixels(pixel_valid, visible, slots, index, stage_valid))
        for stage, tile_side in enumerate(self.tile_sides):
            if stage:
                valid, stage_valid = stage_valid, blocks.merge_valid(stage_valid, 2)
                x = self.downsamples[stage - 1](x, valid, stage_valid)
            sites = Sites(visible, slots, tile_side, stage_valid)
            for block in self.stages[stage]:
                x = block(x, sites)
        return x


class DenseEncoder(Backbone):
    """The dense ConvNeXt V2 on the image with 0 at hidden pixels: it spends its time on every patch, hidden ones too."""

    def forward(self, image: Tensor, pixel_valid: Tensor, visible: Tensor) -> Tensor:
        """The last map [N, C, G, G], hidden patches included, for the arguments of `SparseEncoder.forward`.

        `pixel_valid` is not looked at: a pixel without data is one that holds 0.
        """
        num_patches_side = image.shape[-1] // self.patch_size
        image = image.to(self.stem.conv.weight.dtype)
        return self.forward_features(image * shown_pixels(visible, num_patches_side, self.patch_size)[:, None])


def _without_gaps(valid: Tensor) -> bool:
    """Whether all of `valid` is known to be True: then no stage has anything to mask.

    Looked at on a CPU only: a GPU would have to wait for the answer, and masks cost it about a percent of the activations'
    traffic. A compiler must not branch on data.
    """
    return valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all())


def shown_pixels(visible: Tensor, num_patches_side: int, patch_size: int) -> Tensor:
    """True at the pixels of the patches `visible` int64 [N, V]: bool [N, S, S]."""
    side, patch = num_patches_side, patch_size
    shown = torch.zeros(len(visible), side * side, dtype=torch.bool, device=visible.device).scatter(1, visible, True)
    return shown.view(-1, side, 1, side, 1).expand(-1, -1, patch, -1, patch).reshape(-1, side * patch, side * patch)
