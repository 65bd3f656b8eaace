"""Dense ConvNeXt V2: what a pretrained encoder becomes downstream. This file needs PyTorch and nothing else.

Its parameters have the names and shapes of MP-MAE's sparse encoder, so the weights load as they are. Calling conventions
(`forward_features`, `forward_head`, `forward_intermediates`, `feature_info`, ...) are those of timm's models.

Shapes: N images, B input channels, H and W image sides in pixels, p patch size in pixels, C_s channels of stage s (C = C_3),
h_s and w_s sites on the sides of its map: H and W divided by p/8, p/4, p/2, p (the "reference" stem gives a few sites less).
Source: Woo et al., "ConvNeXt V2", arXiv 2301.00808; the stem: Nedungadi et al., "MMEarth", arXiv 2405.02771, section 4, and
MMEarth-train, `models/convnextv2.py`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_STAGES = 4
FIRST_TILE_SIDE = 8  # sites on a side of a patch in the first stage
NORM_EPS = 1e-6
SPARSE_GRN_EPS = 1e-6
REFERENCE_GRN_EPS = 1e-4
STEM_PADDINGS = ("same", "reference")


def grid_side(side: int, patch_size: int, stem: str = "mmearth", stem_padding: str = "same") -> int:
    """Sites on a side of the last stage's map for an image `side` in pixels."""
    stride = patch_size // FIRST_TILE_SIDE
    if stem == "mmearth" and stem_padding == "reference":
        side = side - 2 + 2 * (stride // 2)
    return side // stride // FIRST_TILE_SIDE


def initialise_dense(module: nn.Module) -> None:
    """Fills convolutions and linear layers below `module` with spread 0.02 and bias 0, as the published dense model.

    A normal distribution: the published cut at -2 and 2 lies 100 spreads off, and `trunc_normal_` would now and then return
    the cut itself.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [N, C, H, W]; what comes out lies channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised map [N, C, H, W]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation per sample: h + gamma * (h * Nx) + beta, Nx = G / (mean of G over channels + eps).

    G is the L2 norm of a channel over all sites of a sample, in float32 at least. gamma, beta: [1, D].
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim))
        self.beta = nn.Parameter(torch.zeros(1, dim))
        self.eps = eps

    def forward(self, h: Tensor) -> Tensor:
        """[N, H, W, D] from [N, H, W, D]."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        norm = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True, dtype=dtype)
        factor = 1 + self.gamma * (norm / (norm.mean(-1, keepdim=True) + self.eps))
        return torch.addcmul(self.beta.to(h.dtype), h, factor.to(h.dtype))


class Block(nn.Module):
    """ConvNeXt V2 block: depthwise 7x7, LayerNorm, Linear, GELU, GRN, Linear, residual with stochastic depth."""

    def __init__(self, dim: int, grn_eps: float, drop_path_rate: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim, grn_eps)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] from [N, C, H, W]."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)
        if self.training and self.drop_path_rate > 0:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path_rate
            y = y * (kept / (1 - self.drop_path_rate)).to(y.dtype)
        return x + y


class Downsample(nn.Module):
    """LayerNorm, then a convolution with kernel = stride = 2."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm = ChannelNorm(dim_in, eps=NORM_EPS)
        self.conv = nn.Conv2d(dim_in, dim_out, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_out, H/2, W/2] from [N, C_in, H, W]."""
        return self.conv(self.norm(x))


