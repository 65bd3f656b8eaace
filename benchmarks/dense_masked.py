"""The other way to a sparse encoder, the baseline: the dense grid, with what is hidden set to 0 after each operator.

It computes what the sparse model computes, in PyTorch's own operators: on a GPU cuDNN's depthwise convolution on
channels-last maps, everything else for `torch.compile` to fuse. Source of the idea: Tian et al., "Designing BERT for
convolutional networks" (SparK), arXiv 2301.03580.

Shapes: N samples, B bands, S image side, G patches and H sites on a side, V visible patches of L, M = L - V hidden ones,
C channels, D channels of the decoder.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.kernels import hidden_patches, pack_sites
from mpmae.loader.batch import Batch
from mpmae.modalities import spec_of
from mpmae.models import losses
from mpmae.models.blocks import NORM_EPS, fill_hidden, pack_patches
from mpmae.models.decoder import DECODER_GRN_EPS
from mpmae.models.encoder import ENCODER_GRN_EPS, shown_pixels
from mpmae.models.mpmae import INPUT, MPMAE

Function = Callable[..., Tensor]


def depthwise(x: Tensor, shown: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """7x7 convolution [N, H, H, C] of `x` [N, H, H, C]; `shown` [N, H, H, 1] is 0 at hidden sites, None when none is."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return _show(y.permute(0, 2, 3, 1), shown)


def pointwise(residual: Tensor, y: Tensor, shown: Tensor | None, weights: tuple[Tensor, ...], grn_eps: float) -> Tensor:
    """The rest of a block; weights: of LayerNorm, Linear, GRN and Linear, each with its bias. GRN's scope is the sample."""
    norm_weight, norm_bias, weight1, bias1, gamma, beta, weight2, bias2 = weights
    y = _show(F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, NORM_EPS), shown)
    h = _show(F.gelu(F.linear(y, weight1, bias1)), shown)
    norm = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True, dtype=torch.promote_types(h.dtype, torch.float32))
    factor = 1 + gamma * (norm / (norm.mean(-1, keepdim=True) + grn_eps))
    h = _show(torch.addcmul(beta.to(h.dtype), h, factor.to(h.dtype)), shown)
    return residual + _show(F.linear(h, weight2, bias2), shown)


def block(x: Tensor, shown: Tensor | None, weights: tuple[Tensor, ...], grn_eps: float) -> Tensor:
    """A ConvNeXt V2 block on maps [N, H, H, C]; weights as `block_weights` gives them."""
    return pointwise(x, depthwise(x, shown, *weights[:2]), shown, weights[2:], grn_eps)


def downsample(x: Tensor, shown: Tensor, shown_out: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """LayerNorm and a 2x2 convolution of stride 2: [N, H/2, H/2, C_out] from [N, H, H, C]."""
    norm_weight, norm_bias, weight, bias = weights
    x = _show(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, NORM_EPS), shown)
    return _show(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1), shown_out)


