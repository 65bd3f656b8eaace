"""U-Net for segmentation on the dense ConvNeXt V2.

Shapes: N images, B input channels, S image side in pixels (a multiple of the patch size), K classes, C_s channels of stage
s.
Source: Nedungadi et al., "MMEarth", arXiv 2405.02771, and MMEarth-train, `models/convnextv2_unet.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.models.dense import FIRST_TILE_SIDE, NORM_EPS, NUM_STAGES, Backbone, ChannelNorm, initialise_dense


class Upsample(nn.Module):
    """Nearest upsampling by `scale`, 3x3 convolution, LayerNorm, GELU."""

    def __init__(self, dim_in: int, dim_out: int, scale: int):
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm = ChannelNorm(dim_out, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_out, scale * H, scale * W] from [N, C_in, H, W]."""
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return F.gelu(self.norm(self.conv(x)))


class UNet(nn.Module):
    """Encoder and a decoder that climbs back to full resolution past skip connections; logits per pixel.

    The skips are the stem's maps (stem "mmearth" has one at full resolution besides) and those of stages 1 and 2. Arguments
    as for `mpmae.models.dense.Backbone`, which is the part `encoder`; its stem pads "same". num_classes: K.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int,
        in_chans: int,
        patch_size: int,
        stem: str = "mmearth",
        grn_eps: float | None = None,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = Backbone(
            dims,
            depths,
            in_chans=in_chans,
            patch_size=patch_size,
            stem=stem,
            grn_eps=grn_eps,
            drop_path_rate=drop_path_rate,
        )
        full_resolution_skip = dims[0] if stem == "mmearth" else 0
        self.upsamples = nn.ModuleList(
            [
                Upsample(dims[3], dims[3] // 2, 2),
                Upsample(dims[3] // 2 + dims[2], dims[2] // 2, 2),
                Upsample(dims[2] // 2 + dims[1], dims[1] // 2, 2),
                Upsample(dims[1] // 2 + dims[0], dims[0], patch_size // FIRST_TILE_SIDE),
                Upsample(dims[0] + full_resolution_skip, dims[0] // 2, 1),
            ]
        )
        self.head = nn.Conv2d(dims[0] // 2, num_classes, 1)
        initialise_dense(self)

    def forward_features(self, image: Tensor) -> Tensor:
        """The decoder's map [N, C_0 / 2, S, S] for `image` [N, B, S, S]."""
        skips = self.encoder.forward_stem(image)
        x = skips[-1]
        for stage in range(NUM_STAGES):
            x = self.encoder.forward_stage(stage, x)
            if stage in (1, 2):
                skips.append(x)
        for upsample in self.upsamples:
            x = upsample(x)
            if skips:
                x = torch.cat([x, skips.pop()], 1)
        return x

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, K, S, S] for `image` [N, B, S, S]."""
        return self.head(self.forward_features(image))
