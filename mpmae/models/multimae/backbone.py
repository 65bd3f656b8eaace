"""The encoder of a MultiMAE for downstream use: images whose channels are the bands of some of its input domains.

Shapes: N images, K domains, C channels (the bands of the domains one domain after the other, one channel for class ids),
S image side in pixels, G patches on a side, L = G*G patches, E width.
Source: MultiMAE (arXiv 2204.01678), `LinearOutputAdapter` in `output_adapters.py`, `optim_factory.py`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmae.domains import Domain
from mpmae.loader.batch import Batch
from mpmae.models.dense import initialise_dense
from mpmae.models.multimae.adapters import adapter_of
from mpmae.models.multimae.checks import domain_subset, known_full
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.positions import positions, sincos_table, table_side
from mpmae.models.multimae.views import View, patches_of, view_of
from mpmae.models.multimae.vit import NORM_EPS, Block

POOLINGS = ("mean", "global")
NUM_STAGES = 4


class Tokens(NamedTuple):
    """What comes out of a block.

    patches: [N, K, L, E]. available: bool [N, K, L], False for patches without data, which nothing attended and whose
    features say nothing. summary: [N, E], the global token.
    """

    patches: Tensor
    available: Tensor
    summary: Tensor


class DroppedBlock(Block):
    """A transformer block with stochastic depth: in training each residual is left out with the chance `drop_path_rate`."""

    def __init__(self, dim: int, num_heads: int, drop_path_rate: float):
        super().__init__(dim, num_heads)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[N, L, D]; `real` as in `attend`."""
        if not self.training or self.drop_path_rate == 0:
            return super().forward(x, real)
        x = x + self._dropped(self.attn(self.norm1(x), real))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, y: Tensor) -> Tensor:
        kept = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path_rate
        return y * (kept / (1 - self.drop_path_rate)).to(y.dtype)


class MultiMAEBackbone(nn.Module):
    """Input adapters of some domains and the ViT: an image in, the tokens of its patches out.

    domains: in the order of the channels. Images may have any side that is a multiple of patch_size: positions are fixed
    and resized. NaN in an image is no data: a patch of nothing else is attended by none and pooled nowhere. drop_path_rate:
    of the last block; it grows linearly from 0 at the first. reference_quirks: as of the model that the weights are from.
    Names of the parameters are those of `MultiMAE`.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        dim: int,
        depth: int,
        num_heads: int,
        *,
        patch_size: int,
        drop_path_rate: float = 0.0,
        reference_quirks: bool = False,
    ):
        super().__init__()
        self.domains, self.patch_size, self.reference_quirks = tuple(domains), patch_size, reference_quirks
        self.num_channels = [len(domain.bands) or 1 for domain in self.domains]
        self.in_chans = sum(self.num_channels)
        self.num_features = dim
        self.input_adapters = nn.ModuleDict({d.name: adapter_of(d, dim, patch_size) for d in self.domains})
        self.register_buffer("table", sincos_table(dim, table_side(patch_size)), persistent=False)
        self.global_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.encoder = nn.ModuleList(DroppedBlock(dim, num_heads, rate) for rate in rates)
        num_domains = len(self.domains)
        info = {"num_chs": dim * num_domains, "reduction": patch_size, "num_parts": num_domains}
        self.feature_info = [{**info, "module": f"encoder.{last}"} for last in self._last_blocks()]

    @property
    def num_layers(self) -> int:
        """The depth of what follows the last block; see `layer_depth`."""
        return len(self.encoder) + 1

    def layer_depth(self, name: str) -> int:
        """How deep a parameter lies: adapters and global token 0, block i at i + 1, the rest behind the last block."""
        first, _, rest = name.partition(".")
        if first == "encoder":
            return int(rest.partition(".")[0]) + 1
        return 0 if first in ("input_adapters", "global_tokens") else self.num_layers

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed though they have several dimensions: global token, class embeddings."""
        classes = {f"input_adapters.{domain.name}.class_emb.weight" for domain in self.domains if domain.num_classes}
        return {"global_tokens", *classes}

    def forward_tokens(self, image: Tensor, stages: Sequence[int] = (NUM_STAGES - 1,)) -> list[Tokens]:
        """The tokens of an image [N, C, S, S] at the end of each wanted quarter of the blocks, 0 to 3.

        Channels: normalised values, or class ids as numbers; NaN where there is no data. Raises ValueError for an image
        that does not fit.
        """
        self._check(image)
        views, side = self._views(image), image.shape[-1] // self.patch_size
        flags = [view.valid if view.valid.ndim == 4 else view.valid[:, None] for view in views]
        available = torch.stack([patches_of(flag, side).any(2) for flag in flags], 1)
        x = torch.cat([*self._embedded(views, side), self.global_tokens.expand(len(image), -1, -1)], 1)
        real = None if known_full(available) else F.pad(available.flatten(1), (0, 1), value=True)
        ends, outputs = self._last_blocks(), {}
        for number, block in enumerate(self.encoder):
            x = block(x, real)
            outputs |= {number: x} if number in ends else {}
        found = [outputs[ends[stage]] for stage in stages]
        shape = (len(self.domains), side * side)
        return [Tokens(out[:, :-1].unflatten(1, shape), available, out[:, -1]) for out in found]

    def pooled(self, image: Tensor, pooling: str) -> Tensor:
        """One vector [N, E] for each image [N, C, S, S].

        pooling: "mean": over the tokens of all patches with data and the global token, as MultiMAE's fine-tuning does;
        "global": the global token.
        """
        (tokens,) = self.forward_tokens(image)
        if pooling == "global":
            return tokens.summary
        there = tokens.available.flatten(1)[..., None]
        total = torch.where(there, tokens.patches.flatten(1, 2), 0).sum(1) + tokens.summary
        return total / (there.sum(1) + 1)

    def forward_intermediates(
        self, image: Tensor, indices: Sequence[int] | None = None, intermediates_only: bool = True
    ) -> list[Tensor]:
        """Maps [N, K*E, G, G], the domains one after the other, at the end of each wanted quarter of the blocks.

        0 where a patch has no data. indices: None for all four; in ascending order.
        """
        assert intermediates_only
        side = image.shape[-1] // self.patch_size
        maps = []
        for tokens in self.forward_tokens(image, range(NUM_STAGES) if indices is None else indices):
            patches = torch.where(tokens.available[..., None], tokens.patches, 0)
            maps.append(patches.permute(0, 1, 3, 2).flatten(1, 2).unflatten(2, (side, side)))
        return maps

    def _last_blocks(self) -> list[int]:
        """The last block of each quarter."""
        depth = len(self.encoder)
        return [math.ceil(depth * (stage + 1) / NUM_STAGES) - 1 for stage in range(NUM_STAGES)]

    def _check(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != self.in_chans:
            names = ", ".join(f"{d.name} ({num})" for d, num in zip(self.domains, self.num_channels, strict=True))
            raise ValueError(f"image of shape {list(image.shape)}: expected [N, {self.in_chans}, S, S], channels of {names}")
        if image.shape[2] != image.shape[3] or image.shape[2] % self.patch_size:
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[3]} pixels: expected a square whose side is a multiple of "
                f"patch_size = {self.patch_size}; crop, pad or resize it"
            )

    def _views(self, image: Tensor) -> list[View]:
        dtype = torch.float64 if self.global_tokens.dtype == torch.float64 else torch.float32
        ids, views = torch.arange(len(image), device=image.device), []
        for domain, part in zip(self.domains, image.split(self.num_channels, 1), strict=True):
            valid = part.isfinite()
            values = torch.where(valid, part, -1).round().long() if domain.num_classes else part
            batch = Batch({domain.modality: values}, {domain.modality: valid}, ids, {}, len(image))
            views.append(view_of(domain, batch, None, dtype, self.reference_quirks))
        return views

    def _embedded(self, views: Sequence[View], side: int) -> list[Tensor]:
        tokens = []
        for adapter, view in zip(self.input_adapters.values(), views, strict=True):
            values = view.values.to(self.global_tokens.dtype) if view.values.is_floating_point() else view.values
            tokens.append(adapter(values) + positions(self.table, side, adapter.position_mode))
        return tokens


