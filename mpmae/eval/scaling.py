"""By which mean and spread the channels of an encoder are normalised, modality by modality.

Shapes: C channels of the encoder, H x W pixels.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpmae.errors import DatasetError
from mpmae.eval.bands import BandMatch, BandRow
from mpmae.eval.dataset import StoredBand, Task
from mpmae.eval.encoder_input import SENTINEL2, EncoderInput
from mpmae.modalities import spec_of

_LOG = logging.getLogger(__name__)
_IMPLAUSIBLE = 10  # times the mean of pretraining: another unit, not another landscape
PRETRAINING, DATASET = "pretraining", "dataset"


@dataclass(frozen=True)
class _Part:
    """Mean and std of a modality's channels, what values are multiplied by before, and why these."""

    mean: Sequence[float]
    std: Sequence[float]
    scale: float
    source: str
    reason: str


class Scaling:
    """Normalises the channels of an image.

    parts: modality -> its part. facts: as plain data, "statistics" and "statistics_reason" (of Sentinel-2, else of the first
    modality) and, where there are several modalities, "statistics_of" with those of each.
    """

    def __init__(self, encoder_input: EncoderInput, parts: Mapping[str, _Part]):
        num = len(encoder_input.bands)
        self._mean, self._std, self._scale = (torch.full((num, 1, 1), value) for value in (0.0, 1.0, 1.0))
        for modality, part in parts.items():
            rows = encoder_input.positions_of(modality)
            self._mean[rows, 0, 0] = torch.tensor(part.mean, dtype=torch.float32)
            self._std[rows, 0, 0] = torch.tensor(part.std, dtype=torch.float32)
            self._scale[rows] = part.scale
        first = parts.get(SENTINEL2) or next(iter(parts.values()), None)
        self.facts: dict[str, Any] = {
            "statistics": first.source if first else "none",
            "statistics_reason": first.reason if first else "class ids are not normalised",
        }
        if len(parts) > 1:
            table = {name: {"statistics": part.source, "reason": part.reason} for name, part in parts.items()}
            self.facts["statistics_of"] = table

    def __call__(self, values: Tensor) -> Tensor:
        """[C, H, W] for stored values float32 [C, H, W]."""
        return (values * self._scale - self._mean) / self._std


def channel_scaling(task: Task, encoder_input: EncoderInput, match: BandMatch, normalise: str) -> Scaling:
    """The scaling of a set's bands for an encoder; what is chosen is logged.

    Raises DatasetError for statistics that are not there or do not fit.
    """
    parts, problems = {}, []
    for modality in dict.fromkeys(name for name, _ in encoder_input.channels):
        if spec_of(modality).kind == "categorical":
            continue
        rows = [match.rows[channel] for channel in encoder_input.positions_of(modality)]
        part_of = _sentinel2 if modality == SENTINEL2 else _other
        try:
            parts[modality] = part_of(task, encoder_input, modality, rows, normalise)
        except DatasetError as error:
            problems += error.problems
    if problems:
        raise DatasetError(problems)
    for modality, part in parts.items():
        where = task.name if len(parts) == 1 else f"{task.name}, {modality}"
        _LOG.info("%s: normalised by statistics of %s: %s", where, part.source, part.reason)
    return Scaling(encoder_input, parts)


def _sentinel2(task: Task, encoder_input: EncoderInput, modality: str, rows: Sequence[BandRow], normalise: str) -> _Part:
    level, known = task.product_level, encoder_input.statistics
    if level is None:
        lacking = "the set's product level is not known (dataset.product_level)"
    elif level not in known:
        lacking = f"the checkpoint has statistics of {', '.join(known) or 'no product'}, not of {level}"
    else:
        lacking = ""
    if normalise == PRETRAINING and lacking:
        raise DatasetError(f"{task.name}: image.normalise = pretraining, but {lacking}; use auto or dataset")
    if normalise == DATASET or lacking:
        return _own(task, rows, lacking)
    # A stand-in is normalised as the band it is, where pretraining had that one.
    bands = [encoder_input.bands[channel] for channel in encoder_input.positions_of(modality)]
    at = [bands.index(row.stored if row.stored in bands else row.wanted) for row in rows]
    mean, std = ([float(known[level][key][p]) for p in at] for key in ("mean", "std"))
    ratios = [task.bands[row.position].mean * task.scale / m for row, m in zip(rows, mean, strict=True) if m]
    ratio = float(np.median(ratios)) if ratios else 1.0
    if not 1 / _IMPLAUSIBLE < ratio < _IMPLAUSIBLE:
        raise DatasetError(
            f"{task.name}: its values x {task.scale:g} are {ratio:.3g} times those of pretraining ({level}), so they are no "
            "reflectance x 10,000; use image.normalise=dataset, or mend the set's scale"
        )
    reason = f"the checkpoint has those of {level}, the set's product level"
    return _Part(mean, std, task.scale, PRETRAINING, reason)


def _other(task: Task, encoder_input: EncoderInput, modality: str, rows: Sequence[BandRow], normalise: str) -> _Part:
    known = encoder_input.other_statistics.get(modality)
    lacking = "" if known else f"the checkpoint has no statistics of {modality}"
    if normalise == PRETRAINING and lacking:
        raise DatasetError(f"{task.name}: image.normalise = pretraining, but {lacking}; use auto or dataset")
    if normalise == DATASET or lacking:
        return _own(task, rows, lacking)
    linear = [row.stored for row in rows if row.position is not None and task.bands[row.position].mean > 0]
    if spec_of(modality).unit == "dB" and linear:
        raise DatasetError(
            f"{task.name}: the means of {', '.join(linear)} are above 0, so they are no backscatter in dB, which {modality} "
            "was pretrained with; store 10 log10 of the intensity, or use image.normalise=dataset"
        )
    return _Part(known["mean"], known["std"], 1.0, PRETRAINING, f"the checkpoint has those of {modality}")


def _own(task: Task, rows: Sequence[BandRow], lacking: str) -> _Part:
    """The set's own statistics; channels without data are left as they are."""
    blank = StoredBand("", None, 0.0, 1.0)
    bands = [blank if row.position is None else task.bands[row.position] for row in rows]
    flat = sorted({band.name for band in bands if not band.std > 0})
    if flat:
        _LOG.warning("%s: the bands %s do not vary and are only centred", task.name, ", ".join(flat))
    std = [band.std if band.std > 0 else 1.0 for band in bands]
    return _Part([band.mean for band in bands], std, 1.0, DATASET, lacking or "image.normalise = dataset")