def stem(image: Tensor, shown: Tensor, shown_out: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """Maps [N, 8G, 8G, C] of `image` [N, B, S, S]; shown: [N, S, S, 1], shown_out: [N, 8G, 8G, 1]."""
    conv, conv_bias, conv_norm, conv_norm_bias, pool, pool_bias, norm, norm_bias = weights
    x = _show(image.permute(0, 2, 3, 1), shown).permute(0, 3, 1, 2)
    x = _show(F.conv2d(x, conv, conv_bias, padding=1).permute(0, 2, 3, 1), shown)
    x = _show(F.gelu(F.layer_norm(x, x.shape[-1:], conv_norm, conv_norm_bias, NORM_EPS)), shown).permute(0, 3, 1, 2)
    x = F.conv2d(x, pool, pool_bias, stride=pool.shape[-1], groups=len(pool)).permute(0, 2, 3, 1)
    return _show(F.layer_norm(_show(x, shown_out), x.shape[-1:], norm, norm_bias, NORM_EPS), shown_out)


def _show(x: Tensor, shown: Tensor | None) -> Tensor:
    return x if shown is None else x * shown.to(x.dtype)


def pair_weights(*layers: nn.Module) -> tuple[Tensor, ...]:
    """Weight and bias of each layer."""
    return tuple(tensor for layer in layers for tensor in (layer.weight, layer.bias))


def stem_weights(part: nn.Module) -> tuple[Tensor, ...]:
    """The parameters of the stem of a dense encoder, in the order of `stem`."""
    return pair_weights(part.conv, part.conv_norm, part.pool, part.norm)


def block_weights(part: nn.Module) -> tuple[Tensor, ...]:
    """The parameters of a block of the model, in the order of `block`."""
    before = pair_weights(part.dwconv, part.norm, part.pwconv1)
    return *before, part.grn.gamma, part.grn.beta, *pair_weights(part.pwconv2)


def shown_sites(visible: Tensor, num_patches_side: int, tile_side: int) -> Tensor:
    """1 at the sites of visible patches and 0 elsewhere: bool [N, H, H, 1], H = num_patches_side * tile_side."""
    return shown_pixels(visible, num_patches_side, tile_side)[:, :, :, None]


class DenseMasked(nn.Module):
    """The training forward of a model built with encoder="dense" and stem="mmearth", every operator masked.

    wrap: applied to stem, block, downsampling and losses, for instance to compile each.
    """

    def __init__(self, model: MPMAE, wrap: Callable[[Function], Function] = lambda function: function):
        super().__init__()
        self.model = model
        self.stem, self.block, self.downsample, self.losses = map(wrap, (stem, block, downsample, self.loss_of))

    def encode(self, image: Tensor, visible: Tensor) -> Tensor:
        """The last map [N, G, G, C], 0 at hidden patches, of `image` [N, B, S, S]."""
        encoder, side = self.model.encoder, self.model.num_patches_side
        shown = shown_sites(visible, side, 8)
        x = self.stem(image, shown_sites(visible, side, self.model.patch_size), shown, stem_weights(encoder.stem))
        for stage, blocks in enumerate(encoder.stages):
            if stage:
                finer, shown = shown, shown_sites(visible, side, 8 >> stage)
                part = encoder.downsamples[stage - 1]
                x = self.downsample(x, finer, shown, pair_weights(part.norm, part.conv))
            for part in blocks:
                x = self.block(x, shown, block_weights(part), ENCODER_GRN_EPS)
        return x

    def forward(self, batch: Batch, visible: Tensor) -> Tensor:
        """The loss of a batch without gaps, a scalar."""
        model, side = self.model, self.model.num_patches_side
        x = self.encode(self.image(batch), visible).flatten(1, 2)
        sample = torch.arange(len(visible), device=visible.device)[:, None] * model.num_patches
        tokens = pack_sites(x.unflatten(1, (side, side)), visible + sample)
        x = fill_hidden(model.decoder.proj(tokens), visible, model.decoder.mask_token, model.num_patches)
        x = x.unflatten(1, (side, side))
        for part in model.decoder.blocks:
            x = self.block(x, None, block_weights(part), DECODER_GRN_EPS)
        return self.losses(x.flatten(1, 2), batch, hidden_patches(visible, model.num_patches))

    def image(self, batch: Batch) -> Tensor:
        """The bands that the encoder reads, [N, B, S, S]."""
        values, selection = batch.values[INPUT], self.model.select_in
        return values if selection is None else values.index_select(1, selection)

    def loss_of(self, grid: Tensor, batch: Batch, hidden: Tensor) -> Tensor:
        """The weighted loss, a scalar, from the decoder's output `grid` [N, L, D] and `hidden` int64 [N, M]."""
        model = self.model
        sample = torch.arange(len(hidden), device=hidden.device)[:, None] * model.num_patches
        features = pack_sites(grid.unflatten(1, (model.num_patches_side, -1)), hidden + sample)
        predictions = {name: head(features) for name, head in model.heads.pixel.items()}
        if model.heads.tile:
            pooled = model.heads.tile_norm(grid).mean(1)
            predictions |= {name: head(pooled) for name, head in model.heads.tile.items()}
        shares = {}
        for name in model.modalities_out:
            target, valid = self._target(batch, name, hidden)
            shares[name] = losses.modality_share(
                spec_of(name),
                predictions[name],
                target,
                valid,
                ~batch.padding,
                num_present=batch.num_present[name],
                global_batch_size=batch.global_batch_size,
                norm_pix=model.norm_pix_loss,
                quirks=False,
            )
        return losses.weigh(
            shares,
            model.log_vars,
            ~batch.padding,
            num_present=batch.num_present,
            global_batch_size=batch.global_batch_size,
            quirks=False,
        )

    def _target(self, batch: Batch, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        values, valid, selection = batch.values[name], batch.valid[name], getattr(self.model, f"select_{name}")
        if selection is not None:
            values, valid = (t.index_select(1, selection) for t in (values, valid))
        if spec_of(name).scope == "pixel":
            values, valid = (pack_patches(t, hidden, self.model.patch_size).flatten(2) for t in (values, valid))
        return values, valid
