"""Models of segmentation: a U-Net on an encoder, and a linear layer on the maps of one that stays frozen.

Shapes: M windows, B input bands, S image side in pixels, K classes, C_s channels and h_s sites on a side of stage s.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.errors import ConfigError
from mpmae.eval.encoders import ImageEncoder
from mpmae.models.dense import NORM_EPS, MMEarthStem
from mpmae.models.unet import UNet

_LOG = logging.getLogger(__name__)


def unet_on(encoder: ImageEncoder, num_classes: int, seed: int, drop_path_rate: float = 0.0) -> UNet:
    """A U-Net whose encoder has the weights of `encoder`; its decoder starts with random ones drawn from `seed`.

    Its stem pads "same" whatever that of `encoder` does: the published U-Net does so too. A difference is logged.
    """
    like = encoder.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(
            [info["num_chs"] for info in like.feature_info],
            [len(stage) for stage in like.stages],
            num_classes=num_classes,
            in_chans=like.in_chans,
            patch_size=like.patch_size,
            stem="mmearth" if isinstance(like.stem, MMEarthStem) else "convnext",
            grn_eps=like.grn_eps,
            drop_path_rate=drop_path_rate,
        )
    names = unet.encoder.state_dict().keys()
    unet.encoder.load_state_dict({name: value for name, value in like.state_dict().items() if name in names})
    if like.stem_padding != unet.encoder.stem_padding:
        _LOG.warning(
            "%s: its stem pads %r, that of the U-Net %r: features will differ",
            encoder.label,
            like.stem_padding,
            unet.encoder.stem_padding,
        )
    return unet


class LinearSegmenter(nn.Module):
    """Logits as a linear function of the encoder's features at a pixel: a frozen encoder and 1x1 convolutions.

    The maps of the chosen stages, each layer-normalised at every site (without parameters), enlarged to the image
    (bilinear) and concatenated, go through one 1x1 convolution. It is computed as one convolution per stage on the maps as
    they are, whose results are enlarged and added: the same, at a fraction of the memory. What the encoder gives does not
    change during training, so `encode` is apart from `forward` and can be cached; its result is one vector per window.
    Raises ConfigError for stages that do not exist or come twice.
    """

    def __init__(self, encoder: ImageEncoder, num_classes: int, stages: Sequence[int], seed: int):
        super().__init__()
        known = range(len(encoder.backbone.feature_info))
        if sorted(set(stages)) != sorted(stages) or not set(stages) <= set(known):
            raise ConfigError(
                f"segmentation.stages = {list(stages)}: expected different numbers within 0..{known[-1]}, such as "
                f"[{known[-1]}] for the last stage alone"
            )
        self.num_classes, self.stages = num_classes, sorted(stages)
        self.encoder = encoder.requires_grad_(False).eval()
        self._sides: tuple[tuple[int, int], ...] | None = None
        self._image_side = 0
        self._channels = [encoder.backbone.feature_info[stage]["num_chs"] for stage in self.stages]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.convs = nn.ModuleList(nn.Conv2d(channels, num_classes, 1, bias=False) for channels in self._channels)
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def train(self, mode: bool = True) -> "LinearSegmenter":
        """As for any module, but the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The normalised maps of images [M, B, S, S] as one row [M, F] each, in the stages' order; on the CPU.

        Every call has the same S, which `forward` then takes too.
        """
        maps = self.encoder.maps(images.to(self.bias.device), self.stages)
        # every call sets the same: safe from several threads
        self._image_side, self._sides = images.shape[-1], tuple(tuple(m.shape[2:]) for m in maps)
        normalised = [F.layer_norm(m.permute(0, 2, 3, 1).float(), m.shape[1:2], eps=NORM_EPS) for m in maps]
        return torch.cat([m.permute(0, 3, 1, 2).flatten(1) for m in normalised], 1).cpu()

    def forward(self, features: Tensor) -> Tensor:
        """Logits [M, K, S, S] for rows [M, F] of `encode`."""
        assert self._sides is not None, "encode comes first"
        sizes = [channels * h * w for channels, (h, w) in zip(self._channels, self._sides, strict=True)]
        size = (self._image_side, self._image_side)
        logits = self.bias[:, None, None]
        for part, side, conv in zip(features.split(sizes, 1), self._sides, self.convs, strict=True):
            scores = conv(part.unflatten(1, (-1, *side)))
            logits = logits + (scores if side == size else F.interpolate(scores, size, mode="bilinear"))
        return logits
