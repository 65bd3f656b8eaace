"""A reconstructed tile as rows of pictures with their legends, errors and captions, ready for the page.

Shapes: C bands, H = W image size in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mpmae.modalities import MODALITIES, ModalitySpec
from mpmae.report.data import MapTriple, TilePicture
from mpmae.report.pictures import (
    ColourScale,
    Stretch,
    class_map,
    colour_composite,
    cover,
    dots,
    enlarge,
    hatch,
    png_data_uri,
    relief_map,
    scalar_map,
    scale_bar,
)
from mpmae.report.vectors import VectorTables, degrees_text, vector_tables

PICTURE_SIDE_PX = 224
_MIN_REFLECTANCE_SPAN = 0.05  # a dark, even tile must not become coloured noise
_REFLECTANCE = 1e-4  # Sentinel-2 digital number -> reflectance
# Usual backscatter of land, in dB: (low, high) of the co-polarised band, the cross-polarised band and their difference.
RADAR_RANGE_DB = ((-22.0, -2.0), (-29.0, -8.0), (0.0, 12.0))
RADAR_ORBITS = {"asc": "ascending pass", "desc": "descending pass"}
OPTICAL_LOOKS = {"true colour": ("B4", "B3", "B2"), "false colour": ("B8", "B4", "B3")}
# modality -> band -> (title, unit, colour map)
BAND_LOOKS = {
    "aster": {"elevation": ("Elevation", "m", "gist_earth"), "slope": ("Slope", "degrees", "magma")},
    "canopy_height_eth": {"height": ("Canopy height", "m", "YlGn")},
}
_MIN_SCALE_SPAN = 10.0  # m or degrees: flat land must not be shown as relief
_NOTHING_HIDDEN = "No hidden pixel has data to compare with."


class Layer(NamedTuple):
    """What one picture is painted from: `values` [C, H, W] in raw units or class ids, `is_data` bool [H, W]."""

    values: np.ndarray
    is_data: np.ndarray

    def values_or(self, filler: float) -> np.ndarray:
        """The values [C, H, W] with `filler` where there is no data."""
        return np.where(self.is_data, self.values, filler)


Paint = Callable[[Layer], np.ndarray]


@dataclass(frozen=True)
class Figure:
    """One picture of a row."""

    title: str
    uri: str
    alt: str


@dataclass(frozen=True)
class LegendClass:
    """A class of a land-cover row with its share of the hidden pixels, in percent, None where there is no data."""

    name: str
    colour: str
    target_percent: float | None
    prediction_percent: float | None


@dataclass(frozen=True)
class ScaleLegend:
    """A colour bar: picture, ends and unit."""

    uri: str
    low: str
    high: str
    unit: str


@dataclass
class Row:
    """One way of looking at one modality. `absent`: the tile has no data for it. `is_input`: the encoder saw part of it."""

    title: str
    detail: str = ""
    error: str = ""
    is_input: bool = False
    absent: bool = False
    figures: list[Figure] = field(default_factory=list)
    classes: list[LegendClass] = field(default_factory=list)
    scale: ScaleLegend | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TileView:
    """One tile of the page; `absent` are titles of what has no data here, `inputs` rows the encoder saw part of."""

    title: str
    facts: str
    absent: list[str]
    inputs: list[Row]
    others: list[Row]
    tables: VectorTables


def tile_view(tile: TilePicture) -> TileView:
    """Everything the page shows of `tile`, modalities in the order of the modality table."""
    hidden_percent = 100 * (1 - np.mean(tile.visible)) if np.size(tile.visible) else 0.0
    pixel_m = MODALITIES["sentinel2"].gsd_m
    facts = [
        f"{tile.split} split",
        f"Sentinel-2 {tile.product_level.upper()}",
        f"{tile.size_px} x {tile.size_px} px at {pixel_m} m = {tile.size_px * pixel_m:,} m across",
        f"{hidden_percent:.0f} % of {np.size(tile.visible)} patches hidden",
    ]
    if tile.lat is not None and tile.lon is not None:
        facts.insert(0, f"{degrees_text('lat', tile.lat)} {degrees_text('lon', tile.lon)}")
    if tile.place:
        facts.insert(0, tile.place)
    specs = [spec for name, spec in MODALITIES.items() if name in tile.maps]
    specs.sort(key=lambda spec: spec.kind == "categorical")  # land-cover maps side by side
    rows = [row for spec in specs for row in _rows(tile, spec)]
    shown = [row for row in rows if not row.absent]
    return TileView(
        title=tile.tile_id,
        facts=" · ".join(facts),
        absent=[row.title for row in rows if row.absent],
        inputs=[row for row in shown if row.is_input],
        others=[row for row in shown if not row.is_input],
        tables=vector_tables(tile.vectors),
    )


def _rows(tile: TilePicture, spec: ModalitySpec) -> list[Row]:
    triple = tile.maps[spec.name]
    if not np.any(triple.valid):
        return [Row(spec.title, absent=True)]
    elif spec.kind == "categorical":
        rows = [_class_row(tile, spec)]
    elif spec.name == "sentinel2":
        rows = [_optical_row(tile, look, bands) for look, bands in OPTICAL_LOOKS.items()]
    elif spec.name == "sentinel1":
        rows = [row for orbit in RADAR_ORBITS for row in _radar_rows(tile, orbit)]
    else:
        looks = BAND_LOOKS.get(spec.name) or {band: (f"{spec.title}, {band}", spec.unit, "viridis") for band in triple.bands}
        rows = [_band_row(tile, spec, band, *look) for band, look in looks.items() if band in triple.bands]
    if triple.note and rows:
        rows[0].notes.append(triple.note)
    return rows


def _optical_row(tile: TilePicture, look: str, bands: tuple[str, ...]) -> Row:
    spec, triple = MODALITIES["sentinel2"], tile.maps["sentinel2"]
    row = Row(f"{spec.title}, {look}", f"Red {bands[0]}, green {bands[1]}, blue {bands[2]}.")
    absent = [band for band in bands if band not in triple.bands]
    if absent:
        row.notes.append(f"Not shown: {', '.join(absent)} neither read by the encoder nor reconstructed.")
        return row
    target, prediction = (Layer(layer.values * _REFLECTANCE, layer.is_data) for layer in _bands(triple, bands))
    if not target.is_data.any():
        row.absent = True
        return row
    stretch = Stretch.of(target.values, np.broadcast_to(target.is_data, target.values.shape), _MIN_REFLECTANCE_SPAN)
    low, high = max(stretch.low.min(), 0.0), stretch.high.max()
    input_only = [band for band in bands if band in triple.input_only]
    if input_only:
        row.notes.append(f"No prediction: {', '.join(input_only)} not among the reconstructed bands.")
    row.detail += f" Stretched from the target's 2nd to its 98th percentile: reflectance {low:.2f} to {high:.2f}."
    shown = None if input_only else prediction
    _add_figures(row, tile, spec.name, target, shown, lambda layer: colour_composite(*layer, stretch))
    if not input_only:
        row.error = _rmse_text(tile, target, prediction, "", decimals=4)
    return row


def _radar_rows(tile: TilePicture, orbit: str) -> list[Row]:
    spec, triple, rows = MODALITIES["sentinel1"], tile.maps["sentinel1"], []
    stretch = Stretch(*np.array(RADAR_RANGE_DB).T)
    title = f"{spec.title}, {RADAR_ORBITS[orbit]}"
    for co, cross in (("VV", "VH"), ("HH", "HV")):
        bands = (f"{orbit}_{co}", f"{orbit}_{cross}")
        if not set(bands) <= set(triple.bands):
            continue
        target, prediction = _bands(triple, bands)
        if not target.is_data.any():
            continue
        ranges = [f"{low:g} to {high:g}" for low, high in RADAR_RANGE_DB]
        detail = f"Red {co} {ranges[0]}, green {cross} {ranges[1]}, blue {co} - {cross} {ranges[2]} dB."
        row = Row(title, detail.replace("-", "\N{MINUS SIGN}"))
        _add_figures(row, tile, spec.name, target, prediction, lambda layer: _radar_composite(layer, stretch))
        row.error = _rmse_text(tile, target, prediction, "dB", decimals=1)
        rows.append(row)
    return rows or [Row(title, absent=True)]


def _band_row(tile: TilePicture, spec: ModalitySpec, band: str, title: str, unit: str, colormap: str) -> Row:
    target, prediction = _bands(tile.maps[spec.name], (band,))
    row = Row(title)
    if not target.is_data.any():
        row.absent = True
        return row
    is_elevation = band == "elevation"
    scale = ColourScale.of(target.values[0], target.is_data, colormap, _MIN_SCALE_SPAN, from_zero=not is_elevation)
    if is_elevation:
        row.detail = "Tinted by height, lit from the north-west; one scale for all pictures of the row."

        def paint(layer: Layer) -> np.ndarray:
            return relief_map(layer.values[0], layer.is_data, scale, pixel_m=MODALITIES["sentinel2"].gsd_m)
    else:

        def paint(layer: Layer) -> np.ndarray:
            return scalar_map(layer.values[0], layer.is_data, scale)

    _add_figures(row, tile, spec.name, target, prediction, paint)
    row.scale = ScaleLegend(png_data_uri(scale_bar(scale)), f"{scale.low:,.0f}", f"{scale.high:,.0f}", unit)
    row.error = _rmse_text(tile, target, prediction, unit, decimals=1)
    return row


def _class_row(tile: TilePicture, spec: ModalitySpec) -> Row:
    triple, row = tile.maps[spec.name], Row(spec.title)
    target = Layer(triple.target[None], np.asarray(triple.valid) & (triple.target >= 0))
    prediction = Layer(triple.prediction[None], triple.prediction >= 0)
    _add_figures(row, tile, spec.name, target, prediction, lambda layer: class_map(layer.values_or(-1)[0], spec))
    compared = tile.hidden_pixels & target.is_data & prediction.is_data
    truth, guess = triple.target[compared], triple.prediction[compared]
    for class_id, land_class in enumerate(spec.classes):
        drawn = (triple.target[target.is_data], triple.prediction[prediction.is_data & tile.hidden_pixels])
        if any(np.any(ids == class_id) for ids in drawn):
            shares = [100 * float(np.mean(ids == class_id)) if ids.size else None for ids in (truth, guess)]
            row.classes.append(LegendClass(land_class.name, land_class.colour, *shares))
    if truth.size:
        commonest = np.bincount(truth.astype(np.int64)).max() / truth.size
        right = np.mean(truth == guess)
        row.error = f"{100 * right:.0f} % of pixels right; always the commonest class: {100 * commonest:.0f} %"
    else:
        row.error = _NOTHING_HIDDEN
    return row


def _bands(triple: MapTriple, bands: tuple[str, ...]) -> tuple[Layer, Layer]:
    """Target and prediction of some bands."""
    index = [triple.bands.index(band) for band in bands]
    target, prediction = (np.asarray(x)[index].astype(np.float64) for x in (triple.target, triple.prediction))
    target_is_data = (np.asarray(triple.valid)[index] & np.isfinite(target)).all(axis=0)
    return Layer(target, target_is_data), Layer(prediction, np.isfinite(prediction).all(axis=0))


def _radar_composite(layer: Layer, stretch: Stretch) -> np.ndarray:
    co, cross = layer.values_or(0.0)
    return colour_composite(np.stack([co, cross, co - cross]), layer.is_data, stretch)


def _add_figures(row: Row, tile: TilePicture, name: str, target: Layer, prediction: Layer | None, paint: Paint) -> None:
    """The row's pictures, left to right, without those of a prediction where there is none; `paint` gives [H, W, 3]."""
    factor = max(1, round(PICTURE_SIDE_PX / tile.size_px))
    hidden = tile.hidden_pixels
    hidden_large, side = enlarge(hidden, factor), tile.size_px * factor
    whole = enlarge(paint(target), factor)
    pictures = {}
    row.is_input = name in tile.inputs
    if row.is_input:
        pictures["Seen by the encoder"] = cover(whole, hidden_large, hatch(side))
    if prediction is not None:
        filled = Layer(*(np.where(hidden, *layers) for layers in zip(prediction, target, strict=True)))
        pictures["Prediction"] = cover(enlarge(paint(prediction), factor), ~hidden_large, dots(side))
        pictures["Filled in"] = enlarge(paint(filled), factor)
    pictures["Target"] = whole
    for title, picture in pictures.items():
        row.figures.append(Figure(title, png_data_uri(picture), f"{row.title}, {title.lower()}, tile {tile.tile_id}"))


def _rmse_text(tile: TilePicture, target: Layer, prediction: Layer, unit: str, decimals: int) -> str:
    compared = tile.hidden_pixels & target.is_data & prediction.is_data
    if not compared.any():
        return _NOTHING_HIDDEN
    truth, guess = target.values[:, compared], prediction.values[:, compared]
    rmse = np.sqrt(np.mean((guess - truth) ** 2))
    spread = np.sqrt(np.mean((truth - truth.mean(axis=1, keepdims=True)) ** 2))
    space = "\N{NO-BREAK SPACE}" if unit else ""
    return f"RMSE {rmse:,.{decimals}f}{space}{unit}; spread of the target {spread:,.{decimals}f}{space}{unit}"
