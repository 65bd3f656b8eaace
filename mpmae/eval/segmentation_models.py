"""Models of segmentation: a decoder on an encoder, and a linear layer on the maps of one that stays frozen.

Shapes: M windows, B input bands, S image side in pixels, K classes, C_s channels and h_s sites on a side of stage s,
F features of a window.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.errors import ConfigError
from mpmae.eval.image_encoder import ImageEncoder, architecture_of, copy_weights
from mpmae.models.dense import NORM_EPS, SPARSE_GRN_EPS, Block, initialise_dense
from mpmae.models.multimae.backbone import NUM_STAGES
from mpmae.models.unet import UNet

_SITES_SIDE, _NUM_BLOCKS = 4, 4
_LOG = logging.getLogger(__name__)


def unet_on(encoder: ImageEncoder, num_classes: int, seed: int, drop_path_rate: float = 0.0) -> UNet:
    """A U-Net whose encoder has the weights of `encoder`; its decoder starts with random ones drawn from `seed`.

    Its stem pads "same" whatever that of `encoder` does, as the published U-Net. A difference is logged.
    """
    like = encoder.backbone
    with _seeded(seed):
        unet = UNet(num_classes=num_classes, drop_path_rate=drop_path_rate, **architecture_of(like))
    copy_weights(like, unet.encoder)
    if like.stem_padding != unet.encoder.stem_padding:
        theirs, ours = like.stem_padding, unet.encoder.stem_padding
        _LOG.warning("%s: its stem pads %r, that of the U-Net %r: features will differ", encoder.label, theirs, ours)
    return unet


class TokenSegmenter(nn.Module):
    """Logits from the last tokens of a MultiMAE: those of all its domains at a patch become 4 x 4 sites, then ConvNeXt V2
    blocks, a 1x1 convolution, and enlarging to the image (bilinear).

    The encoder has the weights of `encoder`; what follows starts with random ones drawn from `seed`.
    Source: MultiMAE (arXiv 2204.01678), `ConvNeXtAdapter` in `output_adapters.py`; its blocks are ConvNeXt's, without GRN,
    and its width is the same half of the encoder's.
    """

    def __init__(self, encoder: ImageEncoder, num_classes: int, seed: int, drop_path_rate: float = 0.0):
        super().__init__()
        self.encoder = encoder.trunk(drop_path_rate)
        width = self.encoder.num_features // 2
        self._factor = min(_SITES_SIDE, self.encoder.patch_size)
        self.proj = nn.Conv2d(self.encoder.feature_info[-1]["num_chs"], width * self._factor**2, 1)
        self.blocks = nn.Sequential(*(Block(width, SPARSE_GRN_EPS, 0.0) for _ in range(_NUM_BLOCKS)))
        self.head = nn.Conv2d(width, num_classes, 1)
        with _seeded(seed):
            for part in (self.proj, self.blocks, self.head):
                initialise_dense(part)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [M, K, S, S] for images [M, B, S, S]."""
        (tokens,) = self.encoder.forward_intermediates(image, (NUM_STAGES - 1,), intermediates_only=True)
        x = F.pixel_shuffle(self.proj(tokens), self._factor)
        return F.interpolate(self.head(self.blocks(x)), image.shape[2:], mode="bilinear")


class LinearSegmenter(nn.Module):
    """Logits as a linear function of the features at a pixel: a frozen encoder and 1x1 convolutions.

    The maps of the chosen stages (of a MultiMAE: after quarters of its blocks, the domains one after the other), each
    layer-normalised at every site (without parameters; domain by domain), are enlarged to the image (bilinear),
    concatenated, and go through one 1x1 convolution. What the encoder gives does not change during training:
    `encode` is apart from `forward`, and its result, one row per window, can be kept. The encoder stays in evaluation mode.
    Raises ConfigError for stages that do not exist or come twice.
    """

    def __init__(self, encoder: ImageEncoder, num_classes: int, stages: Sequence[int], seed: int):
        super().__init__()
        info = encoder.backbone.feature_info
        num_stages = len(info)
        if len(set(stages)) < len(stages) or not set(stages) <= set(range(num_stages)):
            raise ConfigError(
                f"segmentation.stages = {list(stages)}: expected different numbers within 0..{num_stages - 1}, such as "
                f"[{num_stages - 1}] for the last stage alone"
            )
        self.stages = sorted(stages)
        self.encoder = encoder.trunk().requires_grad_(False).eval()
        self._num_parts = [info[stage].get("num_parts", 1) for stage in self.stages]
        with _seeded(seed):
            self.head = LinearHead([info[stage]["num_chs"] for stage in self.stages], num_classes)
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
            normed = [_normed(m, parts).flatten(1) for m, parts in zip(maps, self._num_parts, strict=True)]
            return torch.cat(normed, 1).cpu()

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


def _normed(features: Tensor, num_parts: int) -> Tensor:
    """[M, C, h, w] layer-normalised at every site, each of `num_parts` parts of the channels by itself."""
    parts = features.unflatten(1, (num_parts, -1)).movedim(2, -1)
    return F.layer_norm(parts, parts.shape[-1:], eps=NORM_EPS).movedim(-1, 2).flatten(1, 2)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights of a seed, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
