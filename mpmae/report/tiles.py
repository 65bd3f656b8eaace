"""A reconstructed tile as rows of pictures with their legends, errors and captions, ready for the page.

Shapes: C bands, H = W size of a map in its own pixels, G patches on a side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mpmae.domains import loss_order, map_modality, target_domain
from mpmae.modalities import MODALITIES
from mpmae.report.data import TilePicture
from mpmae.report.looks import Layer, Look, ScaleLegend, looks_of
from mpmae.report.pictures import cover, dots, enlarge, hatch, png_data_uri
from mpmae.report.vectors import VectorTables, degrees_text, vector_tables

PICTURE_SIDE_PX = 224
STRIP_SIDE_PX = 112
_NOTHING_HIDDEN = "No hidden pixel has data to compare with."


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


@dataclass
class Row:
    """One way of looking at one map. `is_input`: the encoder was given it."""

    title: str
    detail: str = ""
    error: str = ""
    is_input: bool = False
    figures: list[Figure] = field(default_factory=list)
    classes: list[LegendClass] = field(default_factory=list)
    scale: ScaleLegend | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StripRow:
    """What some inputs alone gave: a picture for each map, with its error as the title."""

    title: str
    detail: str
    figures: list[Figure]


@dataclass(frozen=True)
class Strip:
    """Maps predicted from single inputs: rows of pictures below the names of the maps, what is there first."""

    columns: list[str]
    rows: list[StripRow]


@dataclass(frozen=True)
class TileView:
    """One tile of the page; `absent` are titles of what has no data here, `inputs` rows of what the encoder was given."""

    title: str
    facts: str
    absent: list[str]
    inputs: list[Row]
    others: list[Row]
    tables: VectorTables
    strip: Strip | None


def tile_view(tile: TilePicture) -> TileView:
    """Everything the page shows of `tile`, maps in the order of their tables."""
    names = sorted(loss_order(tile.maps), key=lambda name: map_modality(name).kind == "categorical")
    looks = {name: looks_of(name, tile.maps[name]) for name in names}  # land-cover maps side by side
    rows = [_row(tile, name, look) for name, of_map in looks.items() for look in of_map if not look.absent]
    return TileView(
        title=tile.tile_id,
        facts=_facts(tile),
        absent=[look.title for of_map in looks.values() for look in of_map if look.absent],
        inputs=[row for row in rows if row.is_input],
        others=[row for row in rows if not row.is_input],
        tables=vector_tables(tile.vectors),
        strip=_strip(tile, looks),
    )


def _facts(tile: TilePicture) -> str:
    """The line below the tile's name."""
    pixel_m = MODALITIES["sentinel2"].gsd_m
    facts = [
        f"{tile.split} split",
        f"Sentinel-2 {tile.product_level.upper()}",
        f"{tile.size_px} x {tile.size_px} px at {pixel_m} m = {tile.size_px * pixel_m:,} m across",
    ]
    if isinstance(tile.visible, Mapping):
        seen = {name: int(np.sum(tile.visible_of(name))) for name in tile.inputs}
        num_patches = len(seen) * tile.num_patches_side**2
        each = ", ".join(f"{name} {num}" for name, num in seen.items())
        facts.append(f"{sum(seen.values())} of {num_patches} patches visible: {each}")
    else:
        hidden_percent = 100 * (1 - np.mean(tile.visible)) if np.size(tile.visible) else 0.0
        facts.append(f"{hidden_percent:.0f} % of {np.size(tile.visible)} patches hidden")
    if tile.lat is not None and tile.lon is not None:
        facts.insert(0, f"{degrees_text('lat', tile.lat)} {degrees_text('lon', tile.lon)}")
    if tile.place:
        facts.insert(0, tile.place)
    return " · ".join(facts)


