"""What evaluations take for an encoder: images in, feature vectors or maps out, whatever the model behind.

Shapes: N images, B input channels, S image side in pixels, D features, C_s channels and h_s sites on a side of stage s.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpmae.eval.encoder_input import EncoderInput
from mpmae.models.dense import Backbone, ConvNeXtV2, MMEarthStem


class ImageEncoder(nn.Module):
    """A dense ConvNeXt V2 of Sentinel-2 bands, or a MultiMAE (`mpmae.eval.multimae_encoder`), with what it takes as input.

    backbone: without a classifier. input: see `EncoderInput`. label: what it is, for tables. The feature vector of a
    ConvNeXt V2 is the mean of the last stage's map over its sites: the backbone's final norm follows the pooling and is
    fresh after pretraining, so it takes no part.
    """

    def __init__(self, backbone: nn.Module, encoder_input: EncoderInput, label: str):
        super().__init__()
        self.backbone, self.input, self.label = backbone, encoder_input, label

    @property
    def num_features(self) -> int:
        """D."""
        return self.backbone.num_features

    @property
    def facts(self) -> dict[str, Any]:
        """What is read and how it becomes a vector, as plain data."""
        return {"pooling": "mean over the sites of the last map"}

    def forward(self, image: Tensor) -> Tensor:
        """Feature vectors [N, D] for prepared images [N, B, S, S]."""
        return self.backbone.forward_features(image).mean((2, 3))

    def maps(self, image: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """The maps [N, C_s, h_s, h_s] of the chosen stages (None: all four), finest first."""
        return self.backbone.forward_intermediates(image, stages, intermediates_only=True)

    def fingerprint(self) -> str:
        """A hash of weights and input, under which features can be kept."""
        digest = hashlib.sha256(repr((*self._about, self.input)).encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()

    @property
    def decoder_method(self) -> str:
        """The `segmentation.method` whose decoder is made for its maps."""
        return "unet"

    def trunk(self, drop_path_rate: float = 0.0) -> nn.Module:
        """A copy of the backbone without what follows its last map; see `forward_intermediates` and `feature_info` there."""
        like = self.backbone
        trunk = Backbone(stem_padding=like.stem_padding, drop_path_rate=drop_path_rate, **architecture_of(like))
        copy_weights(like, trunk)
        return trunk

    @property
    def _about(self) -> tuple:
        """What features depend on beside weights and input."""
        return self.backbone.patch_size, self.backbone.stem_padding


def architecture_of(like: ConvNeXtV2) -> dict[str, Any]:
    """The options of a ConvNeXt V2 of the same architecture, but stem_padding and drop_path_rate."""
    return {
        "dims": [info["num_chs"] for info in like.feature_info],
        "depths": [len(stage) for stage in like.stages],
        "in_chans": like.in_chans,
        "patch_size": like.patch_size,
        "stem": "mmearth" if isinstance(like.stem, MMEarthStem) else "convnext",
        "grn_eps": like.grn_eps,
    }


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """The weights that `target` has a name for; what `source` has beyond, such as a final norm, stays behind."""
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()})
