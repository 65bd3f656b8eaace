"""Errors of a chunk of logits and their gradient, in one pass over logits that lie in the L2 cache.

`_statistics`: one program per sample reads its hidden target patches once: the number of valid values, and the mean and
deviation of each patch if targets are normalised. `_errors`: one program per block of pixels; logits and the gradient in
their place are a plain matrix [pixels, C], targets are read from the image, a patch's row of pixels (p contiguous values,
whole sectors) at a time, and turned to the logits' layout in shared memory. Each program writes one partial sum.

Shapes as in `mpmae.kernels.heads.targets`; n samples of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpmae.kernels.heads.targets import NORM_EPS, Targets

NUM_WARPS = 4


def error_pixels(block: int, is_class: bool) -> int:
    """Pixels of a program of `_errors`: 8 logits of a cross entropy or 16 of a squared error per thread."""
    return max((1024 if is_class else 2048) // block, 1)


def statistics_pixels(block: int, num_pixels: int) -> int:
    """Pixels that a program of `_statistics` reads at a time, of `num_pixels`: 16 values per thread at most."""
    return min(max(2048 // block, 1), triton.next_power_of_2(num_pixels))


@triton.jit
def _targets(
    values,
    valid,
    bands,
    first,
    sample,
    patch,
    pixel,
    inside,
    grid_side,
    num_bands,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CLASS: tl.constexpr,
):
    """Targets and whether they are valid, [BLOCK channels, pixels]; one channel of class ids. sample: counted from first."""
    side = grid_side * P
    row = (patch // grid_side) * P + pixel // P
    column = (patch % grid_side) * P + pixel % P
    plane = side * side
    channel = tl.arange(0, BLOCK)
    is_channel = channel < CHANNELS
    band = channel
    if bands is not None:
        band = tl.load(bands + channel, mask=is_channel, other=0).to(tl.int32)
    skipped = first.to(tl.int64) * (num_bands * plane)
    # a row of a patch is contiguous, which the analysis of % and // does not see through every mask
    VECTOR: tl.constexpr = P & -P
    place = tl.multiple_of(tl.max_contiguous(sample * (num_bands * plane) + row * side + column, VECTOR), VECTOR)
    offset = band[:, None] * plane + place[None, :]
    taken = is_channel[:, None] & inside[None, :]
    ok = tl.load(valid + skipped + offset, mask=taken, other=0) != 0
    loaded = tl.load(values + skipped + offset, mask=taken, other=0)
    if IS_CLASS:
        value = loaded.to(tl.int32)
        ok = ok & (value >= 0)
    else:
        value = loaded.to(tl.float32)
        ok = ok & (tl.abs(value) < float("inf"))
    return value, ok


@triton.jit
def _statistics(
    values,
    valid,
    bands,
    hidden,
    counted,
    per_value,
    mean,
    rstd,
    num_hidden,
    grid_side,
    num_bands,
    EPS: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    IS_CLASS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    sample = tl.program_id(0)
    total = 0
    if NORMALISE:
        for m in range(num_hidden):
            slot = sample * num_hidden + m
            patch = tl.load(hidden + slot).to(tl.int32)
            count, centre, spread = 0.0, 0.0, 0.0
            for start in range(0, P * P, PIXELS):
                pixel = start + tl.arange(0, PIXELS)
                value, ok = _targets(
                    values, valid, bands, sample, 0, patch, pixel, pixel < P * P, grid_side, num_bands,
                    P, CHANNELS, BLOCK, IS_CLASS,
                )  # fmt: skip
                # blocks are merged by their means and squared deviations: no difference of large sums
                part = tl.sum(tl.sum(ok.to(tl.float32), 1), 0)
                part_mean = tl.div_rn(tl.sum(tl.sum(tl.where(ok, value, 0.0), 1), 0), tl.maximum(part, 1.0))
                away = tl.where(ok, value - part_mean, 0.0)
                step = part_mean - centre
                share = tl.div_rn(part, tl.maximum(count + part, 1.0))
                spread += tl.sum(tl.sum(away * away, 1), 0) + step * step * count * share
                centre += step * share
                count += part
            variance = tl.div_rn(spread, tl.maximum(count - 1.0, 1.0)) + EPS
            tl.store(mean + slot, centre)
            tl.store(rstd + slot, tl.div_rn(1.0, tl.sqrt_rn(variance)))
            total += count.to(tl.int32)
    else:
        for start in range(0, num_hidden * P * P, PIXELS):
            site = start + tl.arange(0, PIXELS)
            inside = site < num_hidden * P * P
            patch = tl.load(hidden + sample * num_hidden + site // (P * P), mask=inside, other=0).to(tl.int32)
            value, ok = _targets(
                values, valid, bands, sample, 0, patch, site % (P * P), inside, grid_side, num_bands,
                P, CHANNELS, BLOCK, IS_CLASS,
            )  # fmt: skip
            total += tl.sum(tl.sum(ok.to(tl.int32), 1), 0)
    takes_part = (tl.load(counted + sample) != 0) & (total > 0)
    tl.store(per_value + sample, tl.where(takes_part, tl.div_rn(1.0, tl.maximum(total, 1).to(tl.float32)), 0.0))


@triton.jit(do_not_specialize=["first_sample", "first_partial"])
def _errors(
    logits,
    values,
    valid,
    bands,
    hidden,
    per_value,
    mean,
    rstd,
    partials,
    gain,
    num_sites,
    first_sample,
    first_partial,
    num_hidden,
    grid_side,
    num_bands,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    IS_CLASS: tl.constexpr,
    NORMALISE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    program = tl.program_id(0)
    site = program * PIXELS + tl.arange(0, PIXELS)
    inside = site < num_sites
    slot = first_sample * num_hidden + site // (P * P)
    sample = site // (P * P) // num_hidden
    patch = tl.load(hidden + slot, mask=inside, other=0).to(tl.int32)
    share = tl.load(per_value + first_sample + sample, mask=inside, other=0.0)
    value, ok = _targets(
        values, valid, bands, first_sample, sample, patch, site % (P * P), inside, grid_side, num_bands,
        P, CHANNELS, 1 if IS_CLASS else BLOCK, IS_CLASS,
    )  # fmt: skip

    channel = tl.arange(0, BLOCK)
    is_channel = channel < CHANNELS
    taken = inside[:, None] & is_channel[None, :]
    place = site[:, None] * CHANNELS + channel[None, :]
    logit = tl.load(logits + place, mask=taken, other=0.0).to(tl.float32)
    if IS_CLASS:
        label = tl.reshape(value, [PIXELS])
        takes_part = tl.reshape(ok, [PIXELS]) & (share > 0)
        logit = tl.where(is_channel[None, :], logit, float("-inf"))
        top = tl.max(logit, 1)
        power = tl.exp(logit - top[:, None])
        norm = tl.sum(power, 1)
        is_label = channel[None, :] == label[:, None]
        error = tl.log(norm) + top - tl.sum(tl.where(is_label, logit, 0.0), 1)
        error = tl.where(label < CHANNELS, error, float("nan"))
        partial = tl.sum(tl.where(takes_part, error * share, 0.0), 0)
        slope = power / norm[:, None] - tl.where(is_label, 1.0, 0.0)
        slope = tl.where((label < CHANNELS)[:, None], slope, float("nan"))
        slope = tl.where(takes_part[:, None], slope, 0.0)
    else:
        if NORMALISE:
            centre = tl.load(mean + slot, mask=inside, other=0.0)
            scale = tl.load(rstd + slot, mask=inside, other=0.0)
            value = (value - centre[None, :]) * scale[None, :]
        # no valid target is infinite: one value tells both through the change of layout
        target = tl.trans(tl.where(ok & (share > 0)[None, :], value, float("inf")))
        away = tl.where(target != float("inf"), logit - target, 0.0)
        partial = tl.sum(tl.sum(away * away * share[:, None], 1), 0)
        slope = 2.0 * away
    tl.store(partials + first_partial + program, partial)
    if WITH_GRADIENT:
        gradient = slope * (share * gain)[:, None]
        tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=taken)


class Errors:
    """As `mpmae.kernels.heads.reference.Errors`; two runs give the same bits."""

    def __init__(self, targets: Targets, dtype: torch.dtype, chunk_samples: int):
        self.targets, self.chunk_samples = targets, chunk_samples
        values, hidden, size = targets.values.contiguous(), targets.hidden.contiguous(), targets.patch_size
        num_samples, self.num_hidden = hidden.shape
        floats = {"dtype": torch.float32, "device": hidden.device}
        per_value = torch.empty(num_samples, **floats)
        mean, rstd = torch.empty(2, *hidden.shape, **floats) if targets.normalise else (None, None)
        self.block = triton.next_power_of_2(targets.num_channels)
        self.pixels = error_pixels(self.block, targets.num_classes > 0)
        self.images = values, targets.valid.contiguous().view(torch.uint8), targets.bands, hidden
        self.statistics = per_value, mean, rstd
        self.sizes = self.num_hidden, values.shape[-1] // size, values.shape[1]
        self.kind = {"P": size, "CHANNELS": targets.num_channels, "IS_CLASS": targets.num_classes > 0}
        self.kind |= {"NORMALISE": targets.normalise, "num_warps": NUM_WARPS}
        programs = sum(self._num_programs(end - start) for start, end in self._chunks(num_samples))
        self.partials, self.num_partials = torch.empty(programs, **floats), 0

        block = 1 if targets.num_classes else self.block
        pixels = statistics_pixels(block, size**2 * (1 if targets.normalise else self.num_hidden))
        kind = self.kind | {"CHANNELS": 1} if targets.num_classes else self.kind
        _statistics[(num_samples,)](
            *self.images,
            targets.counted.contiguous().view(torch.uint8),
            *self.statistics,
            *self.sizes,
            EPS=NORM_EPS,
            BLOCK=block,
            PIXELS=pixels,
            **kind,
        )

    def add(self, logits: Tensor, first: int, gain: float | None) -> None:
        """As `mpmae.kernels.heads.reference.Errors.add`."""
        num_samples = len(logits) // self.num_hidden
        programs = self._num_programs(num_samples)
        _errors[(programs,)](
            logits,
            *self.images,
            *self.statistics,
            self.partials,
            gain or 0.0,
            self._num_sites(num_samples),
            first,
            self.num_partials,
            *self.sizes,
            BLOCK=self.block,
            PIXELS=self.pixels,
            WITH_GRADIENT=gain is not None,
            **self.kind,
        )
        self.num_partials += programs

    def sum(self) -> Tensor:
        """The scalar sum over everything added."""
        return self.partials.sum()

    def _chunks(self, num_samples: int):
        starts = range(0, num_samples, self.chunk_samples)
        return [(start, min(start + self.chunk_samples, num_samples)) for start in starts]

    def _num_sites(self, num_samples: int) -> int:
        return num_samples * self.num_hidden * self.targets.patch_size**2

    def _num_programs(self, num_samples: int) -> int:
        return triton.cdiv(self._num_sites(num_samples), self.pixels)