class MultiMAEViT(MultiMAEBackbone):
    """The backbone with pooling, a final LayerNorm and, with `num_classes` > 0, a linear classifier.

    pooling: see `MultiMAEBackbone.pooled`. The rest as there.
    """

    def __init__(self, *args, pooling: str = "mean", num_classes: int = 0, **options):
        super().__init__(*args, **options)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling = {pooling!r}: expected one of {', '.join(POOLINGS)}")
        self.pooling = pooling
        self.norm = nn.LayerNorm(self.num_features, eps=NORM_EPS)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier with random weights; none with `num_classes` = 0."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = self.norm.weight
            self.head = nn.Linear(self.num_features, num_classes).to(like.device, like.dtype)
            initialise_dense(self.head)

    def forward_vector(self, image: Tensor) -> Tensor:
        """The pooled vector [N, E] of images [N, C, S, S], not normalised."""
        return self.pooled(image, self.pooling)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, num_classes], or normed vectors [N, E] without classes, for images [N, C, S, S]."""
        return self.head(self.norm(self.forward_vector(image)))


def vit_of(
    model: MultiMAE, domains: Sequence[str], *, pooling: str = "mean", num_classes: int = 0, drop_path_rate: float = 0.0
) -> MultiMAEViT:
    """The encoder of `model` for some of its input domains, with copies of its weights; norm and classifier are fresh.

    The domains come in the model's order, whatever theirs. Raises ConfigError for one that is no input of the model.
    """
    names = domain_subset(model, domains)
    vit = MultiMAEViT(
        [model.domains_in[name] for name in names],
        model.global_tokens.shape[-1],
        len(model.encoder),
        model.encoder[0].attn.num_heads,
        patch_size=model.patch_size,
        pooling=pooling,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        reference_quirks=model.reference_quirks,
    )
    vit.to(model.global_tokens)
    own, state = vit.state_dict(), model.state_dict()
    vit.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    return vit