class MMEarthStem(nn.Module):
    """3x3 convolution at full resolution, LayerNorm, GELU, depthwise convolution of kernel = stride = p/8, LayerNorm."""

    def __init__(self, in_chans: int, dim: int, stride: int, padding: str):
        super().__init__()
        fine, coarse = (1, 0) if padding == "same" else (0, stride // 2)
        self.conv = nn.Conv2d(in_chans, dim, 3, padding=fine)
        self.conv_norm = ChannelNorm(dim, eps=NORM_EPS)
        self.pool = nn.Conv2d(dim, dim, stride, stride=stride, padding=coarse, groups=dim)
        self.norm = ChannelNorm(dim, eps=NORM_EPS)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Two maps from `image` [N, B, H, W]: [N, C_0, H, W] before the pooling and [N, C_0, h_0, w_0]."""
        fine = F.gelu(self.conv_norm(self.conv(image)))
        return [fine, self.norm(self.pool(fine))]


class ConvNextStem(nn.Module):
    """The stem of ConvNeXt: convolution of kernel = stride = p/8, LayerNorm."""

    def __init__(self, in_chans: int, dim: int, stride: int, padding: str):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, stride, stride=stride)
        self.norm = ChannelNorm(dim, eps=NORM_EPS)

    def forward(self, image: Tensor) -> list[Tensor]:
        """One map [N, C_0, h_0, w_0] from `image` [N, B, H, W]."""
        return [self.norm(self.conv(image))]


STEMS = {"mmearth": MMEarthStem, "convnext": ConvNextStem}


class Backbone(nn.Module):
    """Stem and four stages: an image in, a pyramid of maps out.

    dims, depths: channels and blocks of the stages. in_chans: B. patch_size: p, 8 times a whole number. stem: "mmearth" or
    "convnext". stem_padding: "same" equals the sparse encoder with every patch visible; "reference" is the published dense
    model, whose 3x3 convolution does not pad and whose pooling pads p/16 (it changes stem "mmearth" only). grn_eps: None is
    1e-6, as in pretraining, or 1e-4 with stem_padding "reference". drop_path_rate: chance to skip the last block in
    training; it grows linearly from 0 at the first. Raises ValueError for what does not fit, and so does the forward pass.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        in_chans: int,
        patch_size: int,
        stem: str = "mmearth",
        stem_padding: str = "same",
        grn_eps: float | None = None,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(dims) != NUM_STAGES or len(depths) != NUM_STAGES:
            raise ValueError(f"dims = {list(dims)}, depths = {list(depths)}: expected one number for each of four stages")
        if patch_size <= 0 or patch_size % FIRST_TILE_SIDE:
            raise ValueError(
                f"patch_size = {patch_size}: expected a multiple of 8, since the stem's stride is patch_size / 8"
            )
        for key, value, known in (("stem", stem, tuple(STEMS)), ("stem_padding", stem_padding, STEM_PADDINGS)):
            if value not in known:
                raise ValueError(f"{key} = {value!r}: expected one of {', '.join(known)}")
        if grn_eps is None:
            grn_eps = REFERENCE_GRN_EPS if stem_padding == "reference" else SPARSE_GRN_EPS
        self.in_chans, self.patch_size, self.stem_padding, self.grn_eps = in_chans, patch_size, stem_padding, grn_eps
        self.grad_checkpointing = False
        self.stem = STEMS[stem](in_chans, dims[0], patch_size // FIRST_TILE_SIDE, stem_padding)
        self.downsamples = nn.ModuleList(Downsample(*pair) for pair in pairwise(dims))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, grn_eps, next(rates)) for _ in range(depth))
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage // FIRST_TILE_SIDE, "module": f"stages.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        initialise_dense(self)

    def forward_stem(self, image: Tensor) -> list[Tensor]:
        """The stem's maps for a checked `image` [N, B, H, W], finest first; the last, [N, C_0, h_0, w_0], feeds stage 0."""
        if image.ndim != 4 or image.shape[1] != self.in_chans:
            raise ValueError(
                f"image of shape {list(image.shape)}: expected [N, {self.in_chans}, H, W], one channel per band"
            )
        if self.stem_padding == "same" and (image.shape[2] % self.patch_size or image.shape[3] % self.patch_size):
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[3]} pixels: both sides must be multiples of patch_size = "
                f"{self.patch_size}; crop, pad or resize it"
            )
        return self.stem(image)

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        """The map [N, C_s, h_s, w_s] of a stage from that of the one before it (of the stem for stage 0)."""
        if stage:
            x = self.downsamples[stage - 1](x)
        for block in self.stages[stage]:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map [N, C, h, w] for images [N, B, H, W]: neither pooled nor normalised."""
        x = self.forward_stem(x)[-1]
        for stage in range(NUM_STAGES):
            x = self.forward_stage(stage, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """(last map, maps of the wanted stages in their order) for images [N, B, H, W].

        indices: None for all four stages, a number for the last so many, or stages (negative: from the end). stop_early: end
        with the last wanted stage, whose map then comes first. intermediates_only: the list alone. norm changes nothing: as
        in timm's ConvNeXt, the final norm follows the pooling. Raises ValueError for other indices or another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt = {output_fmt!r}: a convolutional model gives NCHW only")
        wanted = _stages(indices)
        x, maps = self.forward_stem(x)[-1], []
        for stage in range(max(wanted) + 1 if stop_early else NUM_STAGES):
            x = self.forward_stage(stage, x)
            if stage in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether to compute each block again in the backward pass instead of keeping what it needs."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        """Patterns that order the parameters by depth, for timm's layer-wise learning rates; `coarse`: by stage."""
        depth = () if coarse else (0,)
        downsamples = [(rf"^downsamples\.{i}", (i + 1, *depth)) for i in range(NUM_STAGES - 1)]
        return {
            "stem": r"^stem",
            "blocks": [*downsamples, (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None)],
        }

    def no_weight_decay(self) -> set[str]:
        """No names: biases and norms are known by their single dimension, and GRN is decayed, as published."""
        return set()


class ConvNeXtV2(Backbone):
    """The backbone with pooling, a final LayerNorm and, with `num_classes` > 0, a linear classifier.

    Arguments as for `Backbone`; a sparse encoder's state dict lacks `norm` (and `head`) alone.
    """

    def __init__(self, dims: Sequence[int], depths: Sequence[int], *, num_classes: int = 0, **options):
        super().__init__(dims, depths, **options)
        self.norm = nn.LayerNorm(self.num_features, eps=NORM_EPS)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier with random weights; none with `num_classes` = 0."""
        if num_classes < 0:
            raise ValueError(f"num_classes = {num_classes}: expected 0 (features only) or more")
        self.num_classes = num_classes
        like = self.norm.weight
        self.head = nn.Linear(self.num_features, num_classes).to(like.device, like.dtype) if num_classes else nn.Identity()
        initialise_dense(self.head)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [N, num_classes] for a map [N, C, h, w]; normed features [N, C] with `pre_logits` or without classes."""
        x = self.norm(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes], or normed features [N, C] without classes, for images [N, B, H, W]."""
        return self.forward_head(self.forward_features(x))


def _stages(indices: int | Sequence[int] | None) -> set[int]:
    if indices is None:
        indices = NUM_STAGES
    if isinstance(indices, int):
        if not 1 <= indices <= NUM_STAGES:
            raise ValueError(f"indices = {indices}: as a number it means the last so many stages, 1 to {NUM_STAGES}")
        return set(range(NUM_STAGES - indices, NUM_STAGES))
    wrong = [index for index in indices if not -NUM_STAGES <= index < NUM_STAGES]
    if wrong or not indices:
        raise ValueError(
            f"indices = {list(indices)}: expected at least one stage, each within -{NUM_STAGES}..{NUM_STAGES - 1}"
        )
    return {index % NUM_STAGES for index in indices}
