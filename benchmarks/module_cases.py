"""Stem, downsampling and pixel heads with their losses, forward and backward, as the model calls them.

"mpmae" is what the dispatcher picks, "reference" PyTorch on the packed layout; the baselines are those of `dense_masked`, on
the whole grid. Shapes as in `mpmae.kernels`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import dense_masked
import kernel_cases
import torch
from dense_masked import DenseMasked
from gpu_timing import Run
from kernel_cases import MASK_RATIO, Case, Setting, Way, as_tuple, forced, same
from synthetic import random_visible, synthetic_batch
from torch import Tensor, nn

from mpmae.cost import operators
from mpmae.cost.operators import Work
from mpmae.kernels import hidden_patches, morton_sites, pack_sites, site_index, unpack_sites
from mpmae.modalities import TARGETS, spec_of
from mpmae.models.mpmae import INPUT, MPMAE
from mpmae.models.presets import create_model

PATCH_SIZE = 16
PIXEL_TARGETS = tuple(name for name in TARGETS if spec_of(name).scope == "pixel")


def pixel_model(setting: Setting, size: str, encoder: str = "sparse") -> MPMAE:
    """A model with pixel modalities alone, patches of 16 pixels and weights of the same seed."""
    torch.manual_seed(0)
    decoder_dim = setting.channels or 512
    return create_model(
        f"mpmae_{size}",
        img_size=setting.num_patches_side * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        modalities_out=PIXEL_TARGETS,
        decoder_dim=decoder_dim,
        encoder=encoder,
    ).to(setting.device)


class Side(NamedTuple):
    """A forward and what its gradients are taken of.

    forward: given a wrapper of functions, a call. leaves: of the gradients. grad: of the forward's output. packed: as in
    `Way`.
    """

    forward: Callable[[Callable], Run]
    leaves: list[Tensor]
    grad: Tensor
    packed: Callable[[Any], tuple[Tensor, ...]] = as_tuple

    def run(self, setting: Setting, wrap: Callable[[Callable], Callable] = same) -> Run:
        """Forward and backward under autocast: the gradients of the leaves."""
        forward = self.forward(wrap)

        def call() -> tuple[Tensor, ...]:
            with torch.autocast(setting.device.type, setting.dtype):
                out = forward()
            return torch.autograd.grad(out, self.leaves, self.grad.to(out.dtype))

        return call

    def expected(self) -> tuple[Tensor, ...]:
        """The same without autocast."""
        return self.packed(torch.autograd.grad(self.forward(same)(), self.leaves, self.grad))


def full(x: Tensor) -> Tensor:
    """`x` in float32, unless autocast is to choose."""
    return x if torch.is_autocast_enabled(x.device.type) else x.float()


def under(backend: str | None, run: Run) -> Run:
    """`run` with the ops of the model on this backend."""

    def forced_run() -> tuple[Tensor, ...]:
        with forced(backend):
            return run()

    return forced_run


def two_sided(setting: Setting, work: Work, facts: dict[str, Any], ours: Side, dense: Side) -> Case:
    """The case of a part of the model; the outputs of both sides are gradients in the same order."""
    case = Case(work, dense.expected, facts)
    case.add("mpmae", lambda: Way(under(None, ours.run(setting)), ours=True))
    case.add("reference", lambda: Way(under("reference", ours.run(setting))))
    case.add("dense masked", lambda: Way(dense.run(setting), dense.packed))
    case.add("dense masked, compiled", lambda: Way(dense.run(setting, setting.compiled), dense.packed))
    return case


def stem_case(setting: Setting, size: str) -> Case:
    """The stem of stem="mmearth": gradients of its parameters."""
    model, dense_model = pixel_model(setting, size), pixel_model(setting, size, "dense")
    dense_model.load_state_dict(model.state_dict())
    batch = synthetic_batch(model, setting.samples, setting.device)
    visible = random_visible(setting.samples, model.num_patches, MASK_RATIO, setting.device)
    baseline = DenseMasked(dense_model)
    image = baseline.image(batch)
    places = dense_masked.shown_sites(visible, model.num_patches_side, PATCH_SIZE)
    places_out = dense_masked.shown_sites(visible, model.num_patches_side, 8)
    part = dense_model.encoder.stem

    def dense(wrap: Callable[[Callable], Callable]) -> Run:
        function, weights = wrap(dense_masked.stem), dense_masked.stem_weights(part)
        return lambda: function(image, places, places_out, weights)

    channels, count = model.encoder.stem.conv.out_channels, visible.numel()
    grad = setting.normal(setting.samples, visible.shape[1] * 64, channels)
    index = site_index(visible, model.num_patches_side, morton_sites(8).to(setting.device))
    arguments = (count, PATCH_SIZE, image.shape[1], channels, setting.dtype.itemsize, image.element_size())
    works = operators.stem_forward(*arguments), operators.stem_backward(*arguments)
    facts = {"num_samples": setting.samples, "num_sites": count * 64, "channels": channels}
    ours = Side(
        lambda _: partial(kernel_cases.stem, model.encoder, image, visible), list(model.encoder.stem.parameters()), grad
    )
    grid_grad = unpack_sites(grad, index, model.num_patches_side * 8)
    return two_sided(setting, operators.added(works), facts, ours, Side(dense, list(part.parameters()), grid_grad))


def downsample_case(setting: Setting, size: str, stage: int) -> Case:
    """The downsampling after a stage: gradients of its input and parameters."""
    encoder = pixel_model(setting, size).encoder
    part, side, tile_side = encoder.downsamples[stage], encoder.num_patches_side, 8 >> stage
    visible = random_visible(setting.samples, side**2, MASK_RATIO, setting.device)
    channels, channels_out = part.conv.in_channels, part.conv.out_channels
    num_sites = visible.shape[1] * tile_side**2
    x = setting.normal(setting.samples, num_sites, channels, dtype=setting.dtype).requires_grad_()
    index = site_index(visible, side, morton_sites(tile_side).to(setting.device))
    shown, shown_out = (dense_masked.shown_sites(visible, side, s) for s in (tile_side, tile_side // 2))
    grid = unpack_sites(x.detach(), index, side * tile_side).requires_grad_()

    def dense(wrap: Callable[[Callable], Callable]) -> Run:
        function, weights = wrap(dense_masked.downsample), dense_masked.pair_weights(part.norm, part.conv)
        return lambda: function(full(grid), shown, shown_out, weights)

    arguments = (setting.samples * num_sites, channels, channels_out, setting.dtype.itemsize)
    works = operators.downsample_forward(*arguments), operators.downsample_backward(*arguments)
    facts = {"num_samples": setting.samples, "num_sites": setting.samples * num_sites, "channels": channels}
    grad = setting.normal(setting.samples, num_sites // 4, channels_out)
    index_out = site_index(visible, side, morton_sites(tile_side // 2).to(setting.device))
    leaves = list(part.parameters())
    ours = Side(lambda _: partial(kernel_cases.downsample, part, x), [x, *leaves], grad)
    grid_grad = unpack_sites(grad, index_out, side * tile_side // 2)
    baseline = Side(dense, [grid, *leaves], grid_grad, lambda out: (pack_sites(out[0].contiguous(), index), *out[1:]))
    return two_sided(setting, operators.added(works), facts, ours, baseline)


def heads_case(setting: Setting, size: str) -> Case:
    """Pixel heads at hidden patches and their losses: gradients of the decoder's output and of the heads."""
    model = pixel_model(setting, size)
    batch = synthetic_batch(model, setting.samples, setting.device)
    visible = random_visible(setting.samples, model.num_patches, MASK_RATIO, setting.device)
    hidden, dim = hidden_patches(visible, model.num_patches), model.decoder.mask_token.shape[-1]
    grid = setting.normal(setting.samples, model.num_patches, dim, dtype=setting.dtype).requires_grad_()
    baseline = DenseMasked(model)

    def dense(wrap: Callable[[Callable], Callable]) -> Run:
        function = wrap(baseline.loss_of)
        return lambda: function(full(grid), batch, hidden)

    heads: list[nn.Module] = list(model.heads.pixel.values())
    num_outputs = sum(head.out_features for head in heads)
    share = hidden.shape[1] / model.num_patches
    values = {name: model.select_in if name == INPUT else None for name in model.modalities_out}
    target_bytes = sum(_target_bytes(batch.values[name], selected) for name, selected in values.items())
    work = operators.heads_step(hidden.numel(), dim, num_outputs, setting.dtype.itemsize, round(share * target_bytes))
    facts = {"num_samples": setting.samples, "num_sites": hidden.numel(), "channels": dim, "num_outputs": num_outputs}
    leaves = [grid, *(p for head in heads for p in head.parameters())]
    one = torch.ones((), device=setting.device)
    ours = Side(lambda _: partial(kernel_cases.pixel_losses, model, grid, batch, hidden), leaves, one)
    return two_sided(setting, work, facts, ours, Side(dense, leaves, one))


def _target_bytes(values: Tensor, selected: Tensor | None) -> int:
    """Bytes of the target values and of their validity, a byte each."""
    bands = values.shape[1] if selected is None else len(selected)
    return values[:, :bands].numel() * (values.element_size() + 1)
