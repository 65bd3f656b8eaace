"""A PNG of a few tiles of a shard set, a row per tile and a column per modality.

Shapes: P tile side in pixels.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LightSource, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mpmae.modalities import MODALITIES
from mpmae.shard_tools.output import disk_errors
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.tile import Tile

CELL_INCHES, LABEL_INCHES, DPI = 1.75, 1.55, 110
GREY = 0.82
# Below this spread (reflectance x 10,000) a tile is shown flat rather than as stretched noise.
MIN_SPREAD = 900
VV_DB, VH_DB, RATIO_DB = (-23, 1), (-31, -5), (-2, 18)
CANOPY_MAX_M = 35
METRES_PER_PIXEL = 10


def contact_sheet(shards_dir: str | Path, png: str | Path, split: str | None = None, num_tiles: int = 6) -> Path:
    """Draw the first `num_tiles` samples of a split (None: the first split with samples) to the file `png`.

    Samples are shuffled when they are written, so the first ones are a fair choice. ShardError for an unknown or empty
    split, a damaged set, or a file that cannot be written.
    """
    shard_set, png = ShardSet(shards_dir), Path(png)
    split = shard_set.split_to_draw(split, num_tiles)
    columns = {name: draw for name, draw in _COLUMNS.items() if name in shard_set.modalities}
    tiles = list(islice(shard_set.tiles(split), num_tiles))

    width = LABEL_INCHES + CELL_INCHES * len(columns)
    top_inches, bottom_inches = 0.75, 0.95
    height = CELL_INCHES * len(tiles) + top_inches + bottom_inches
    figure = Figure((width, height), facecolor="white")
    axes = figure.subplots(
        len(tiles),
        len(columns),
        squeeze=False,
        gridspec_kw={
            "left": LABEL_INCHES / width,
            "right": 1 - 0.1 / width,
            "bottom": bottom_inches / height,
            "top": 1 - top_inches / height,
            "wspace": 0.05,
            "hspace": 0.05,
        },
    )
    bands = {entry.name: entry.bands for entry in shard_set.manifest.pixels}
    for row, tile in zip(axes, tiles, strict=True):
        for cell, (name, draw) in zip(row, columns.items(), strict=True):
            _empty(cell)
            valid = shard_set.no_data(name).valid(tile.values[name])
            if valid.any():
                draw(cell, bands[name], tile.values[name], valid)
            else:
                cell.text(0.5, 0.5, "no data", ha="center", va="center", color="0.4", transform=cell.transAxes)
        row[0].text(-0.05, 0.5, _label(tile), ha="right", va="center", fontsize=8, transform=row[0].transAxes)
    for cell, name in zip(axes[0], columns, strict=True):
        cell.set_title(_TITLES.get(name, MODALITIES[name].title), fontsize=9)
    manifest = shard_set.manifest
    counts = f"{len(tiles)} of {shard_set.num_tiles(split):,} samples, {manifest.tile_size_px} px"
    title = f"{manifest.source.name}, {split}: {counts}"
    figure.text(0.1 / width, 1 - 0.12 / height, title, ha="left", va="top", fontsize=11, weight="bold")
    _legends(figure, tiles, columns, height)
    with disk_errors(str(png), png.parent):
        figure.savefig(png, dpi=DPI, metadata={"Software": None})
    return png


def _empty(cell: Axes) -> None:
    cell.set_xticks([])
    cell.set_yticks([])
    cell.set_facecolor(str(GREY))
    for side in cell.spines.values():
        side.set_color("0.6")


def _label(tile: Tile) -> str:
    name = tile.tile_id.decode(errors="replace")
    lines = [name[i : i + 18] for i in range(0, len(name), 18)][:3]
    lines.append(tile.product_level.decode(errors="replace").upper())
    angles = {n: np.degrees(np.arctan2(*tile.values[n])) for n in ("lat", "lon") if n in tile.values}
    if len(angles) == 2 and np.isfinite(list(angles.values())).all():
        lat, lon = angles["lat"], angles["lon"]
        lines.append(f"{abs(lat):.1f}°{'N' if lat >= 0 else 'S'} {abs(lon):.1f}°{'E' if lon >= 0 else 'W'}")
    month = tile.values.get("month")
    if month is not None and np.isfinite(month).all():
        lines.append(f"month {round(float(np.degrees(np.arctan2(*month)) / 30)) % 12 or 12}")
    return "\n".join(lines)


def _note(cell: Axes, text: str) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.2}
    cell.text(0.03, 0.04, text, fontsize=7, transform=cell.transAxes, bbox=box)


def _with_gaps(rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid[..., None], np.clip(rgb, 0, 1), GREY)


def _draw_sentinel2(cell: Axes, bands: Sequence[str], values: np.ndarray, valid: np.ndarray) -> None:
    rows = [bands.index(band) for band in ("B4", "B3", "B2") if band in bands]
    rgb, shown = values[rows].astype(np.float32), valid[rows].all(axis=0)
    if len(rows) < 3 or not shown.any():
        cell.text(0.5, 0.5, "no B4 B3 B2", ha="center", va="center", color="0.4", transform=cell.transAxes)
        return
    # Half of a stretch per band takes the haze of L1C away, half of a common one keeps the hue.
    floor, ceiling = np.percentile(rgb[:, shown], (1, 99), axis=1)
    floor = (floor + floor.min()) / 2
    spread = np.maximum((ceiling - floor + (ceiling - floor).max()) / 2, MIN_SPREAD)
    image = (rgb - floor[:, None, None]) / spread[:, None, None]
    cell.imshow(_with_gaps(np.moveaxis(np.clip(image, 0, 1) ** 0.8, 0, -1), shown), interpolation="nearest")


def _draw_sentinel1(cell: Axes, bands: Sequence[str], values: np.ndarray, valid: np.ndarray) -> None:
    pairs = [i for i in range(len(bands) - 1) if bands[i + 1] == bands[i].replace("_VV", "_VH").replace("_HH", "_HV")]
    first = next((i for i in pairs if valid[i : i + 2].any(axis=(1, 2)).all()), None)
    if first is None:
        i = int(np.flatnonzero(valid.any(axis=(1, 2)))[0])
        grey = (values[i] - VV_DB[0]) / (VV_DB[1] - VV_DB[0])
        cell.imshow(_with_gaps(np.repeat(grey[..., None], 3, axis=-1), valid[i]), interpolation="nearest")
        _note(cell, bands[i].replace("_", " "))
        return
    shown = valid[first : first + 2].all(axis=0)
    co, cross = (np.where(shown, band, 0) for band in values[first : first + 2])
    channels = [(x - low) / (high - low) for x, (low, high) in ((co, VV_DB), (cross, VH_DB), (co - cross, RATIO_DB))]
    cell.imshow(_with_gaps(np.stack(channels, axis=-1), shown), interpolation="nearest")
    orbit, polarisation = bands[first].split("_")
    _note(cell, f"{orbit} {polarisation}/{bands[first + 1].split('_')[1]}")


def _draw_aster(cell: Axes, bands: Sequence[str], values: np.ndarray, valid: np.ndarray) -> None:
    shown = valid[0]
    if not shown.any():
        return
    low, high = float(values[0][shown].min()), float(values[0][shown].max())
    height = np.where(shown, values[0], low).astype(np.float32)
    light = LightSource(azdeg=315, altdeg=45)
    rgb = light.shade(
        height,
        cmap=colormaps["gist_earth"],
        vmin=low - 0.4 * max(high - low, 20),
        vmax=low + 1.15 * max(high - low, 20),
        blend_mode="soft",
        vert_exag=2,
        dx=METRES_PER_PIXEL,
        dy=METRES_PER_PIXEL,
    )[..., :3]
    cell.imshow(_with_gaps(rgb, shown), interpolation="nearest")
    _note(cell, f"{low:.0f} to {high:.0f} m")


def _draw_canopy(cell: Axes, bands: Sequence[str], values: np.ndarray, valid: np.ndarray) -> None:
    rgb = colormaps["YlGn"](np.clip(values[0] / CANOPY_MAX_M, 0, 1))[..., :3]
    cell.imshow(_with_gaps(rgb, valid[0]), interpolation="nearest")
    if valid[0].any():
        _note(cell, f"up to {values[0][valid[0]].max():.0f} m")


def _draw_classes(name: str) -> Callable[[Axes, Sequence[str], np.ndarray, np.ndarray], None]:
    palette = np.full((256, 3), GREY)
    for land_class in MODALITIES[name].classes:
        palette[land_class.code] = to_rgb(land_class.colour)

    def draw(cell: Axes, bands: Sequence[str], values: np.ndarray, valid: np.ndarray) -> None:
        codes = np.clip(values[0].astype(np.int64), 0, 255)
        cell.imshow(_with_gaps(palette[codes], valid[0]), interpolation="nearest")

    return draw


_COLUMNS: dict[str, Callable[[Axes, Sequence[str], np.ndarray, np.ndarray], None]] = {
    "sentinel2": _draw_sentinel2,
    "sentinel1": _draw_sentinel1,
    "sentinel1_rtc": _draw_sentinel1,
    "aster": _draw_aster,
    "dem": _draw_aster,
    "canopy_height_eth": _draw_canopy,
    "dynamic_world": _draw_classes("dynamic_world"),
    "esa_worldcover": _draw_classes("esa_worldcover"),
}
_TITLES = {
    "sentinel2": "Sentinel-2\nB4 B3 B2, stretched",
    "sentinel1": "Sentinel-1\nVV, VH, VV - VH",
    "aster": "Elevation\nper-tile range",
    "canopy_height_eth": f"Canopy height\n0 to {CANOPY_MAX_M} m",
    "dynamic_world": "Dynamic World\n",
    "esa_worldcover": "ESA WorldCover\n",
}


def _legends(figure: Figure, tiles: list[Tile], columns: dict, height: float) -> None:
    """The classes that occur, at the foot of the sheet."""
    y = 0.9 / height
    for name in ("dynamic_world", "esa_worldcover"):
        if name not in columns:
            continue
        codes = np.unique(np.concatenate([np.unique(tile.values[name]) for tile in tiles]))
        patches = [Patch(color=c.colour, label=c.name) for c in MODALITIES[name].classes if c.code in codes]
        if patches:
            legend = figure.legend(
                handles=patches,
                loc="upper left",
                bbox_to_anchor=(0.0, y),
                ncols=len(patches),
                fontsize=7.5,
                frameon=False,
                title=MODALITIES[name].title,
                title_fontsize=7.5,
                alignment="left",
                handlelength=1,
                columnspacing=1.2,
            )
            figure.add_artist(legend)
            y -= 0.42 / height
