"""Stored images as an encoder takes them: its bands, normalised, in its sizes; and predictions back at the stored size.

Shapes: B stored bands, C channels of the encoder, H x W stored pixels, S side of what it sees, T windows, K classes.
"""

import logging
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.errors import DatasetError
from mpmae.eval.bands import match_channels
from mpmae.eval.config import ImageSection
from mpmae.eval.dataset import IGNORED, Task
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.resizing import nearest, resized
from mpmae.eval.scaling import channel_scaling
from mpmae.eval.stored_classes import ClassCodes

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layout:
    """Where the windows of side S lie in an image of H x W, padded on all sides by `before` and `after` (rows, columns).

    corners: (row, column) of each window in the padded image; () where the whole image is scaled instead.
    """

    size_px: tuple[int, int]
    side: int
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    corners: tuple[tuple[int, int], ...] = ()

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """As `torch.nn.functional.pad` takes it: left, right, top, bottom."""
        return self.before[1], self.after[1], self.before[0], self.after[0]

    def cut(self, padded: Tensor) -> Tensor:
        """The windows [T, ..., S, S] of [..., H, W], padded."""
        side = self.side
        return torch.stack([padded[..., row : row + side, column : column + side] for row, column in self.corners])


class Preparation:
    """Turns images of a set into input of an encoder.

    task: with the set's own band statistics. Which bands are read is decided here (see `match_channels`), and so is by which
    statistics those of a modality are normalised: with section.normalise "auto", those of pretraining where the checkpoint
    has them (for Sentinel-2 of the set's product level), else the set's own. Class maps become class ids. The size follows
    the first image when section.size is None: the nearest multiple of the patch size, for windows and crops the next smaller
    one. Choices are logged once and stand in `facts`.
    Raises DatasetError for statistics that are not there or do not fit, and for images of several sizes without
    section.size. Safe to use from several threads.
    """

    def __init__(self, task: Task, encoder_input: EncoderInput, section: ImageSection):
        self._task, self._input, self._section = task, encoder_input, section
        self._match = match_channels(task, encoder_input.channels)
        if section.size is not None and section.size % encoder_input.patch_size:
            patch = encoder_input.patch_size
            low = section.size // patch * patch
            raise DatasetError(
                f"image.size = {section.size}: expected a multiple of the encoder's patch size {patch}, such as "
                f"{low or patch} or {low + patch}"
            )
        self._scaling = channel_scaling(task, encoder_input, self._match, section.normalise)
        self._classes = {
            channel: ClassCodes(encoder_input.channels[channel][0], task.name) for channel in encoder_input.class_channels
        }
        self._lock, self._layouts = threading.Lock(), {}

    @property
    def facts(self) -> dict[str, Any]:
        """What was chosen, as plain data: bands, statistics, and sizes of the images seen so far."""
        layouts = list(self._layouts.values())
        return {
            "set": self._task.name,
            "product_level": self._task.product_level,
            **self._scaling.facts,
            "bands": [
                {"wanted": row.wanted, "stored": row.stored, "distance_um": row.distance_um, "modality": row.modality}
                for row in self._match.rows
            ],
            "fit": self._section.fit,
            "side_px": layouts[0].side if layouts else self._section.size,
            "stored_px": [list(layout.size_px) for layout in layouts],
            "num_windows": [max(1, len(layout.corners)) for layout in layouts],
        }

    def __call__(self, image: np.ndarray) -> Tensor:
        """float32 [T, C, S, S] for a stored image [B, H, W]: normalised values, and class ids as numbers.

        No data is 0, the mean of its band; NaN for an encoder that tells it apart.
        """
        if image.ndim != 3 or len(image) != len(self._task.bands) or not min(image.shape[1:]):
            raise DatasetError(
                f"{self._task.name}: an image of shape {list(image.shape)}; expected [{len(self._task.bands)}, H, W]: "
                f"{', '.join(self._task.band_names)}"
            )
        values = self._values(image)
        layout = self._layout(*values.shape[1:])
        if layout.corners:
            fill = math.nan if self._input.tells_no_data else 0.0
            return layout.cut(F.pad(values, layout.padding, value=fill)).contiguous()
        if layout.size_px == (layout.side, layout.side):
            return values[None]
        return resized(values[None], layout.side, self._classes)

    def _values(self, image: np.ndarray) -> Tensor:
        """float32 [C, H, W] at the stored size."""
        positions = self._match.positions
        stored = np.ascontiguousarray(image[[position or 0 for position in positions]], np.float32)
        stored[[channel for channel, position in enumerate(positions) if position is None]] = np.nan
        values = self._scaling(torch.from_numpy(stored))
        for channel, codes in self._classes.items():
            values[channel] = torch.from_numpy(codes.ids(stored[channel]))
        there = torch.isfinite(values)
        return torch.where(there, values, math.nan if self._input.tells_no_data else 0.0)

    def label_windows(self, label: np.ndarray) -> Tensor:
        """int64 [T, S, S] for a label map [H, W]: scaled by nearest neighbour, or cut; IGNORED where it is padded."""
        layout = self._layout(*label.shape)
        values = torch.from_numpy(np.ascontiguousarray(label, np.int64))
        if layout.corners:
            return layout.cut(F.pad(values, layout.padding, value=IGNORED)).contiguous()
        return nearest(values, layout.side)[None]

    def stitch(self, logits: Tensor, size_px: tuple[int, int] | None = None) -> Tensor:
        """[K, H, W] from the logits [T, K, S, S] of an image's windows; where windows overlap, their mean.

        size_px: H and W of the image (None: the one size seen so far). What a centre crop leaves out is 0: see `scored`.
        """
        if size_px is None:
            if len(self._layouts) != 1:
                raise DatasetError(f"{self._task.name}: images of {len(self._layouts)} sizes; `stitch` needs size_px")
            size_px = next(iter(self._layouts))
        layout = self._layout(*size_px)
        if not layout.corners:
            if size_px == tuple(logits.shape[2:]):
                return logits[0]
            return F.interpolate(logits.float(), size_px, mode="bilinear")[0]
        (top, left), (bottom, right), side = layout.before, layout.after, layout.side
        height, width = size_px
        total = logits.new_zeros(logits.shape[1], top + height + bottom, left + width + right, dtype=torch.float32)
        count = torch.zeros_like(total[:1])
        for window, (row, column) in zip(logits, layout.corners, strict=True):
            total[:, row : row + side, column : column + side] += window
            count[:, row : row + side, column : column + side] += 1
        whole = total / count.clamp(min=1)
        return whole[:, top : top + height, left : left + width]

    def scored(self, label: np.ndarray) -> np.ndarray:
        """The label map [H, W] with IGNORED where the encoder saw nothing: outside a centre crop."""
        layout = self._layout(*label.shape)
        if self._section.fit != "crop":
            return label
        (row, column), (top, left) = layout.corners[0], layout.before
        rows = slice(max(0, row - top), row - top + layout.side)
        columns = slice(max(0, column - left), column - left + layout.side)
        seen = np.full_like(label, IGNORED)
        seen[rows, columns] = label[rows, columns]
        return seen

    def _layout(self, height: int, width: int) -> _Layout:
        with self._lock:
            if (height, width) not in self._layouts:
                if self._section.size is None and self._layouts:
                    first = next(iter(self._layouts))
                    raise DatasetError(
                        f"{self._task.name}: images of {height} x {width} and {first[0]} x {first[1]} px; give them all "
                        "one size with image.size"
                    )
                layout = _layout(height, width, self._input.patch_size, self._section)
                self._layouts[height, width] = layout
                _LOG.info("%s: images of %d x %d px %s", self._task.name, height, width, _said(layout, self._section.fit))
            return self._layouts[height, width]


