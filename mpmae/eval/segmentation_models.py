"""Models of segmentation: a U-Net on an encoder, and a linear layer on the maps of one that stays frozen.

Shapes: M windows, B input bands, S image side in pixels, K classes, C_s channels and h_s sites on a side of stage s,
F features of a window.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.errors import ConfigError
from mpmae.eval.encoders import ImageEncoder
from mpmae.models import ConvNeXtV2
from mpmae.models.dense import NORM_EPS, Backbone, MMEarthStem
from mpmae.models.unet import UNet

_LOG = logging.getLogger(__name__)


def unet_on(encoder: ImageEncoder, num_classes: int, seed: int, drop_path_rate: float = 0.0) -> UNet:
    """A U-Net whose encoder has the weights of `encoder`; its decoder starts with random ones drawn from `seed`.

    Its stem pads "same" whatever that of `encoder` does, as the published U-Net. A difference is logged.
    """
    like = encoder.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(num_classes=num_classes, drop_path_rate=drop_path_rate, **_architecture(like))
    _copy(like, unet.encoder)
    if like.stem_padding != unet.encoder.stem_padding:
        theirs, ours = like.stem_padding, unet.encoder.stem_padding
        _LOG.warning("%s: its stem pads %r, that of the U-Net %r: features will differ", encoder.label, theirs, ours)
    return unet


class LinearSegmenter(nn.Module):
    """Logits as a linear function of the features at a pixel: a frozen encoder and 1x1 convolutions.

    The maps of the chosen stages, each layer-normalised at every site (without parameters), are enlarged to the image
    (bilinear), concatenated, and go through one 1x1 convolution. What the encoder gives does not change during training:
    `encode` is apart from `forward`, and its result, one row per window, can be kept. The encoder stays in evaluation mode.
    Raises ConfigError for stages that do not exist or come twice.
    """

    def __init__(self, encoder: ImageEncoder, num_classes: int, stages: Sequence[int], seed: int):
        super().__init__()
        like = encoder.backbone
        num_stages = len(like.feature_info)
        if len(set(stages)) < len(stages) or not set(stages) <= set(range(num_stages)):
            raise ConfigError(
                f"segmentation.stages = {list(stages)}: expected different numbers within 0..{num_stages - 1}, such as "
                f"[{num_stages - 1}] for the last stage alone"
            )
        self.stages = sorted(stages)
        self.encoder = Backbone(stem_padding=like.stem_padding, **_architecture(like))
        _copy(like, self.encoder)
        self.encoder.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = LinearHead([like.feature_info[stage]["num_chs"] for stage in self.stages], num_classes)
        self._sides: list[tuple[int, int]] = []
        self._image_size = (0, 0)

    def train(self, mode: bool = True) -> "LinearSegmenter":
        """As for any module, except for the encoder."""
        super().train(mode)
        self.encoder.eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        """The normalised maps of images [M, B, S, S] as rows [M, F] on the CPU, in the order of the stages.

        S is the same in every call, and that of the logits of `forward`. Safe to call from several threads.
        """
        with torch.inference_mode(False), torch.no_grad():
            images = images.to(self.head.bias.device)
            maps = self.encoder.forward_intermediates(images, self.stages, intermediates_only=True)
            self._image_size, self._sides = tuple(images.shape[2:]), [tuple(m.shape[2:]) for m in maps]
            maps = [F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2], eps=NORM_EPS).permute(0, 3, 1, 2) for m in maps]
            return torch.cat([m.flatten(1) for m in maps], 1).cpu()

    def forward(self, features: Tensor) -> Tensor:
        """Logits [M, K, S, S] for rows [M, F] of `encode`."""
        assert self._sides, "encode comes first"
        sizes = [conv.in_channels * h * w for conv, (h, w) in zip(self.head.convs, self._sides, strict=True)]
        parts = features.split(sizes, 1)
        maps = [part.unflatten(1, (-1, *side)) for part, side in zip(parts, self._sides, strict=True)]
        return self.head(maps, self._image_size)


class LinearHead(nn.Module):
    """A 1x1 convolution on maps of several sizes, enlarged and concatenated.

    Computed as one convolution per map whose results are enlarged and added: the same, at a fraction of the memory.
    channels: of each map.
    """

    def __init__(self, channels: Sequence[int], num_classes: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(num, num_classes, 1, bias=False) for num in channels)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.02)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits [M, K, *size] for maps [M, C_s, h_s, w_s]."""
        logits = self.bias[:, None, None]
        for conv, m in zip(self.convs, maps, strict=True):
            scores = conv(m)
            logits = logits + (scores if m.shape[2:] == size else F.interpolate(scores, size, mode="bilinear"))
        return logits


def _architecture(like: ConvNeXtV2) -> dict[str, Any]:
    return {
        "dims": [info["num_chs"] for info in like.feature_info],
        "depths": [len(stage) for stage in like.stages],
        "in_chans": like.in_chans,
        "patch_size": like.patch_size,
        "stem": "mmearth" if isinstance(like.stem, MMEarthStem) else "convnext",
        "grn_eps": like.grn_eps,
    }


def _copy(source: ConvNeXtV2, target: Backbone) -> None:
    """The weights of stem and stages; a final norm and a classifier stay behind."""
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()})
