"""Which stored band an encoder reads for each band it wants.

A Sentinel-2 band: the same by name, else the nearest by wavelength. A band of any other modality: by name alone.

Shapes: B stored bands.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mpmae.errors import DatasetError
from mpmae.eval.dataset import StoredBand, Task
from mpmae.eval.encoder_input import SENTINEL2
from mpmae.modalities import spec_of

_LOG = logging.getLogger(__name__)

# Centre wavelengths in um as GEO-Bench states them (ServiceNow/geo-bench, `geobench/dataset.py`).
SENTINEL2_UM = {
    "B1": 0.443,
    "B2": 0.49,
    "B3": 0.56,
    "B4": 0.665,
    "B5": 0.705,
    "B6": 0.74,
    "B7": 0.783,
    "B8": 0.842,
    "B8A": 0.865,
    "B9": 0.945,
    "B10": 1.375,
    "B11": 1.61,
    "B12": 2.19,
}
_COLOURS_UM = {"red": 0.665, "green": 0.56, "blue": 0.49, "nir": 0.842}
_NUMBER = re.compile(r"(?=b|.* - )b?0?(\d{1,2})(a?)(?: - .*)?", re.IGNORECASE)  # a bare number may count channels
_FAR_UM = 0.3  # a band this far off shows something else: worth a warning
_SAME_UM = 0.03  # bands of other sensors this near show the same colour
_NO_DATA = "no data"
_LIKE = {"aster": "dem", "dem": "aster"}  # both are metres of height
# What else files call a band, in lower case. A radar band without a pass is taken for the ascending one.
_ALIASES = {
    "elevation": ("elevation", "dem", "height above sea level", "altitude"),
    **{f"asc_{name}": (f"asc_{name}".lower(), name.lower()) for name in ("VV", "VH", "HH", "HV")},
}


@dataclass(frozen=True)
class BandRow:
    """One band that the encoder wants, and the stored one it is given.

    position: of the stored band among the set's; None where the channel holds no data. distance_um: between their
    wavelengths; 0 for the same band, None where the stored one has the name but no wavelength. modality: of the wanted one.
    """

    wanted: str
    stored: str
    position: int | None
    distance_um: float | None
    modality: str = SENTINEL2

    @property
    def is_filled(self) -> bool:
        """Whether something else stands in for the wanted band."""
        return self.wanted != self.stored


@dataclass(frozen=True)
class BandMatch:
    """For each band of the encoder, in its order, where it comes from."""

    rows: tuple[BandRow, ...]

    @property
    def positions(self) -> list[int | None]:
        """Of the stored bands, in the order of the encoder's channels; None for no data."""
        return [row.position for row in self.rows]

    @property
    def filled(self) -> list[str]:
        """What stands in for another band, or for none: "B5 from B4"."""
        return [f"{row.wanted} from {row.stored}" for row in self.rows if row.is_filled]

    def table(self) -> str:
        """The rows as lines of text: wanted, stored, distance."""
        width = max(8, *(len(row.wanted) + 2 for row in self.rows))
        lines = [f"  {'wanted':<{width}}{'stored':<28}distance"]
        for row in self.rows:
            distance = "" if row.distance_um is None else f"{row.distance_um:.3f} um"
            lines.append(f"  {row.wanted:<{width}}{row.stored:<28}{distance if row.is_filled else 'same'}".rstrip())
        return "\n".join(lines)


def sentinel2_name(text: str) -> str | None:
    """Sentinel-2's name of a band ("B4", "B8A") that is written "B04", "b4", "04 - Red" or "08A - ..."; else None."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    name = f"B{int(found[1])}{found[2].upper()}"
    return name if name in SENTINEL2_UM else None


def plain_band(text: str) -> tuple[str, float | None]:
    """Name and centre wavelength (um) of a band that only has a name: Sentinel-2's, a colour, or what it says and None."""
    name = sentinel2_name(text)
    if name is not None:
        return name, SENTINEL2_UM[name]
    return text, _COLOURS_UM.get(text.strip().lower())


def match_bands(task: Task, wanted: Sequence[str]) -> BandMatch:
    """The stored band for each Sentinel-2 band in `wanted`, logged as a table.

    The one of the same name; else that with the nearest wavelength, of two equally near ones the shorter, of two of the same
    wavelength the first stored. Bands without a wavelength (radar, elevation, cloud masks, 8-bit colour) never stand in.
    Raises DatasetError for a name that is not Sentinel-2's, and for a set without any wavelength.
    Source: MMEarth-train, `BAND_NAMES_v1_full.json`, whose rows this gives for the tasks that lack bands.
    """
    return match_channels(task, [(SENTINEL2, name) for name in wanted])


