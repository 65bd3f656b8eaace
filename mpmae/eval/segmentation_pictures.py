"""A sheet of pictures: images in true colour beside label, prediction and error, with a legend.

Shapes: B stored bands, H x W pixels, K classes.
"""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mpmae.eval.bands import plain_band, sentinel2_name
from mpmae.eval.dataset import IGNORED, Task
from mpmae.files import write_whole
from mpmae.report.pictures import HIDDEN, NO_DATA, Stretch, colour_composite

_ERRORS = {"right": (238, 240, 242), "wrong": (20, 20, 24)}
_TITLES = ("image", "label", "prediction", "error")
_TRUE_COLOUR_UM = (0.665, 0.56, 0.49)
_SIDE_INCHES, _MAX_LEGEND = 2.0, 24
_DOTS_PER_INCH = 110
_GREYS = 7  # the pair in tab20: like the stripes of what has no label


@dataclass(frozen=True)
class Pictured:
    """One image of a sheet. image: [B, H, W] as stored. label: [H, W], IGNORED where there is none. predicted: [H, W]."""

    name: str
    image: np.ndarray
    label: np.ndarray
    predicted: np.ndarray


def draw_sheet(path: Path, task: Task, pictured: Sequence[Pictured], title: str) -> None:
    """Write a PNG with a row per image: true colour (or the first band), label, prediction, and where they differ.

    The legend has the classes that occur in labels or predictions, the most frequent first. Writes nothing for no images.
    """
    if not pictured:
        return
    figure = Figure(figsize=(4 * _SIDE_INCHES + 0.4, len(pictured) * (_SIDE_INCHES + 0.22) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=9)
    rows = figure.subplots(len(pictured), 4, squeeze=False)
    colours = class_colours(task.num_classes)
    for axes, sample in zip(rows, pictured, strict=True):
        pictures = (
            _image(sample.image, task),
            _classes(sample.label, colours),
            _classes(sample.predicted, colours),
            _error(sample.label, sample.predicted),
        )
        for axis, picture, name in zip(axes, pictures, _TITLES, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if axes is rows[0]:
                axis.set_title(name, fontsize=8)
        axes[0].set_ylabel(sample.name[-28:], fontsize=6)
        labelled = sample.label != IGNORED
        right = (sample.label == sample.predicted)[labelled]
        axes[3].set_xlabel(f"{100 * right.mean():.0f} % right" if right.size else "no label", fontsize=6)
    handles = _legend(task, pictured, colours)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def class_colours(num_classes: int) -> np.ndarray:
    """uint8 [K, 3]: matplotlib's tab20 while it lasts, its greys last; else hues a golden ratio apart in three tones."""
    if num_classes <= 20:
        paired = np.asarray(matplotlib.colormaps["tab20"].colors)
        strong, light = ([i for i in range(first, 20, 2) if i // 2 != _GREYS] for first in (0, 1))
        table = paired[[*strong, *light, 2 * _GREYS, 2 * _GREYS + 1]][:num_classes]
    else:
        hues = (np.arange(num_classes) * 0.618034) % 1
        table = np.array([colorsys.hsv_to_rgb(hue, 0.75, (0.95, 0.7, 0.5)[i % 3]) for i, hue in enumerate(hues)])
    return np.rint(table * 255).astype(np.uint8)


def _image(image: np.ndarray, task: Task) -> np.ndarray:
    bands = image[_colour_positions(task)]
    is_data = np.isfinite(bands).all(0)
    span = 1e-6 * max(1.0, float(np.nanmax(np.abs(bands), initial=0.0)))
    return colour_composite(bands, is_data, Stretch.of(bands, np.broadcast_to(is_data, bands.shape), span))


def _colour_positions(task: Task) -> list[int]:
    """Of red, green and blue among the stored bands; three times the first band where one is missing."""
    named = {}
    for position, band in enumerate(task.bands):
        wavelength_um = band.wavelength_um if band.wavelength_um is not None else plain_band(band.name)[1]
        if sentinel2_name(band.name) is not None or wavelength_um is not None:
            named.setdefault(wavelength_um, position)
    positions = [named.get(wavelength) for wavelength in _TRUE_COLOUR_UM]
    return [0, 0, 0] if None in positions else positions


def _classes(label: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return _hatched(colours[np.where(label == IGNORED, 0, label)], label)


def _error(label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _hatched(np.array(list(_ERRORS.values()), np.uint8)[(label != predicted).astype(int)], label)


def _hatched(picture: np.ndarray, label: np.ndarray) -> np.ndarray:
    """`picture` [H, W, 3] with stripes where there is no label."""
    rows, columns = np.indices(label.shape)
    stripes = np.array(HIDDEN, np.uint8)[(rows + columns) // 2 % 2]
    return np.where((label == IGNORED)[..., None], stripes, picture)


def _legend(task: Task, pictured: Sequence[Pictured], colours: np.ndarray) -> list[Patch]:
    maps = np.concatenate([array.ravel() for sample in pictured for array in (sample.label, sample.predicted)])
    counts = np.bincount(maps[maps != IGNORED], minlength=task.num_classes)
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    handles = [Patch(color=_unit(colours[k]), label=task.class_names[k][:32]) for k in order[:_MAX_LEGEND]]
    if len(order) > _MAX_LEGEND:
        handles.append(Patch(color="none", label=f"and {len(order) - _MAX_LEGEND} more"))
    handles += [Patch(facecolor=_unit(colour), edgecolor="grey", label=name) for name, colour in _ERRORS.items()]
    if (maps == IGNORED).any():
        light, dark = (_unit(colour) for colour in HIDDEN)
        handles.append(Patch(facecolor=light, edgecolor=dark, hatch="////", label="no label"))
    if not all(np.isfinite(sample.image).all() for sample in pictured):
        handles.append(Patch(color=_unit(NO_DATA), label="no data"))
    return handles


def _unit(colour: Sequence[int]) -> tuple[float, ...]:
    return tuple(value / 255 for value in colour)
