"""What several inputs of one encoder reach, as bars with intervals: a panel per method, a bar per input."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpmae.eval.results_picture import bounds, plain, said
from mpmae.eval.sweep_table import Row, SubsetScores, sweep_rows
from mpmae.eval.tables import title
from mpmae.runs.picture import COLOURS

_INK, _SHARED, _RANDOM = "#333333", "#aaaaaa", "#000000"
_ROOM = 1.06  # for the numbers behind the longest bar
_FOOT_WIDTH = 150


def write_sweep_picture(done: Sequence[SubsetScores], path: Path) -> None:
    """Draw into a PNG, SVG or PDF file, by its ending."""
    draw_sweep(done).savefig(path, dpi=150)


def draw_sweep(done: Sequence[SubsetScores]) -> Figure:
    """The figure, to be saved. Of several label fractions the largest is shown; what could not be evaluated is named."""
    rows = sweep_rows(done)
    share = max(row.standing.summary.label_fraction for row in rows)
    rows = [row for row in rows if row.standing.summary.label_fraction == share]
    methods = list(dict.fromkeys(row.standing.summary.method for row in rows))
    most = max(sum(row.standing.summary.method == method for row in rows) for method in methods)
    figure = Figure(figsize=(9, (0.32 * most + 0.7) * len(methods) + 0.5), layout="constrained")
    panels = list(figure.subplots(len(methods), 1, squeeze=False, sharex=True).flat)
    names = [entry.name for entry in done]
    for panel, method in zip(panels, methods, strict=True):
        _bars(panel, [row for row in rows if row.standing.summary.method == method], names)
        panel.set_title(method, loc="left", fontsize=10, color=_INK)
    panels[-1].set_xlim(0, _ROOM * max(max(bounds(row.standing)[1], 100 * row.standing.summary.mean) for row in rows))
    panels[-1].set_xlabel(f"test {title(rows[0].standing.summary.metric)} (%)", fontsize=9)
    missing = [entry.name for entry in done if not entry.scores and entry.remark]
    text = said([row.standing for row in rows])
    text += f"; {100 * share:g} % of the labels" if share < 1 else ""
    text += f"; not possible: {', '.join(missing)}" if missing else ""
    if any(row.random for row in rows):
        text += "; line: random init of the same input"
    figure.supxlabel(textwrap.fill(text, _FOOT_WIDTH), fontsize=7, color=_INK, x=0.995, ha="right")
    return figure


def _bars(panel: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for y, row in enumerate(rows):
        colour = _SHARED if row.entry is None else COLOURS[names.index(row.entry.name) % len(COLOURS)]
        mean, (low, high) = 100 * row.standing.summary.mean, bounds(row.standing)
        panel.barh(y, mean, height=0.68, color=colour, alpha=0.75, zorder=2)
        panel.plot([low, high], [y, y], color=_INK, lw=1.4, zorder=3)
        if row.random:
            at = 100 * row.random.summary.mean
            panel.plot([at, at], [y - 0.34, y + 0.34], color=_RANDOM, lw=1.4, ls=":", zorder=4)
        panel.annotate(f"{mean:.1f}", (max(high, mean), y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [row.label for row in rows])
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    plain(panel, "x")
