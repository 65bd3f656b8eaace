"""Ways of looking at a map: which bands become which colours, the legend, and the error in the map's own unit.

Shapes: C bands, H = W size of a map in its own pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mpmae.domains import map_modality, title_of
from mpmae.modalities import MODALITIES, ModalitySpec
from mpmae.report.data import MapTriple
from mpmae.report.pictures import (
    ColourScale,
    Stretch,
    class_map,
    colour_composite,
    png_data_uri,
    relief_map,
    scalar_map,
    scale_bar,
)

_MIN_REFLECTANCE_SPAN = 0.05  # a dark, even tile must not become coloured noise
_REFLECTANCE = 1e-4  # Sentinel-2 digital number -> reflectance
# Usual backscatter of land, in dB: (low, high) of the co-polarised band, the cross-polarised band and their difference.
RADAR_RANGE_DB = ((-22.0, -2.0), (-29.0, -8.0), (0.0, 12.0))
RADAR_ORBITS = {"asc": "ascending pass", "desc": "descending pass"}
_RADARS = ("sentinel1", "sentinel1_rtc")
OPTICAL_LOOKS = {"true colour": ("B4", "B3", "B2"), "false colour": ("B8", "B4", "B3")}
# Red, green and blue of the views of Sentinel-2: of two bands one is red, the other cyan, and grey says that both agree.
OPTICAL_VIEWS = {
    "rgb": ("B4", "B3", "B2"),
    "norm_rgb": ("B4", "B3", "B2"),
    "ired": ("B7", "B6", "B5"),
    "sired": ("B12", "B11", "B11"),
    "ebands": ("B8", "B8A", "B8A"),
}
_MIN_SCALE_SPAN = 10.0  # m or degrees: flat land must not be shown as relief
_INPUT_ALONE = "An input alone: the model does not reconstruct it."


class BandLook(NamedTuple):
    """How one band is shown; `span` is a fixed range of the colours, None for the target's own."""

    title: str
    unit: str
    colormap: str
    span: tuple[float, float] | None = None
    decimals: int = 1


# modality -> band -> its look
BAND_LOOKS = {
    "aster": {"elevation": BandLook("Elevation", "m", "gist_earth"), "slope": BandLook("Slope", "degrees", "magma")},
    "dem": {"elevation": BandLook("Copernicus elevation", "m", "gist_earth")},
    "canopy_height_eth": {"height": BandLook("Canopy height", "m", "YlGn")},
    "ndvi": {"NDVI": BandLook("NDVI", "", "RdYlGn", (-0.2, 1.0), 2)},
}


class Layer(NamedTuple):
    """What one picture is painted from: `values` [C, H, W] in raw units or class ids, `is_data` bool [H, W]."""

    values: np.ndarray
    is_data: np.ndarray

    def values_or(self, filler: float) -> np.ndarray:
        """The values [C, H, W] with `filler` where there is no data."""
        return np.where(self.is_data, self.values, filler)


@dataclass(frozen=True)
class ScaleLegend:
    """A colour bar: picture, ends and unit."""

    uri: str
    low: str
    high: str
    unit: str


@dataclass
class Look:
    """One way of looking at one map. `absent`: the tile has no data for it, and the rest is empty.

    paint: a layer -> picture uint8 [H, W, 3]. classes: of a land-cover map. unit, decimals: of errors.
    """

    title: str
    absent: bool = False
    target: Layer | None = None
    prediction: Layer | None = None
    paint: Callable[[Layer], np.ndarray] | None = None
    detail: str = ""
    notes: list[str] = field(default_factory=list)
    scale: ScaleLegend | None = None
    classes: bool = False
    unit: str = ""
    decimals: int = 1

    def error(self, where: np.ndarray) -> tuple[str, str] | None:
        """How wrong the prediction is and what to hold it against, over the pixels `where` (bool [H, W]) with data."""
        compared = where & self.target.is_data & self.prediction.is_data
        if not compared.any():
            return None
        truth, guess = self.target.values[:, compared], self.prediction.values[:, compared]
        if self.classes:
            commonest = np.bincount(truth[0].astype(np.int64)).max() / truth.size
            return (
                f"{100 * np.mean(truth == guess):.0f} % of pixels right",
                f"always the commonest class: {100 * commonest:.0f} %",
            )
        rmse = np.sqrt(np.mean((guess - truth) ** 2))
        spread = np.sqrt(np.mean((truth - truth.mean(axis=1, keepdims=True)) ** 2))
        space = "\N{NO-BREAK SPACE}" if self.unit else ""
        wrong, beside = (f"{value:,.{self.decimals}f}{space}{self.unit}" for value in (rmse, spread))
        return f"RMSE {wrong}", f"spread of the target {beside}"


