"""Curves of several runs as one picture: the total loss large, below it a small chart for each target and each probe."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mpmae.domains import noun_of, title_of
from mpmae.errors import ReportError
from mpmae.probe_record import is_method, method_title
from mpmae.runs.curves import AXES, TOTAL, Curve, RunCurves

# told apart by people with any colour vision; from Okabe and Ito, "Color universal design", 2008
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
FORMATS = (".png", ".svg", ".pdf")
_LOG_FROM_RATIO = 20.0
_MAX_POINTS = 4000
_INK, _GRID = "#333333", "#dddddd"


def write_picture(runs: Sequence[RunCurves], axis: str, path: Path) -> None:
    """Draw the curves into a PNG, SVG or PDF file, by its ending. Raises ReportError for another, or an absent folder."""
    problems = []
    if path.suffix.lower() not in FORMATS:
        problems.append(f"--output {path}: expected a name that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        problems.append(f"--output {path}: there is no folder {path.parent}")
    if problems:
        raise ReportError(problems)
    draw(runs, axis).savefig(path, dpi=150)


def draw(runs: Sequence[RunCurves], axis: str) -> Figure:
    """The figure, to be saved."""
    small = [[run.curves for run in runs], [run.probes for run in runs]]
    panels_below = [(name, of_runs) for of_runs in small for name in dict.fromkeys(n for each in of_runs for n in each)]
    panels_below = [(name, of_runs) for name, of_runs in panels_below if name != TOTAL]
    num_columns = min(4, max(1, len(panels_below)))
    num_rows = math.ceil(len(panels_below) / num_columns)
    legend_rows = math.ceil(len(runs) / 2)
    height = 3.6 + 2.1 * num_rows + 0.25 * legend_rows
    figure = Figure(figsize=(11, height), layout="constrained")
    rows = figure.subfigures(2 if num_rows else 1, 1, height_ratios=[3.4, 2.1 * num_rows] if num_rows else None)
    top, below = rows if num_rows else (rows, None)
    total = top.subplots()
    handles = _panel(total, small[0], TOTAL, axis)
    for run, handle in zip(runs, handles, strict=True):
        for x in run.resumed_at:
            total.axvline(x, color=handle.get_color(), linestyle=(0, (1, 3)), linewidth=1, zorder=0)
    names = {name for run in runs for name in run.curves}
    total.set_title(f"training loss, all {noun_of(names)}", loc="left", fontsize=11, color=_INK)
    notes = ["faint: every step", "dots: validation", *(["dotted: resumed"] if any(run.resumed_at for run in runs) else [])]
    total.set_title("  ·  ".join(notes), loc="right", fontsize=8, color=_INK)
    total.set_xlabel(AXES[axis])
    figure.legend(
        handles,
        [_label(run) for run in runs],
        loc="outside upper left",
        ncols=2 if len(runs) > 1 else 1,
        frameon=False,
        fontsize=9,
    )
    if below is not None:
        panels = below.subplots(num_rows, num_columns, squeeze=False).flat
        for position, panel in enumerate(panels):
            if position >= len(panels_below):
                panel.set_visible(False)
                continue
            name, of_runs = panels_below[position]
            _panel(panel, of_runs, name, axis)
            panel.set_title(_title(name), loc="left", fontsize=9, color=_INK)
            panel.tick_params(labelsize=7)
            if position + num_columns >= len(panels_below):
                panel.set_xlabel(AXES[axis], fontsize=8)
    return figure


def _title(name: str) -> str:
    return f"{method_title(name)}, %" if is_method(name) else title_of(name)


def _panel(panel: Axes, of_runs: Sequence[Mapping[str, Curve]], name: str, axis: str) -> list:
    """Draw one curve of all runs; the handles of their lines."""
    handles, heights = [], []
    for number, curves in enumerate(of_runs):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        curve = curves.get(name)
        if curve is None:
            handles.append(panel.plot([], [], color=colour, linestyle=style, linewidth=2)[0])
            continue
        panel.plot(*_thinned(curve.x, curve.raw), color=colour, alpha=0.22, linewidth=0.7, zorder=1)
        handles += panel.plot(*_thinned(curve.x, curve.smooth), color=colour, linestyle=style, linewidth=1.8, zorder=3)
        panel.plot(
            curve.points_x,
            curve.points,
            "o",
            markersize=4,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=4,
        )
        heights.append(np.concatenate([curve.smooth, curve.points]))
    _scale(panel, np.concatenate(heights) if heights else np.empty(0))
    panel.grid(color=_GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(6 if name == TOTAL else 4, integer=axis == "step"))
    if axis != "hours":
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    return handles


def _scale(panel: Axes, heights: np.ndarray) -> None:
    """Limits from the smoothed curves, so that single spikes do not press everything flat; logarithmic over a wide range."""
    heights = heights[np.isfinite(heights)]
    if not len(heights):
        panel.text(0.5, 0.5, "no finite values", transform=panel.transAxes, ha="center", color=_INK, fontsize=8)
        return
    low, high = float(heights.min()), float(heights.max())
    if low > 0 and high / low > _LOG_FROM_RATIO:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.15, high * 1.15)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        panel.set_ylim(low - margin, high + margin)


def _thinned(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most _MAX_POINTS of a long series: the lowest and the highest of each stretch, so that no spike is lost."""
    size = math.ceil(len(x) / (_MAX_POINTS // 2))
    if size <= 2:
        return x, values
    stretches = np.pad(values, (0, -len(values) % size), constant_values=np.nan).reshape(-1, size)
    first = np.arange(len(stretches)) * size
    low, high = (np.argmin(np.where(np.isnan(stretches), np.inf, sign * stretches), axis=1) for sign in (1, -1))
    kept = np.unique(np.minimum(np.concatenate([first + low, first + high]), len(x) - 1))
    return x[kept], values[kept]


def _label(run: RunCurves) -> str:
    curve = run.curves[TOTAL]
    last = curve.smooth[np.isfinite(curve.smooth)][-1:]
    validation = curve.points[np.isfinite(curve.points)][-1:]
    parts = [f"{what} {value[0]:.4g}" for what, value in (("last", last), ("validation", validation)) if len(value)]
    return f"{run.name}  ({', '.join(parts) or 'nothing finite'})"
