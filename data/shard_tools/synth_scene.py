"""The maps of a synthetic tile: one landscape, seen by every sensor.

A height field with a power-law spectrum and the climate decide the land cover; land cover, season, parcels, canopy and
hill shading decide reflectance and backscatter. The spectra and backscatter levels are round figures of the usual order.

Shapes: P tile side in pixels, F fields, S surfaces.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from mpmae.shard_tools.synth_climate import LAPSE_K_PER_M, Climate

PIXEL_M = 10
TREES, SHRUB, GRASS, CROPS, BUILT, BARE, SNOW, WATER, WETLAND, MANGROVES, MOSS = 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100
DRY, SOIL = 101, 102  # senescent plants and ploughed fields: surfaces of the mixture, not classes of the map

# Surface: reflectance x 10,000 in B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B10 B11 B12, then VV and VH in dB.
_SURFACES = {
    TREES: ((230, 260, 450, 290, 800, 2200, 2800, 3150, 3000, 3050, 10, 1500, 650), (-8.0, -13.5)),
    SHRUB: ((480, 560, 850, 850, 1350, 2150, 2450, 2750, 2600, 2700, 10, 2450, 1600), (-10.5, -16.5)),
    GRASS: ((420, 500, 830, 680, 1300, 2600, 3100, 3400, 3250, 3300, 10, 2250, 1250), (-12.0, -18.5)),
    CROPS: ((380, 430, 800, 480, 1200, 3300, 4150, 4450, 4250, 4200, 10, 1950, 950), (-10.5, -16.5)),
    BUILT: ((1050, 1250, 1450, 1600, 1750, 1950, 2050, 2200, 2150, 2250, 10, 2300, 2050), (-3.5, -10.5)),
    BARE: ((1050, 1350, 1950, 2550, 2850, 3050, 3150, 3300, 3250, 3350, 10, 3950, 3450), (-14.0, -22.5)),
    SNOW: ((8900, 9100, 9000, 8900, 8800, 8600, 8400, 7800, 8100, 6000, 12, 950, 750), (-13.0, -20.5)),
    WATER: ((650, 560, 420, 270, 200, 140, 120, 90, 100, 80, 5, 45, 25), (-21.0, -28.0)),
    WETLAND: ((330, 380, 620, 480, 950, 1900, 2250, 2400, 2300, 2350, 8, 1250, 600), (-9.5, -16.0)),
    MANGROVES: ((250, 290, 470, 310, 800, 2300, 2900, 3050, 2950, 2950, 8, 1150, 450), (-8.5, -14.5)),
    MOSS: ((480, 560, 800, 850, 1250, 1850, 2050, 2250, 2150, 2250, 10, 2250, 1450), (-12.5, -19.5)),
    DRY: ((780, 930, 1300, 1650, 1950, 2250, 2450, 2750, 2600, 2750, 10, 3250, 2450), (-12.5, -19.5)),
    SOIL: ((850, 1020, 1350, 1750, 2050, 2250, 2400, 2650, 2500, 2650, 10, 3150, 2850), (-12.0, -20.5)),
}
SPECTRA = np.zeros((103, 13), np.float32)
BACKSCATTER_DB = np.zeros((103, 2), np.float32)
for _surface, (_spectrum, _levels) in _SURFACES.items():
    SPECTRA[_surface], BACKSCATTER_DB[_surface] = _spectrum, _levels

# How much of a class's plants go dry in the dull season.
_SENESCENCE = np.zeros(103, np.float32)
for _surface, _fraction in {TREES: 0.25, SHRUB: 0.6, GRASS: 0.95, WETLAND: 0.6, MOSS: 0.6}.items():
    _SENESCENCE[_surface] = _fraction

DYNAMIC_WORLD_OF = np.zeros(103, np.uint8)
for _surface, _label in zip(_SURFACES, (2, 6, 3, 5, 7, 8, 9, 1, 4, 4, 3), strict=False):
    DYNAMIC_WORLD_OF[_surface] = _label

_HAZE_L1C = np.array([1150, 850, 520, 330, 260, 190, 150, 90, 110, 60, 8, 15, 8], np.float32)
_TRANSMISSION_L1C = np.array([0.9, 0.9, 0.92, 0.93, 0.94, 0.95, 0.95, 0.96, 0.95, 0.4, 1.0, 0.97, 0.97], np.float32)
_BANDS_20_M, _BANDS_60_M = (4, 5, 6, 7, 11, 12), (0, 9, 10)
_B10 = 10
_SPECKLE_LOOKS = 6
_DB_STEP = 1 / 64


@dataclass(frozen=True)
class Scene:
    """The surface of a tile, all maps [P, P].

    height_m, slope_deg; gradient_x, gradient_y (m per m, y southwards); land_cover in WorldCover codes; canopy_m; dry and
    snow: fractions; green: 0 to 1 state of the parcels of fields; texture: unit-variance fine structure; moisture: likewise.
    """

    height_m: np.ndarray
    slope_deg: np.ndarray
    gradient_x: np.ndarray
    gradient_y: np.ndarray
    land_cover: np.ndarray
    canopy_m: np.ndarray
    dry: np.ndarray
    snow: np.ndarray
    green: np.ndarray
    texture: np.ndarray
    moisture: np.ndarray


@cache
def _amplitudes(exponents: tuple[float, ...], size_px: int) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :])
    frequency[0, 0] = np.inf  # no mean
    return np.stack([frequency ** (-exponent / 2) for exponent in exponents])


def noise_fields(rng: np.random.Generator, exponents: tuple[float, ...], size_px: int) -> np.ndarray:
    """Random fields whose power falls with frequency to minus the exponent: mean 0, variance 1, [F, P, P].

    Each is cut from a field of twice the side, because the transform makes opposite edges meet.
    """
    white = rng.standard_normal((len(exponents), 2 * size_px, 2 * size_px), np.float32)
    spectrum = np.fft.rfft2(white) * _amplitudes(exponents, 2 * size_px)
    fields = np.fft.irfft2(spectrum, s=white.shape[1:])[:, :size_px, :size_px]
    fields -= fields.mean(axis=(1, 2), keepdims=True)
    return fields / fields.std(axis=(1, 2), keepdims=True)


def draw_scene(rng: np.random.Generator, climate: Climate, size_px: int) -> Scene:
    """A landscape for the climate."""
    relief, moisture, people, texture, river, fine = noise_fields(rng, (3.8, 3.0, 3.4, 2.0, 5.5, 0.8), size_px)
    height_m = climate.base_m + float(np.exp(rng.normal(2.6, 1.0))) * relief
    height_m = np.maximum(height_m, height_m - height_m.min())  # no tile lies below the sea
    gradient_y, gradient_x = np.gradient(height_m, PIXEL_M)
    slope_deg = np.degrees(np.arctan(np.hypot(gradient_x, gradient_y)))
    parcel = _parcels(rng, size_px)
    land_cover = _land_cover(rng, climate, height_m, slope_deg, relief, moisture, people, river, fine)

    annual_c = climate.annual_k - 273.15
    tallest_m = np.clip(5 + 26 * climate.wetness, 5, 34) * np.clip((annual_c + 8) / 14, 0.35, 1)
    canopy_m = np.where(land_cover == TREES, tallest_m * np.clip(0.8 + 0.22 * texture, 0.2, 1.3), 0)
    canopy_m = np.where(land_cover == MANGROVES, 9 + 2 * texture, canopy_m)
    canopy_m = np.where(land_cover == SHRUB, np.clip(1.5 + texture, 0, 4), canopy_m)

    # Growth follows the summer away from the equator and the water everywhere.
    seasonality = min(abs(climate.lat_deg) / 40, 1)
    growth = np.clip((0.75 - 0.25 * seasonality) + 0.5 * seasonality * climate.season, 0, 1) * min(0.35 + climate.wetness, 1)
    dry = _SENESCENCE[land_cover] * np.clip(1 - growth - 0.12 * moisture, 0, 1)
    month_c = climate.month_k - 273.15 - LAPSE_K_PER_M * (height_m - climate.base_m)
    snow = 1 / (1 + np.exp(np.clip((month_c + 1.5) / 1.2 + 0.7 * fine + slope_deg / 15, -30, 30)))
    snow *= np.where(land_cover == TREES, 0.3, np.where((land_cover == WATER) & (month_c > -6), 0.0, 1.0))
    return Scene(
        height_m=height_m,
        slope_deg=slope_deg,
        gradient_x=gradient_x,
        gradient_y=gradient_y,
        land_cover=land_cover,
        canopy_m=np.clip(canopy_m, 0, 60),
        dry=dry,
        snow=np.where(land_cover == SNOW, 1.0, snow),
        green=np.clip(growth * 1.5 * parcel, 0, 1),
        texture=texture,
        moisture=moisture,
    )


def _parcels(rng: np.random.Generator, size_px: int) -> np.ndarray:
    angle, width_px, length_px = rng.uniform(0, np.pi), rng.uniform(5, 12), rng.uniform(12, 26)
    y, x = np.mgrid[:size_px, :size_px]
    across = np.floor((x * np.cos(angle) + y * np.sin(angle)) / width_px).astype(int)
    shifted = (y * np.cos(angle) - x * np.sin(angle)) / length_px + 0.5 * (across % 2)
    return rng.random((64, 64))[across % 64, np.floor(shifted).astype(int) % 64]


def _land_cover(rng, climate: Climate, height_m, slope_deg, relief, moisture, people, river, fine) -> np.ndarray:
    annual_c = climate.annual_k - 273.15 - LAPSE_K_PER_M * (height_m - climate.base_m)
    wet = 1.9 * (climate.wetness - 0.5) + 0.7 * moisture - 0.25 * relief + 0.06 * fine
    settled = (
        people + rng.normal(0.3, 0.9) - slope_deg.mean() / 6 - (0.8 if climate.wetness < 0.3 or annual_c.mean() < 1 else 0)
    )
    cover = np.full(height_m.shape, GRASS)
    cover[wet < -0.4] = SHRUB
    cover[(wet < -1.0) | (slope_deg > 34)] = BARE
    cover[(wet > 0.25) & (annual_c > -5)] = TREES
    cover[annual_c < -5] = MOSS
    cover[annual_c < -11] = SNOW
    cover[(settled > 0.4) & (slope_deg < 14) & (annual_c > 1) & (cover != BARE)] = CROPS
    cover[(settled > 1.9) & (annual_c > -2) & (fine > -1.4)] = BUILT
    # Water fills the lowest part of the tile; some tiles lie at the shore, many have none.
    lake_fraction = rng.choice([0.0, rng.uniform(0, 0.15), rng.uniform(0.2, 0.75)], p=[0.5, 0.35, 0.15]) * min(
        1, 0.3 + climate.wetness
    )
    if lake_fraction > 0.01:
        level = np.quantile(relief, lake_fraction)
        shore = np.quantile(relief, min(lake_fraction + 0.06, 1))
        wetland = MANGROVES if abs(climate.lat_deg) < 24 and climate.base_m < 40 else WETLAND
        cover[(relief < shore) & (moisture > 0) & np.isin(cover, (TREES, GRASS, SHRUB))] = wetland
        cover[relief < level] = WATER
    if rng.random() < 0.25 * min(1, climate.wetness + 0.2):
        # A level line of a smooth field winds like a river; value over gradient is the distance to it in pixels.
        distance_px = np.abs(river) / (np.hypot(*np.gradient(river)) + 1e-6)
        cover[distance_px < rng.uniform(0.8, 2.2)] = WATER
    return cover


def reflectance(rng: np.random.Generator, scene: Scene, climate: Climate, level: str) -> np.ndarray:
    """Sentinel-2 digital numbers, uint16 [13, P, P]; l1c adds haze, l2a has no B10 (0)."""
    cover = scene.land_cover
    green = scene.green * (cover == CROPS) + (cover != CROPS)
    surface = SPECTRA[cover] * green[..., None] + SPECTRA[SOIL] * (1 - green)[..., None]
    surface += (SPECTRA[DRY] - surface) * scene.dry[..., None]
    surface += (SPECTRA[SNOW] - surface) * scene.snow[..., None]
    # Tall canopies shade themselves, most in the visible bands.
    shade = np.minimum(scene.canopy_m, 35)[..., None] / 35 * np.where(np.arange(13) < 4, 0.35, 0.15)
    roughness = np.where(np.isin(cover, (WATER, SNOW)), 0.03, np.where(cover == BUILT, 0.22, 0.09))
    surface *= (1 - shade) * np.clip(1 + roughness * scene.texture, 0.3, 2)[..., None]
    # Morning sun: from the south-east on the northern half, from the north-east on the southern.
    towards_y = 0.75 if climate.lat_deg > 0 else -0.75
    tan_zenith = 1 / np.tan(np.radians(climate.sun_elevation_deg))
    facing = -(scene.gradient_x * 0.66 + scene.gradient_y * towards_y)
    light = (1 + tan_zenith * facing) * np.cos(np.radians(scene.slope_deg))
    surface *= np.clip(light, 0.35, 1.7)[..., None]
    bands = np.moveaxis(surface, -1, 0).astype(np.float32)
    for i in _BANDS_20_M:
        bands[i] = _coarser(bands[i], 2)
    for i in _BANDS_60_M:
        bands[i] = _coarser(bands[i], 4)
    if level == "l1c":
        haze = rng.lognormal(0, 0.25)
        bands = bands * _TRANSMISSION_L1C[:, None, None] + haze * _HAZE_L1C[:, None, None]
        bands[_B10] += 0.004 * climate.base_m
    bands += rng.standard_normal(bands.shape, np.float32) * (0.004 * bands + 6)
    numbers = np.clip(np.rint(bands), 1, 16000).astype(np.uint16)
    if level == "l2a":
        numbers[_B10] = 0
    return numbers


def _coarser(band: np.ndarray, factor: int) -> np.ndarray:
    side = len(band)
    blocks = band.reshape(side // factor, factor, side // factor, factor).mean(axis=(1, 3))
    return blocks.repeat(factor, axis=0).repeat(factor, axis=1)


def backscatter(rng: np.random.Generator, scene: Scene, ascending: bool) -> np.ndarray:
    """Sentinel-1 VV and VH in dB with speckle, float32 [2, P, P], in steps of 1/64 dB."""
    cover = scene.land_cover
    level = (
        BACKSCATTER_DB[cover]
        + (BACKSCATTER_DB[SOIL] - BACKSCATTER_DB[cover]) * ((1 - scene.green) * (cover == CROPS))[..., None]
    )
    level = level + 0.09 * scene.canopy_m[..., None] - 2.0 * (scene.snow * (cover != SNOW))[..., None]
    roughness = np.where(cover == BUILT, 2.5, np.where(cover == WATER, 0.3, 0.6))
    level = level + (roughness * scene.texture + 0.6 * scene.moisture * (cover != WATER))[..., None]
    # The antenna looks to the right of its track: slopes that face it (rising away from it) return more.
    look = 1 if ascending else -1
    level = level + np.clip(14 * look * scene.gradient_x, -7, 7)[..., None]
    speckle = rng.standard_gamma(_SPECKLE_LOOKS, (2, *cover.shape), np.float32) / _SPECKLE_LOOKS
    decibel = np.moveaxis(level, -1, 0) + 10 * np.log10(speckle)
    return (np.rint(decibel / _DB_STEP) * _DB_STEP).astype(np.float32)
