"""What each modality is: its bands, its kind, its no-data codes and its classes.

Sources: the MMEarth dataset (Nedungadi et al., ECCV 2024, arXiv 2405.02771), v001 layout; for the modalities that MMEarth
lacks, TerraMesh (arXiv 2504.11172) and Major TOM (arXiv 2402.12095). The table is fixed knowledge; the bands there are, the
dtype and the tile size are always read from the file at hand, and the no-data codes follow the dtype found.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mpmae.errors import ConfigError

Scope = Literal["pixel", "tile"]
Kind = Literal["continuous", "categorical"]


@dataclass(frozen=True)
class NoData:
    """How absent values are written: exact `codes`, any non-finite value, or (one-hot rows) all zeros."""

    codes: tuple[int, ...] = ()
    non_finite: bool = False
    zero_row: bool = False

    def valid(self, values: np.ndarray) -> np.ndarray:
        """True where a value is real data: bool, shape of `values` (raw units); a one-hot row shares one answer."""
        valid = np.isfinite(values) if self.non_finite else np.ones(values.shape, bool)
        for code in self.codes:
            valid &= values != code
        if self.zero_row:
            valid &= (values != 0).any(axis=-1, keepdims=True)
        return valid


@dataclass(frozen=True)
class LandClass:
    """One class of a land-cover map: the code in the file, its name and its usual map colour."""

    code: int
    name: str
    colour: str


@dataclass(frozen=True)
class ModalitySpec:
    """One named source of a tile.

    scope `pixel` is a map [C, P, P], `tile` one vector [C] per tile. `bands` names the channels of the file, in order;
    a one-hot vector lists its number of classes in `num_classes` instead. `is_target` is False for quality layers that are
    carried along but never reconstructed.
    """

    name: str
    title: str
    scope: Scope
    kind: Kind
    bands: tuple[str, ...] = ()
    unit: str = ""
    gsd_m: int | None = None
    num_classes: int | None = None
    classes: tuple[LandClass, ...] = ()
    is_target: bool = True
    default_bands: tuple[str, ...] = field(default=())

    @property
    def one_hot(self) -> bool:
        """Whether the file holds one one-hot row per tile (biome, eco_region)."""
        return self.scope == "tile" and self.kind == "categorical"

    @property
    def num_channels(self) -> int:
        """Channels in the file: bands, or the length of the one-hot row."""
        return self.num_classes if self.one_hot else len(self.bands)

    @property
    def model_bands(self) -> tuple[str, ...]:
        """Bands that a model reads and reconstructs unless told otherwise."""
        return self.default_bands or self.bands


def _bands(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _classes(*rows: tuple[int, str, str]) -> tuple[LandClass, ...]:
    return tuple(LandClass(*row) for row in rows)


# Dynamic World (Brown et al. 2022) as MMEarth stores it: 0 = no data, 1..9; colours of the product's own legend.
_DYNAMIC_WORLD = _classes(
    (1, "Water", "#419bdf"),
    (2, "Trees", "#397d49"),
    (3, "Grass", "#88b053"),
    (4, "Flooded vegetation", "#7a87c6"),
    (5, "Crops", "#e49635"),
    (6, "Shrub and scrub", "#dfc35a"),
    (7, "Built", "#c4281b"),
    (8, "Bare", "#a59b8f"),
    (9, "Snow and ice", "#b39fe1"),
)
# ESA WorldCover v200 product user manual.
_WORLDCOVER = _classes(
    (10, "Tree cover", "#006400"),
    (20, "Shrubland", "#ffbb22"),
    (30, "Grassland", "#ffff4c"),
    (40, "Cropland", "#f096ff"),
    (50, "Built-up", "#fa0000"),
    (60, "Bare / sparse vegetation", "#b4b4b4"),
    (70, "Snow and ice", "#f0f0f0"),
    (80, "Permanent water", "#0064c8"),
    (90, "Herbaceous wetland", "#0096a0"),
    (95, "Mangroves", "#00cf75"),
    (100, "Moss and lichen", "#fae6a0"),
)
# Esri / Impact Observatory 10 m land cover as TerraMesh renumbers it: 0 = no data, then Esri's 1 2 4 5 7 8 9 10 11 as 1..9.
_LULC = _classes(
    (1, "Water", "#1a5bab"),
    (2, "Trees", "#358221"),
    (3, "Flooded vegetation", "#87d19e"),
    (4, "Crops", "#ffdb5c"),
    (5, "Built area", "#ed022a"),
    (6, "Bare ground", "#ede9e4"),
    (7, "Snow and ice", "#f2faff"),
    (8, "Clouds", "#c8c8c8"),
    (9, "Rangeland", "#c6ad8d"),
)
_S2_BANDS = _bands("B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B10 B11 B12")
_ERA5 = tuple(
    f"{period}_{value}"
    for period in ("previous_month", "month", "year")
    for value in ("temperature_mean", "temperature_min", "temperature_max", "precipitation_sum")
)

# The order of the targets is the reference's order of losses (and of its log variances).
_MMEARTH_SPECS = (
    ModalitySpec(
        "sentinel2",
        "Sentinel-2",
        "pixel",
        "continuous",
        _S2_BANDS,
        "reflectance x 10,000",
        10,
        default_bands=tuple(b for b in _S2_BANDS if b != "B10"),
    ),
    ModalitySpec(
        "sentinel1",
        "Sentinel-1",
        "pixel",
        "continuous",
        _bands("asc_VV asc_VH asc_HH asc_HV desc_VV desc_VH desc_HH desc_HV"),
        "dB",
        10,
    ),
    ModalitySpec("aster", "ASTER elevation", "pixel", "continuous", _bands("elevation slope"), "m, degrees", 30),
    ModalitySpec("era5", "ERA5 climate", "tile", "continuous", _ERA5, "K, m"),
    ModalitySpec(
        "dynamic_world", "Dynamic World", "pixel", "categorical", ("label",), gsd_m=10, classes=_DYNAMIC_WORLD, num_classes=9
    ),
    ModalitySpec("canopy_height_eth", "Canopy height", "pixel", "continuous", _bands("height height_std"), "m", 10),
    ModalitySpec("lat", "Latitude", "tile", "continuous", _bands("sin cos")),
    ModalitySpec("lon", "Longitude", "tile", "continuous", _bands("sin cos")),
    ModalitySpec("biome", "Biome", "tile", "categorical", num_classes=14),
    ModalitySpec("eco_region", "Eco-region", "tile", "categorical", num_classes=846),
    ModalitySpec("month", "Month", "tile", "continuous", _bands("sin cos")),
    ModalitySpec(
        "esa_worldcover", "ESA WorldCover", "pixel", "categorical", ("Map",), gsd_m=10, classes=_WORLDCOVER, num_classes=11
    ),
    ModalitySpec("sentinel2_cloudmask", "Cloud mask", "pixel", "categorical", ("QA60",), gsd_m=60, is_target=False),
    ModalitySpec(
        "sentinel2_cloudprod", "Cloud probability", "pixel", "continuous", ("MSK_CLDPRB",), "%", 20, is_target=False
    ),
    ModalitySpec("sentinel2_scl", "Scene classification", "pixel", "categorical", ("SCL",), gsd_m=20, is_target=False),
)

# Radiometric terrain correction gives gamma nought, MMEarth's sentinel1 is sigma nought of the ground-range product: two
# distributions, so two modalities. Only the polarisations over land are in use.
_OTHER_SPECS = (
    ModalitySpec(
        "sentinel1_rtc",
        "Sentinel-1 terrain-corrected",
        "pixel",
        "continuous",
        _bands("asc_VV asc_VH desc_VV desc_VH"),
        "dB",
        10,
    ),
    ModalitySpec("dem", "Copernicus elevation", "pixel", "continuous", ("elevation",), "m", 30),
    ModalitySpec("ndvi", "NDVI", "pixel", "continuous", ("NDVI",), "", 10),
    ModalitySpec("lulc", "Esri land cover", "pixel", "categorical", ("label",), gsd_m=10, classes=_LULC, num_classes=9),
    ModalitySpec(
        "sentinel2_rgb", "Sentinel-2 8-bit colour", "pixel", "continuous", _bands("red green blue"), "", 10, is_target=False
    ),
)

MODALITIES: dict[str, ModalitySpec] = {spec.name: spec for spec in (*_MMEARTH_SPECS, *_OTHER_SPECS)}
MMEARTH: tuple[str, ...] = tuple(spec.name for spec in _MMEARTH_SPECS)
# What a model reconstructs unless told otherwise: the published twelve; ALL_TARGETS: what it can be told to.
TARGETS: tuple[str, ...] = tuple(spec.name for spec in _MMEARTH_SPECS if spec.is_target)
ALL_TARGETS: tuple[str, ...] = TARGETS + tuple(spec.name for spec in _OTHER_SPECS if spec.is_target)
PRODUCT_LEVELS: tuple[str, ...] = ("l1c", "l2a")


_REFERENCE_CODES = {"sentinel2": 0, "dynamic_world": 0, "esa_worldcover": 0, "canopy_height_eth": 255}


def spec_of(name: str) -> ModalitySpec:
    """The spec of a modality; ConfigError (with the known names) for an unknown one."""
    try:
        return MODALITIES[name]
    except KeyError:
        raise ConfigError(f"unknown modality {name!r}; known: {', '.join(MODALITIES)}") from None


def no_data_rule(name: str, dtype: np.dtype | str, reference_quirks: bool = False) -> NoData:
    """How `name` writes absent values when its file holds `dtype`.

    HDF5 saturates a code that the dtype cannot hold (-inf in int16 becomes -32768, 255 in int8 becomes 127), so the codes
    depend on the dtype. With `reference_quirks` only the code that the published code compares with counts: -inf for
    sentinel1, aster, lat, lon and month, 255 for canopy height, 0 for sentinel2 and the two land-cover maps, only NaN for
    era5. Saturated ones are then data. A float that is not finite stays absent: there it becomes 0 before the loss (maps) or
    makes the loss infinite (vectors). Source: MMEarth-train 1f368b3, `mmearth_dataset.py` and `MODALITIES.py`.
    """
    spec, dtype = spec_of(name), np.dtype(dtype)
    if reference_quirks and dtype.kind != "f" and not spec.one_hot and name in TARGETS:
        code = _REFERENCE_CODES.get(name)
        return NoData(codes=(code,) if code is not None and code <= np.iinfo(dtype).max else ())
    if spec.one_hot:
        return NoData(codes=(int(np.iinfo(dtype).max),) if dtype.kind in "ui" else (), zero_row=True)
    if dtype.kind == "f":
        return NoData(codes={"sentinel2": (0,), "canopy_height_eth": (255,)}.get(name, ()), non_finite=True)
    limits = np.iinfo(dtype)
    if name in ("sentinel2", "dynamic_world", "lulc", "sentinel2_rgb"):
        return NoData(codes=(0,))
    if name == "esa_worldcover":
        return NoData(codes=(0, min(255, limits.max)))
    if name == "canopy_height_eth":
        return NoData(codes=(min(255, limits.max),))
    if spec.is_target and (name in MMEARTH or limits.min < 0):  # written as -inf
        return NoData(codes=(limits.min,) if limits.min < 0 else ())
    return NoData(codes=(limits.max,))


def band_indices(name: str, bands: tuple[str, ...] | list[str], available: tuple[str, ...] | list[str]) -> list[int]:
    """Positions of `bands` among `available`; ConfigError naming the modality and every band that is not there."""
    missing = [band for band in bands if band not in available]
    if missing:
        raise ConfigError(f"{name}: no band {', '.join(missing)}; the set has {', '.join(available)}")
    return [list(available).index(band) for band in bands]


def class_lookup(spec: ModalitySpec, reference_quirks: bool = False) -> np.ndarray:
    """Table from file code (0..255) to class id for a categorical map: int8 [256], -1 = no data or an unknown code.

    With `reference_quirks`, esa_worldcover's class 0, tree cover, is no data: the published code compares with the no-data
    code 0 once before and once after it turns codes into class ids (MMEarth-train 1f368b3, `mmearth_dataset.py`; earlier
    commits, whose code is 255, do not).
    """
    table = np.full(256, -1, np.int8)
    for class_id, land_class in enumerate(spec.classes):
        table[land_class.code] = class_id
    if reference_quirks and spec.name == "esa_worldcover":
        table[table == 0] = -1
    return table