def _row(tile: TilePicture, name: str, look: Look) -> Row:
    """A look with the pictures of the tile, left to right, without those of a prediction where there is none."""
    row = Row(look.title, look.detail, scale=look.scale, notes=look.notes)
    if look.target is None:
        return row
    row.is_input = target_domain(name) in tile.inputs
    hidden = tile.hidden_pixels(name)
    factor = max(1, round(PICTURE_SIDE_PX / len(hidden)))
    hidden_large, side = enlarge(hidden, factor), len(hidden) * factor
    whole = enlarge(look.paint(look.target), factor)
    pixels = tile.size_px // len(hidden)
    if pixels > 1:
        row.detail = f"One pixel of the map is {pixels} x {pixels} of the image. {row.detail}".rstrip()
    pictures = {}
    if row.is_input:
        pictures["Seen by the encoder"] = cover(whole, hidden_large, hatch(side))
    if look.prediction is not None:
        filled = Layer(*(np.where(hidden, *layers) for layers in zip(look.prediction, look.target, strict=True)))
        pictures["Prediction"] = cover(enlarge(look.paint(look.prediction), factor), ~hidden_large, dots(side))
        if row.is_input or not hidden.all():
            pictures["Filled in"] = enlarge(look.paint(filled), factor)
        row.error = "; ".join(look.error(hidden) or [_NOTHING_HIDDEN])
        if look.classes:
            row.classes = _shares(name, look, hidden)
    pictures["Target"] = whole
    for title, picture in pictures.items():
        row.figures.append(Figure(title, png_data_uri(picture), f"{row.title}, {title.lower()}, tile {tile.tile_id}"))
    return row


def _shares(name: str, look: Look, hidden: np.ndarray) -> list[LegendClass]:
    """The classes that are drawn, with their shares of the hidden pixels."""
    (truth, is_truth), (guess, is_guess) = ((layer.values[0], layer.is_data) for layer in (look.target, look.prediction))
    compared, found = hidden & is_truth & is_guess, []
    for class_id, land_class in enumerate(map_modality(name).classes):
        if any(np.any(ids == class_id) for ids in (truth[is_truth], guess[is_guess & hidden])):
            parts = [ids[compared] == class_id for ids in (truth, guess)]
            shares = [100 * float(np.mean(part)) if part.size else None for part in parts]
            found.append(LegendClass(land_class.name, land_class.colour, *shares))
    return found


def _strip(tile: TilePicture, looks: Mapping[str, list[Look]]) -> Strip | None:
    """The first look of every map that was predicted from single inputs; None where there is no such prediction."""
    predicted = {name for one in tile.from_inputs for name in one.predictions}
    first = {name: next((i for i, look in enumerate(looks[name]) if look.target), None) for name in looks}
    shown = {name: i for name, i in first.items() if i is not None and name in predicted}
    if not shown:
        return None
    rows = [StripRow("Target", "", [_cell(tile, looks[name][i], "Target") for name, i in shown.items()])]
    for one in tile.from_inputs:
        predicted = {name: replace(tile.maps[name], prediction=values) for name, values in one.predictions.items()}
        found = {name: looks_of(name, predicted[name])[i] if name in predicted else None for name, i in shown.items()}
        cells = [_cell(tile, look or looks[name][shown[name]], one.title, bool(look)) for name, look in found.items()]
        rows.append(StripRow(one.title, ", ".join(one.inputs) if len(one.inputs) > 1 else "", cells))
    return Strip(list(shown), rows)


def _cell(tile: TilePicture, look: Look, row: str, is_prediction: bool | None = None) -> Figure:
    """A picture of a strip: of the target; or of the prediction with its error, dotted where the map is the row's input."""
    alt = f"{look.title}, {row.lower() if is_prediction is None else f'from {row}'}, tile {tile.tile_id}"
    num_pixels = len(look.target.is_data)
    factor = max(1, round(STRIP_SIDE_PX / num_pixels))
    if is_prediction is False:
        return Figure("", png_data_uri(dots(num_pixels * factor)), f"{alt}: is the input itself")
    layer = look.prediction if is_prediction else look.target
    error = look.error(np.ones(layer.is_data.shape, bool)) if is_prediction else None
    return Figure(error[0] if error else "", png_data_uri(enlarge(look.paint(layer), factor)), alt)