def looks_of(name: str, triple: MapTriple) -> list[Look]:
    """All looks at a map of that name."""
    spec = map_modality(name)
    if not np.any(triple.valid):
        return [Look(title_of(name), absent=True)]
    if spec.kind == "categorical":
        looks = [_class_look(name, spec, triple)]
    elif name == "sentinel2":
        looks = [_optical_look(f"{spec.title}, {look}", triple, bands) for look, bands in OPTICAL_LOOKS.items()]
    elif name in OPTICAL_VIEWS:
        looks = [_optical_look(title_of(name), triple, OPTICAL_VIEWS[name])]
    elif spec.name in _RADARS:
        looks = [look for orbit in RADAR_ORBITS for look in _radar_looks(spec, triple, orbit)]
    else:
        known = BAND_LOOKS.get(spec.name) or {
            band: BandLook(f"{spec.title}, {band}", spec.unit, "viridis") for band in triple.bands
        }
        of_bands = {band: look for band, look in known.items() if band in triple.bands}
        if name != spec.name:
            of_bands = {band: look._replace(title=title_of(name)) for band, look in of_bands.items()}
        looks = [_band_look(triple, band, look) for band, look in of_bands.items()]
    if triple.note and looks:
        looks[0].notes.append(triple.note)
    if triple.prediction is None and looks and not looks[0].absent:
        looks[0].notes.append(_INPUT_ALONE)
    return looks


def _optical_look(title: str, triple: MapTriple, bands: tuple[str, ...]) -> Look:
    """Three channels of a composite of bands, of which two may be the same."""
    look = Look(title, detail=_composite_text(bands), decimals=4)
    absent = [band for band in bands if band not in triple.bands]
    if absent:
        look.notes.append(f"Not shown: {', '.join(absent)} neither read by the encoder nor reconstructed.")
        return look
    single = tuple(dict.fromkeys(bands))
    channels = [single.index(band) for band in bands]
    target, prediction = (layer and Layer(layer.values * _REFLECTANCE, layer.is_data) for layer in _bands(triple, single))
    if not target.is_data.any():
        return Look(title, absent=True)
    whole = target.values[channels]
    stretch = Stretch.of(whole, np.broadcast_to(target.is_data, whole.shape), _MIN_REFLECTANCE_SPAN)
    low, high = max(stretch.low.min(), 0.0), stretch.high.max()
    input_only = [band for band in single if band in triple.input_only]
    if input_only:
        look.notes.append(f"No prediction: {', '.join(input_only)} not among the reconstructed bands.")
    look.detail += f" Stretched from the target's 2nd to its 98th percentile: reflectance {low:.2f} to {high:.2f}."
    look.target, look.prediction = target, None if input_only else prediction
    look.paint = lambda layer: colour_composite(layer.values[channels], layer.is_data, stretch)
    return look


def _composite_text(bands: Sequence[str]) -> str:
    """Which band is which colour: `Red B4, green B3, blue B2.`"""
    red, green, blue = bands
    rest = f"green and blue {green}" if green == blue else f"green {green}, blue {blue}"
    return f"Red {red}, {rest}."


def _radar_looks(spec: ModalitySpec, triple: MapTriple, orbit: str) -> list[Look]:
    stretch, looks = Stretch(*np.array(RADAR_RANGE_DB).T), []
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
        look = Look(title, target=target, prediction=prediction, detail=detail.replace("-", "\N{MINUS SIGN}"), unit="dB")
        look.paint = lambda layer: _radar_composite(layer, stretch)
        looks.append(look)
    return looks or [Look(title, absent=True)]


def _radar_composite(layer: Layer, stretch: Stretch) -> np.ndarray:
    co, cross = layer.values_or(0.0)
    return colour_composite(np.stack([co, cross, co - cross]), layer.is_data, stretch)


def _band_look(triple: MapTriple, band: str, shown: BandLook) -> Look:
    target, prediction = _bands(triple, (band,))
    if not target.is_data.any():
        return Look(shown.title, absent=True)
    look = Look(shown.title, target=target, prediction=prediction, unit=shown.unit, decimals=shown.decimals)
    is_elevation = band == "elevation"
    if shown.span:
        scale = ColourScale(*shown.span, shown.colormap)
    else:
        values, is_data = target.values[0], target.is_data
        scale = ColourScale.of(values, is_data, shown.colormap, _MIN_SCALE_SPAN, from_zero=not is_elevation)
    if is_elevation:
        look.detail = "Tinted by height, lit from the north-west; one scale for all pictures of the row."
        pixel_m = MODALITIES["sentinel2"].gsd_m
        look.paint = lambda layer: relief_map(layer.values[0], layer.is_data, scale, pixel_m)
    else:
        look.paint = lambda layer: scalar_map(layer.values[0], layer.is_data, scale)
    decimals = 1 if shown.span else 0
    ends = (f"{end:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for end in (scale.low, scale.high))
    look.scale = ScaleLegend(png_data_uri(scale_bar(scale)), *ends, shown.unit)
    return look


def _class_look(name: str, spec: ModalitySpec, triple: MapTriple) -> Look:
    target = Layer(triple.target[None], np.asarray(triple.valid) & (triple.target >= 0))
    prediction = None if triple.prediction is None else Layer(triple.prediction[None], triple.prediction >= 0)
    look = Look(title_of(name), target=target, prediction=prediction, classes=True)
    look.paint = lambda layer: class_map(layer.values_or(-1)[0], spec)
    return look


def _bands(triple: MapTriple, bands: tuple[str, ...]) -> tuple[Layer, Layer | None]:
    """Target and prediction of some bands."""
    index = [triple.bands.index(band) for band in bands]
    target = np.asarray(triple.target)[index].astype(np.float64)
    is_data = (np.asarray(triple.valid)[index] & np.isfinite(target)).all(axis=0)
    if triple.prediction is None:
        return Layer(target, is_data), None
    prediction = np.asarray(triple.prediction)[index].astype(np.float64)
    return Layer(target, is_data), Layer(prediction, np.isfinite(prediction).all(axis=0))