def _layout(height: int, width: int, patch: int, section: ImageSection) -> _Layout:
    if section.size is not None:
        side = section.size
    elif section.fit == "resize":
        side = max(patch, math.floor(max(height, width) / patch + 0.5) * patch)
    else:
        side = max(patch, min(height, width) // patch * patch)
    if section.fit == "resize":
        return _Layout((height, width), side)
    missing = (max(0, side - height), max(0, side - width))
    before = (missing[0] // 2, missing[1] // 2)
    after = (missing[0] - before[0], missing[1] - before[1])
    starts = [_starts(length + more, side, section.fit) for length, more in zip((height, width), missing, strict=True)]
    return _Layout((height, width), side, before, after, tuple((row, column) for row in starts[0] for column in starts[1]))


def _starts(length: int, side: int, fit: str) -> list[int]:
    """First pixels of the windows along one axis: the centre, or as few as cover it, evenly spread."""
    if fit == "crop":
        return [(length - side) // 2]
    num = -(-length // side)
    return [round(i * (length - side) / (num - 1)) for i in range(num)] if num > 1 else [0]


def _said(layout: _Layout, fit: str) -> str:
    (height, width), side = layout.size_px, layout.side
    if (height, width) == (side, side):
        return "are taken as they are"
    if fit == "resize":
        return f"are scaled to {side} x {side}" + ("" if height == width else ", which changes their proportions")
    padded = f", padded to at least {side} px" if max(*layout.before, *layout.after) else ""
    if fit == "crop":
        return f"are cut to the {side} x {side} in their centre{padded}; the rest is neither seen nor scored"
    return f"become {len(layout.corners)} windows of {side} x {side}{padded}"
