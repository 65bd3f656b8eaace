"""Results as a picture: accuracy over label fractions, or one row per method where there is one fraction."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mpmae.eval.scores import Score
from mpmae.eval.tables import Standing, standings, title
from mpmae.runs.picture import COLOURS

_INK, _GRID = "#333333", "#dddddd"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def write_picture(scores: Sequence[Score], path: Path) -> None:
    """Draw the results of one task into a PNG, SVG or PDF file, by its ending."""
    draw(scores).savefig(path, dpi=150)


def draw(scores: Sequence[Score]) -> Figure:
    """The figure, to be saved."""
    rows = standings(scores)
    encoders = list(dict.fromkeys(row.summary.encoder for row in rows))
    methods = list(dict.fromkeys(row.summary.method for row in rows))
    fractions = sorted({row.summary.label_fraction for row in rows})
    several = len(fractions) > 1
    num_columns = min(3, len(methods)) if several else 1
    num_rows = math.ceil(len(methods) / num_columns) if several else 1
    height = 2.9 * num_rows if several else 0.6 + (0.24 * len(encoders) + 0.2) * len(methods)
    legend_height = 0.25 * math.ceil(len(encoders) / 2) + 0.5
    figure = Figure(figsize=(9, height + legend_height), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=several).flat)
    metric = f"test {title(rows[0].summary.metric)} (%)"
    if several:
        for panel, method in zip(panels, methods, strict=False):
            _curves(panel, [row for row in rows if row.summary.method == method], encoders, fractions)
            panel.set_title(method, loc="left", fontsize=10, color=_INK)
        for panel in panels[len(methods) :]:
            panel.set_visible(False)
        for at in range(0, len(panels), num_columns):
            panels[at].set_ylabel(metric, fontsize=9)
        for panel in panels[max(0, len(methods) - num_columns) : len(methods)]:
            panel.set_xlabel("labels of the training split (%)", fontsize=9)
    else:
        _dots(panels[0], rows, encoders, methods)
        panels[0].set_xlabel(metric, fontsize=9)
    handles = [
        panels[0].plot([], [], _MARKERS[i % len(_MARKERS)], ls="-" if several else "", color=_colour(i))[0]
        for i in range(len(encoders))
    ]
    figure.legend(handles, encoders, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.text(0.995, 0.002, said(rows), ha="right", va="bottom", fontsize=7, color=_INK)
    figure.get_layout_engine().set(rect=(0, 0.16 / (height + legend_height), 1, 1 - 0.16 / (height + legend_height)))
    return figure


def _curves(panel: Axes, rows: Sequence[Standing], encoders: Sequence[str], fractions: Sequence[float]) -> None:
    for number, encoder in enumerate(encoders):
        own = sorted((row for row in rows if row.summary.encoder == encoder), key=lambda row: row.summary.label_fraction)
        if not own:
            continue
        x, y = [100 * row.summary.label_fraction for row in own], [100 * row.summary.mean for row in own]
        marker = _MARKERS[number % len(_MARKERS)]
        panel.plot(x, y, marker=marker, ms=4.5, mec="white", mew=0.6, lw=1.6, color=_colour(number), zorder=3)
        limits = [bounds(row) for row in own]
        panel.fill_between(x, *zip(*limits, strict=True), color=_colour(number), alpha=0.15, lw=0, zorder=1)
    panel.set_xscale("log")
    panel.set_xticks([100 * share for share in fractions], [f"{100 * share:g}" for share in fractions])
    panel.xaxis.set_minor_locator(NullLocator())
    plain(panel, "both")


def _dots(panel: Axes, rows: Sequence[Standing], encoders: Sequence[str], methods: Sequence[str]) -> None:
    for row in rows:
        number = encoders.index(row.summary.encoder)
        offset = (number - (len(encoders) - 1) / 2) * 0.7 / len(encoders)
        y = methods.index(row.summary.method) + offset
        low, high = bounds(row)
        panel.plot([low, high], [y, y], color=_colour(number), lw=1.6, zorder=2)
        marker = _MARKERS[number % len(_MARKERS)]
        panel.plot(100 * row.summary.mean, y, marker, ms=6, mec="white", mew=0.6, color=_colour(number), zorder=3)
    panel.set_yticks(range(len(methods)), methods)
    panel.set_ylim(len(methods) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    plain(panel, "x")


def bounds(row: Standing) -> tuple[float, float]:
    """In percent, over images where they are known, else over seeds; the value itself where neither is."""
    low, high = row.images[1:] if row.images else (row.summary.low, row.summary.high)
    mean = row.summary.mean
    return 100 * (mean if math.isnan(low) else low), 100 * (mean if math.isnan(high) else high)


def said(rows: Sequence[Standing]) -> str:
    """What the picture shows, for its foot."""
    what = "test images (bootstrap)" if any(row.images for row in rows) else "seeds (Student's t)"
    num = max(len(row.summary.values) for row in rows)
    mean = f"mean over {num} seeds" if num > 1 else "one seed"
    return f"{rows[0].summary.task}: {mean}; 95 % intervals over {what}"


def plain(panel: Axes, grid: str) -> None:
    """A grid along `grid` and no frame."""
    panel.grid(axis=grid, color=_GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
