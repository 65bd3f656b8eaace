"""A PNG of the values of a shard set: a histogram per band of a sample of its tiles, shares of classes for land cover.

Shapes: C bands, N values.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpmae.counter_rng import Stream, random_bits
from mpmae.in_order import in_order
from mpmae.modalities import MODALITIES, PRODUCT_LEVELS
from mpmae.shard_tools.output import disk_errors
from mpmae.shard_tools.shard_set import Sample, ShardSet
from mpmae.shard_tools.tile import Tile

NUM_TILES, NUM_BINS, MAX_COLUMNS = 256, 60, 8
# Most values of a few bright pixels lie far out; what lies beyond is counted in the last bar.
RANGE_PERCENTILES = (0.1, 99.9)
CELL_INCHES, ROW_INCHES, DPI = 1.75, 1.55, 110
HEADROOM = 1.15
FOOT_CHARACTERS = 190
COLOURS = {"l1c": "#d1495b", "l2a": "#00798c", None: "#3d5a80"}
QUIET = "0.35"


@dataclass(frozen=True)
class _Panel:
    """One histogram: valid values [N] per group (product level, or None), of `num_possible` values in all groups."""

    modality: str
    title: str
    groups: dict[str | None, np.ndarray]
    num_possible: int

    @property
    def num(self) -> int:
        """Valid values in all groups."""
        return sum(map(len, self.groups.values()))


def histograms(shards_dir: str | Path, png: str | Path, split: str | None = None, num_tiles: int = NUM_TILES) -> Path:
    """Draw the values of `num_tiles` samples of a split (None: the first with samples), drawn by the set's seed, to `png`.

    Only valid values count; each panel says how many percent of all they are. ShardError for an unknown or empty split, a
    damaged set, or a file that cannot be written.
    """
    shard_set, png = ShardSet(shards_dir), Path(png)
    split = shard_set.split_to_draw(split, num_tiles)
    samples = _drawn(shard_set, split, num_tiles)
    tiles = list(in_order(lambda sample: next(shard_set.read([sample])), samples))
    panels = [panel for name in shard_set.modalities for panel in _panels(shard_set, name, tiles)]
    counts = f"{len(tiles):,} of {shard_set.num_tiles(split):,} samples"
    title = f"{shard_set.name}, {split}: valid values of {counts}, their share of all values"
    figure = _figure(panels, title, {tile.product_level.decode(errors="replace") for tile in tiles})
    with disk_errors(str(png), png.parent):
        figure.savefig(png, dpi=DPI, metadata={"Software": None})
    return png


def _drawn(shard_set: ShardSet, split: str, num: int) -> list[Sample]:
    """`num` samples of a split (all, if it has fewer), in the order of the tars."""
    keys = random_bits(shard_set.manifest.seed, Stream.ORDER, 0, np.arange(shard_set.num_tiles(split)))[:, 0]
    chosen = set(np.argsort(keys, kind="stable")[:num].tolist())
    return [sample for sample in shard_set.samples(split) if sample.ordinal in chosen]


def _panels(shard_set: ShardSet, name: str, tiles: list[Tile]) -> list[_Panel]:
    spec, rule = MODALITIES[name], shard_set.no_data(name)
    values = np.stack([tile.values[name] for tile in tiles])
    if spec.one_hot:
        classes = values.argmax(axis=-1)[rule.valid(values).any(axis=-1)]
        return [_Panel(name, spec.title, {None: classes}, len(tiles))]
    valid = np.stack([rule.valid(v) for v in values])
    levels = np.array([tile.product_level.decode(errors="replace") for tile in tiles])
    panels = []
    for band, title in enumerate(shard_set.bands(name)):
        x, kept = values[:, band], valid[:, band]
        if name == "sentinel2":
            groups = {
                level: x[levels == level][kept[levels == level]] for level in PRODUCT_LEVELS if (levels == level).any()
            }
        else:
            groups = {None: x[kept]}
        panels.append(_Panel(name, title, groups, kept.size))
    return panels


def _places(panels: list[_Panel]) -> list[tuple[int, int]]:
    """Row and column of each panel: modalities flow, one that does not fit into the rest of a row begins the next."""
    places, row, column, previous = [], 0, 0, None
    for panel in panels:
        if panel.modality != previous:
            num = sum(other.modality == panel.modality for other in panels)
            if column + num > MAX_COLUMNS and column:
                row, column = row + 1, 0
        elif column == MAX_COLUMNS:
            row, column = row + 1, 0
        places.append((row, column))
        column, previous = column + 1, panel.modality
    return places


def _figure(panels: list[_Panel], title: str, levels: set[str]) -> Figure:
    """A panel per band with values; those without are listed at the foot."""
    empty = [panel for panel in panels if not panel.num]
    panels = [panel for panel in panels if panel.num]
    places = _places(panels)
    num_rows, top, foot = max((row for row, _ in places), default=0) + 1, 0.55, 0.45
    width, height = MAX_COLUMNS * CELL_INCHES + 0.3, num_rows * ROW_INCHES + top + foot
    figure = Figure((width, height), facecolor="white")
    figure.text(0.2 / width, 1 - 0.12 / height, title, va="top", fontsize=12, weight="bold")
    previous = None
    for panel, (row, column) in zip(panels, places, strict=True):
        left, cell_top = 0.2 + column * CELL_INCHES, height - top - row * ROW_INCHES
        bottom = cell_top - ROW_INCHES + 0.25
        size = (CELL_INCHES - 0.25) / width, (ROW_INCHES - 0.75) / height
        _draw(figure.add_axes((left / width, bottom / height, *size)), panel)
        if panel.modality != previous:
            spec = MODALITIES[panel.modality]
            label = f"{spec.title} ({spec.unit})" if spec.unit else spec.title
            figure.text(left / width, (cell_top - 0.08) / height, label, fontsize=9, weight="bold", va="top")
        previous = panel.modality
    x = 1 - 0.2 / width
    for level in sorted(levels & set(PRODUCT_LEVELS), reverse=True):
        figure.text(x, 1 - 0.14 / height, level.upper(), color=COLOURS[level], ha="right", va="top", weight="bold")
        x -= 0.5 / width
    if empty:
        text = "no data: " + _names(empty, {panel.modality for panel in panels})
        figure.text(0.2 / width, 0.08 / height, "\n".join(textwrap.wrap(text, FOOT_CHARACTERS)), fontsize=8, color=QUIET)
    return figure


def _names(empty: list[_Panel], drawn: set[str]) -> str:
    """The modalities without values; of one that has some, the bands without."""
    bands: dict[str, list[str]] = {}
    for panel in empty:
        bands.setdefault(panel.modality, []).append(panel.title)
    parts = [f"{MODALITIES[m].title} {' '.join(names)}" if m in drawn else MODALITIES[m].title for m, names in bands.items()]
    return "; ".join(parts)


def _draw(axes: Axes, panel: _Panel) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_yticks([])
    axes.tick_params(labelsize=6.5, length=2, pad=1)
    spec = MODALITIES[panel.modality]
    share = f"{100 * panel.num / panel.num_possible:.3g} %"
    axes.text(0, 1.04, "" if spec.one_hot else panel.title.replace("_", " "), transform=axes.transAxes, fontsize=6.5)
    axes.text(1, 0.99, share, transform=axes.transAxes, fontsize=6.5, ha="right", va="top", color=QUIET)
    if spec.kind == "categorical":
        _draw_classes(axes, panel)
    else:
        _draw_values(axes, panel.groups)
    axes.set_ylim(0, axes.get_ylim()[1] * HEADROOM)


def _draw_classes(axes: Axes, panel: _Panel) -> None:
    spec, values = MODALITIES[panel.modality], panel.groups[None]
    codes, counts = np.unique(values, return_counts=True)
    if spec.classes:
        known = {c.code: (i, c.colour) for i, c in enumerate(spec.classes)}
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            if code in known:
                axes.bar(known[code][0], count, color=known[code][1], width=0.85)
        axes.set_xticks(range(len(spec.classes)), [str(c.code) for c in spec.classes], fontsize=5.5)
        axes.set_xlim(-0.6, len(spec.classes) - 0.4)
        return
    last = (spec.num_classes or int(codes.max()) + 1) - 1
    axes.vlines(codes, 0, counts, color=COLOURS[None], linewidth=1 if last > 60 else 4)
    axes.set_xlim(-0.6, last + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_values(axes: Axes, groups: dict[str | None, np.ndarray]) -> None:
    together = np.concatenate([values.astype(np.float64) for values in groups.values()])
    low, high = np.percentile(together, RANGE_PERCENTILES)
    is_integer = all(values.dtype.kind in "iu" for values in groups.values())
    if is_integer and high - low < NUM_BINS:
        edges = np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, NUM_BINS + 1)
    for level, values in groups.items():
        counts, _ = np.histogram(np.clip(values.astype(np.float64), edges[0], np.nextafter(edges[-1], low)), edges)
        axes.stairs(counts, edges, fill=True, color=COLOURS[level], alpha=0.55 if len(groups) > 1 else 0.9)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=is_integer))
