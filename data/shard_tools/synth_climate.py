"""Where and when a synthetic tile lies, and the climate that follows from it.

Everything is a smooth function of latitude, month and height plus small noise, so that the tile vectors and the images tell
of each other: cold months at high latitudes bring snow, wet tropics bring tall forest.
"""

from dataclasses import dataclass

import numpy as np

LAPSE_K_PER_M = 0.0065
# Class ids of MMEarth-data `stats/biome_labels.json`.
TUNDRA, MOIST_FOREST, MEDITERRANEAN, DESERT, TEMPERATE_GRASS, BOREAL, CONIFER = 0, 1, 2, 3, 4, 5, 6
TEMPERATE_FOREST, MONTANE, SAVANNA, DRY_FOREST = 7, 8, 11, 12
ECO_REGIONS_PER_BIOME = 60


@dataclass(frozen=True)
class Climate:
    """Place, date and climate of a tile.

    season: -1 (local midwinter) to 1 (midsummer). annual_k, month_k: mean temperatures at `base_m`. precipitation_m: sum of
    the year. wetness: supply over demand of water, 0 (desert) to 1.2. era5: the 12 values of MMEarth's era5, K and m.
    """

    lat_deg: float
    lon_deg: float
    year: int
    month: int
    day: int
    base_m: float
    season: float
    annual_k: float
    month_k: float
    precipitation_m: float
    wetness: float
    biome: int
    eco_region: int
    era5: np.ndarray

    @property
    def sun_elevation_deg(self) -> float:
        """Height of the sun at the overpass, kept between 18 and 70 degrees."""
        declination = 23.4 * self.season * np.sign(self.lat_deg)
        return float(np.clip(85 - abs(self.lat_deg - declination), 18, 70))


def draw_climate(rng: np.random.Generator) -> Climate:
    """A place on land, a date and its climate."""
    lat, lon = float(rng.uniform(-45, 70)), float(rng.uniform(-180, 180))
    year, month, day = int(rng.integers(2017, 2021)), int(rng.integers(1, 13)), int(rng.integers(1, 29))
    base_m = float(2 + 650 * rng.gamma(0.6))
    sea_level_k = 300.5 - 0.0085 * lat**2 + rng.normal(0, 1.5)
    annual_k = float(sea_level_k - LAPSE_K_PER_M * base_m)
    amplitude_k = 1.0 + 0.28 * abs(lat)
    rain_belts = 0.25 + 2.0 * np.exp(-((lat / 13) ** 2)) + 0.75 * np.exp(-(((abs(lat) - 50) / 14) ** 2))
    precipitation_m = float(rain_belts * rng.lognormal(0, 0.35))
    annual_c = annual_k - 273.15
    wetness = float(np.clip(precipitation_m / (0.25 + 0.045 * max(annual_c, 0.0)), 0, 1.2))
    biome = _biome(lat, annual_c, wetness, base_m)
    months = [(month - 2) % 12 + 1, month]
    seasons = [float(np.cos(2 * np.pi * (m - 7) / 12) * np.sign(lat)) for m in months]
    era5 = []
    for season in seasons:
        mean_k = annual_k + amplitude_k * season + rng.normal(0, 0.8)
        rain_m = precipitation_m / 12 * (1 + 0.5 * season) * rng.lognormal(0, 0.2)
        era5 += [mean_k, mean_k - 8 - rng.gamma(2), mean_k + 8 + rng.gamma(2), rain_m]
    era5 += [annual_k, annual_k - amplitude_k - 10, annual_k + amplitude_k + 10, precipitation_m]
    return Climate(
        lat_deg=lat,
        lon_deg=lon,
        year=year,
        month=month,
        day=day,
        base_m=base_m,
        season=seasons[1],
        annual_k=annual_k,
        month_k=era5[4],
        precipitation_m=precipitation_m,
        wetness=wetness,
        biome=biome,
        eco_region=biome * ECO_REGIONS_PER_BIOME + min(int((lon + 180) // 6), ECO_REGIONS_PER_BIOME - 1),
        era5=np.array(era5, np.float32),
    )


def _biome(lat: float, annual_c: float, wetness: float, base_m: float) -> int:
    if annual_c < -5:
        return TUNDRA
    if annual_c < 2:
        return BOREAL
    if base_m > 2000:
        return MONTANE
    if wetness < 0.3:
        return DESERT
    if abs(lat) < 23:
        return MOIST_FOREST if wetness > 0.9 else DRY_FOREST if wetness > 0.6 else SAVANNA
    if abs(lat) < 42 and wetness < 0.7:
        return MEDITERRANEAN
    if wetness > 0.6:
        return CONIFER if annual_c < 6 else TEMPERATE_FOREST
    return TEMPERATE_GRASS