def match_channels(task: Task, wanted: Sequence[tuple[str, str]], quiet: bool = False) -> BandMatch:
    """The stored band for each (modality, band) in `wanted`, logged as a table unless `quiet`.

    Sentinel-2: see `match_bands`. Others by name alone: the modality's band, what else files call it (`DEM`), a class map by
    the modality's name. Of a modality with some of its bands the others hold no data, as where pretraining had none.
    Raises DatasetError with every modality that has none of its bands.
    """
    colours = [band for modality, band in wanted if modality == SENTINEL2]
    unknown = [name for name in colours if name not in SENTINEL2_UM]
    if unknown or not wanted:
        raise DatasetError(
            f"{task.name}: the encoder wants the bands {', '.join(unknown) or 'none at all'}; expected names of Sentinel-2: "
            f"{', '.join(spec_of(SENTINEL2).bands)}"
        )
    problems = [f"{task.name}: {problem}" for problem in _problems(task, wanted)]
    if problems:
        raise DatasetError(problems)
    match = BandMatch(tuple(_row(task, *channel) for channel in wanted))
    if quiet:
        return match
    _LOG.info("%s: bands of the encoder, and what is stored\n%s", task.name, match.table())
    far = [f"{row.stored} for {row.wanted}" for row in match.rows if (row.distance_um or 0) > _FAR_UM]
    if far:
        _LOG.warning(
            "%s: stand-ins more than %s um off show something else: %s; an encoder of fewer bands (encoder.bands_in, or "
            "encoder.domains) may do better",
            task.name,
            _FAR_UM,
            ", ".join(far),
        )
    return match


def lacking(task: Task, wanted: Sequence[tuple[str, str]]) -> list[str]:
    """What a set would have to store for these (modality, band) channels and does not; [] where it has them.

    Stricter than `match_channels`: a Sentinel-2 band must be there by name, or as another sensor's band of its colour.
    """
    missing = [text for modality, text in _absent(task, wanted).items() if modality != SENTINEL2]
    for modality, name in wanted:
        if modality == SENTINEL2:
            others = [band for band in task.bands if band.wavelength_um and band.name not in SENTINEL2_UM]
            near = [band for band in others if abs(band.wavelength_um - SENTINEL2_UM[name]) <= _SAME_UM]
            missing += [] if near or _named(task, modality, name) is not None else [name]
    return missing


def _problems(task: Task, wanted: Sequence[tuple[str, str]]) -> list[str]:
    stored = ", ".join(task.band_names)
    missing = [band for modality, band in wanted if modality == SENTINEL2 and _named(task, modality, band) is None]
    problems = []
    if missing and not _spectral(task):
        problems.append(
            f"no stored band can stand for {', '.join(missing)}: none of {stored} has a wavelength. "
            "Name the bands as Sentinel-2's (B2, B8A) or red, green, blue, nir, or evaluate an encoder of these bands"
        )
    return problems + [
        f"no {text} among the stored bands {stored}; it has to be stored by that name, or leave what reads {modality} out "
        "of encoder.domains"
        for modality, text in _absent(task, wanted).items()
        if modality != SENTINEL2
    ]


def _absent(task: Task, wanted: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Modality -> its wanted bands as text, for those of which the set stores none."""
    names: dict[str, list[str]] = {}
    for modality, band in wanted:
        names.setdefault(modality, []).append(_shown(modality, band))
    return {
        modality: f"{modality} ({', '.join(bands)})" if bands != [modality] else modality
        for modality, bands in names.items()
        if all(_named(task, *channel) is None for channel in wanted if channel[0] == modality)
    }


def _shown(modality: str, band: str) -> str:
    """A band's name for people: a class map goes by its modality's."""
    return modality if spec_of(modality).kind == "categorical" else band


def _named(task: Task, modality: str, band: str) -> int | None:
    """Position of the stored band that is this one by name: of that modality if one says so, else of none said."""
    name = _shown(modality, band)
    allowed = {name.lower(), *_ALIASES.get(name, ())} if modality != SENTINEL2 else {name.lower()}
    for said in (modality, None, _LIKE.get(modality, modality)):
        for position, stored in enumerate(task.bands):
            if stored.modality == said and stored.name.lower() in allowed:
                return position
    return None


def _spectral(task: Task) -> list[tuple[int, StoredBand]]:
    return [(position, band) for position, band in enumerate(task.bands) if band.wavelength_um is not None]


def _row(task: Task, modality: str, wanted: str) -> BandRow:
    position, shown = _named(task, modality, wanted), _shown(modality, wanted)
    if position is not None:
        stored = task.bands[position]
        return BandRow(shown, stored.name, position, None if stored.wavelength_um is None else 0.0, modality)
    if modality != SENTINEL2:
        return BandRow(shown, _NO_DATA, None, None, modality)

    def nearness(candidate: tuple[int, StoredBand]) -> tuple[float, float, int]:
        position, band = candidate
        return round(abs(band.wavelength_um - SENTINEL2_UM[wanted]), 6), band.wavelength_um, position

    position, band = min(_spectral(task), key=nearness)
    return BandRow(wanted, band.name, position, nearness((position, band))[0])
