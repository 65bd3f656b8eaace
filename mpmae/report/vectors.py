"""A tile's vectors in words people use: degrees, month names, degrees Celsius, millimetres, likeliest classes.

The MMEarth files hold latitude, longitude and month as (sin, cos) of an angle: degrees of latitude and longitude, and 30
degrees a month, 1 = January.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mpmae.modalities import MODALITIES
from mpmae.report.data import ClassGuess, VectorPair

ABSENT = "–"
PERIODS = {"previous_month": "Previous month", "month": "Month", "year": "Year"}
_QUANTITIES = {
    "temperature_mean": "Temperature, mean",
    "temperature_min": "Temperature, lowest",
    "temperature_max": "Temperature, highest",
    "precipitation_sum": "Precipitation",
}
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_ZERO_CELSIUS_K = 273.15


@dataclass(frozen=True)
class PlaceRow:
    """A quantity with its target, its prediction and how far apart they are, as text.

    `right` is for classes: True = the likeliest is the target, False = the target is not among those shown.
    """

    title: str
    target: str
    prediction: str
    difference: str
    right: bool | None = None


@dataclass(frozen=True)
class ClimateRow:
    """An ERA5 quantity: per period (target, prediction) as text, None where the run does not predict it."""

    title: str
    unit: str
    cells: list[tuple[str, str] | None]


@dataclass(frozen=True)
class VectorTables:
    """The two tables below a tile's pictures."""

    place: list[PlaceRow] = field(default_factory=list)
    climate: list[ClimateRow] = field(default_factory=list)


def vector_tables(vectors: Mapping[str, VectorPair | ClassGuess]) -> VectorTables:
    """Target beside prediction for every tile modality of a tile, in the order of the modality table."""
    place: list[PlaceRow] = []
    climate: list[ClimateRow] = []
    for name, spec in MODALITIES.items():
        pair = vectors.get(name)
        if pair is None:
            continue
        if isinstance(pair, ClassGuess):
            place.append(_class_row(spec.title, pair))
        elif name == "era5":
            climate = _climate_rows(pair)
        elif set(pair.names) == {"sin", "cos"}:
            place.append(_angle_row(name, spec.title, pair))
        else:
            place += [_plain_row(f"{spec.title}, {band}", *values) for band, *values in _entries(pair)]
    return VectorTables(place, climate)


def degrees_text(name: str, degrees: float) -> str:
    """A latitude ("lat") or longitude ("lon") for people: `12.34° S`."""
    letter = ("NS" if name == "lat" else "EW")[int(degrees < 0)]
    return f"{abs(degrees):.2f}° {letter}"


def month_text(month: float) -> str:
    """A month number (1 = January; any real number, modulo 12) with its name: `June`, or `June (6.2)` if not whole."""
    number = round((month - 0.5) % 12 + 0.5, 1)
    name = _MONTHS[(round(number) - 1) % 12]
    return name if number == round(number) else f"{name} ({number:.1f})"


def _entries(pair: VectorPair) -> list[tuple[str, float, float, bool]]:
    return list(zip(pair.names, map(float, pair.target), map(float, pair.prediction), map(bool, pair.valid), strict=True))


def _class_row(title: str, guess: ClassGuess) -> PlaceRow:
    likeliest = ", ".join(f"{name} ({100 * probability:.0f} %)" for name, probability in list(guess.top)[:3])
    names = [name for name, _ in list(guess.top)[:3]]
    if guess.target is None or not names:
        return PlaceRow(title, guess.target or ABSENT, likeliest or "none", "")
    place = names.index(guess.target) + 1 if guess.target in names else None
    verdict = {1: "✓ right", None: "✗ not in the first three"}.get(place, f"~ likeliest no. {place}")
    return PlaceRow(title, guess.target, likeliest, verdict, {1: True, None: False}.get(place))


def _angle_row(name: str, title: str, pair: VectorPair) -> PlaceRow:
    entries = {band: values for band, *values in _entries(pair)}
    (sin_target, sin_guess, sin_valid), (cos_target, cos_guess, cos_valid) = entries["sin"], entries["cos"]
    truth, guess = (np.degrees(np.arctan2(s, c)) for s, c in ((sin_target, cos_target), (sin_guess, cos_guess)))
    apart = abs((guess - truth + 180.0) % 360.0 - 180.0)
    if name == "month":
        texts = [month_text(angle / 30.0) if np.isfinite(angle) else ABSENT for angle in (truth, guess)]
        difference = f"{apart / 30.0:.1f} months"
    else:
        texts = [degrees_text(name, angle) if np.isfinite(angle) else ABSENT for angle in (truth, guess)]
        difference = f"{apart:.1f}°"
    if not (sin_valid and cos_valid):
        texts[0] = ABSENT
    return PlaceRow(title, *texts, difference if ABSENT not in texts else "")


def _plain_row(title: str, target: float, prediction: float, valid: bool) -> PlaceRow:
    difference = f"{abs(prediction - target):.3g}" if valid and np.isfinite(prediction) else ""
    return PlaceRow(title, f"{target:.3g}" if valid else ABSENT, f"{prediction:.3g}", difference)


def _climate_rows(pair: VectorPair) -> list[ClimateRow]:
    entries = {band: values for band, *values in _entries(pair)}
    rows = []
    for quantity, title in _QUANTITIES.items():
        cells = [_climate_cell(quantity, entries.get(f"{period}_{quantity}")) for period in PERIODS]
        if any(cells):
            rows.append(ClimateRow(title, "mm" if quantity == "precipitation_sum" else "°C", cells))
    return rows


def _climate_cell(quantity: str, entry: list | None) -> tuple[str, str] | None:
    if entry is None:
        return None
    target, prediction, valid = entry
    texts = []
    for value, is_data in ((target, valid), (prediction, True)):
        shown = value * 1000.0 if quantity == "precipitation_sum" else value - _ZERO_CELSIUS_K
        decimals = 0 if quantity == "precipitation_sum" else 1
        number = f"{shown:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")
        texts.append(number if is_data and np.isfinite(value) else ABSENT)
    return texts[0], texts[1]
