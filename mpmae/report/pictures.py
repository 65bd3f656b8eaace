"""Arrays of a tile -> RGB pictures -> PNG data URIs.

Three things are never data and look alike everywhere: no data is one flat colour (`NO_DATA`), a patch hidden from the
encoder is hatched, a visible patch in a prediction (which no loss ever scored) is dotted.

Shapes: C bands, H = W image size in pixels, S side of an enlarged picture. Pictures are uint8 [H, W, 3].
"""

import base64
import io
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image

from mpmae.modalities import ModalitySpec

NO_DATA = (224, 0, 224)
HIDDEN = ((112, 117, 124), (141, 146, 153))
UNSCORED = ((214, 218, 223), (160, 166, 174))
_SUN_AZIMUTH_DEG, _SUN_ALTITUDE_DEG = 315.0, 45.0


@dataclass(frozen=True)
class Stretch:
    """Raw value that becomes black (`low`) and full colour (`high`), one per channel; shared by all pictures of a row."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, valid: np.ndarray, min_span: float, percentiles=(2.0, 98.0)) -> "Stretch":
        """Per-channel percentiles of `values` [C, H, W] where `valid`, at least `min_span` apart so that noise stays dark.

        A channel without any data gets 0..min_span.
        """
        low, high = np.zeros(len(values)), np.full(len(values), float(min_span))
        for channel, (band, is_data) in enumerate(zip(values, valid & np.isfinite(values), strict=True)):
            if is_data.any():
                low[channel], high[channel] = np.percentile(band[is_data].astype(np.float64), percentiles)
        short = np.maximum(min_span - (high - low), 0)
        return cls(low - short / 2, high + short / 2)


@dataclass(frozen=True)
class ColourScale:
    """A colour map over low..high (raw units of the modality)."""

    low: float
    high: float
    colormap: str

    @classmethod
    def of(
        cls, values: np.ndarray, valid: np.ndarray, colormap: str, min_span: float, from_zero: bool = False
    ) -> "ColourScale":
        """Range of `values` where `valid`, at least `min_span` wide, starting at 0 if `from_zero`."""
        data = values[valid & np.isfinite(values)].astype(np.float64)
        low, high = (data.min(), data.max()) if data.size else (0.0, min_span)
        if from_zero:
            return cls(0.0, max(float(high), min_span), colormap)
        short = max(min_span - (high - low), 0.0)
        return cls(float(low - short / 2), float(high + short / 2), colormap)

    def paint(self, values: np.ndarray) -> np.ndarray:
        """float [..., 3] in 0..1; values beyond the range take the end colours, non-finite ones the lower end's."""
        position = (np.nan_to_num(values, nan=self.low).astype(np.float64) - self.low) / (self.high - self.low)
        return matplotlib.colormaps[self.colormap](np.clip(position, 0.0, 1.0))[..., :3]


def to_uint8(picture: np.ndarray, is_data: np.ndarray) -> np.ndarray:
    """uint8 picture of `picture` (float [H, W, 3], 0..1) with NO_DATA where `is_data` (bool [H, W]) is False."""
    picture = np.rint(np.clip(picture, 0.0, 1.0) * 255).astype(np.uint8)
    picture[~is_data] = NO_DATA
    return picture


def colour_composite(values: np.ndarray, is_data: np.ndarray, stretch: Stretch) -> np.ndarray:
    """Picture of three bands `values` [3, H, W] as red, green, blue."""
    low, high = (np.asarray(x, np.float64)[:, None, None] for x in (stretch.low, stretch.high))
    scaled = (np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0) - low) / (high - low)
    return to_uint8(np.moveaxis(scaled, 0, -1), is_data)


def scalar_map(values: np.ndarray, is_data: np.ndarray, scale: ColourScale) -> np.ndarray:
    """Picture of one band `values` [H, W] through a colour map."""
    return to_uint8(scale.paint(np.where(is_data, values, np.nan)), is_data)


def relief_map(elevation_m: np.ndarray, is_data: np.ndarray, scale: ColourScale, pixel_m: float) -> np.ndarray:
    """Picture of elevation [H, W] tinted by height and shaded by the slope towards a sun in the north-west."""
    filled = np.where(is_data, elevation_m, elevation_m[is_data].mean() if is_data.any() else 0.0).astype(np.float64)
    light = hillshade(filled, pixel_m)[..., None]
    return to_uint8(scale.paint(filled) * (0.55 + 0.64 * light), is_data)


def hillshade(elevation_m: np.ndarray, pixel_m: float) -> np.ndarray:
    """Light falling on a surface [H, W], rows from north to south: 0 = in shadow, 1 = facing the sun, flat = sin(45 deg).

    Lambert's cosine law with the gradient by central differences.
    """
    south, east = np.gradient(elevation_m, pixel_m)
    azimuth, altitude = np.deg2rad(_SUN_AZIMUTH_DEG), np.deg2rad(_SUN_ALTITUDE_DEG)
    # surface normal (-dz/deast, -dz/dnorth, 1) with dz/dnorth = -south
    towards = -east * np.sin(azimuth) * np.cos(altitude) + south * np.cos(azimuth) * np.cos(altitude) + np.sin(altitude)
    return np.clip(towards / np.sqrt(1.0 + south**2 + east**2), 0.0, 1.0)


def class_map(class_ids: np.ndarray, spec: ModalitySpec) -> np.ndarray:
    """Picture of a land-cover map [H, W] in the spec's colours; ids outside the classes (-1) become NO_DATA."""
    palette = np.array([rgb_of(c.colour) for c in spec.classes] + [NO_DATA], np.uint8)
    known = (class_ids >= 0) & (class_ids < len(spec.classes))
    return palette[np.where(known, class_ids, len(spec.classes))]


def rgb_of(colour: str) -> tuple[int, int, int]:
    """(red, green, blue) of "#rrggbb"."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    """`array` [H, W, ...] with every pixel repeated `factor` x `factor` times (nearest neighbour)."""
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def hatch(side_px: int) -> np.ndarray:
    """Picture [S, S, 3] of the texture of hidden patches: diagonal stripes."""
    y, x = np.indices((side_px, side_px))
    return np.array(HIDDEN, np.uint8)[(x + y) // 4 % 2]


def dots(side_px: int) -> np.ndarray:
    """Picture [S, S, 3] of the texture of visible patches in a prediction: sparse dots."""
    y, x = np.indices((side_px, side_px))
    return np.array(UNSCORED, np.uint8)[((x % 8 < 2) & (y % 8 < 2)).astype(int)]


def cover(picture: np.ndarray, where: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """`picture` [S, S, 3] with `texture` [S, S, 3] where `where` (bool [S, S])."""
    return np.where(where[..., None], texture, picture)


def scale_bar(scale: ColourScale) -> np.ndarray:
    """Picture [8, 128, 3] of a colour scale from low (left) to high (right)."""
    values = np.linspace(scale.low, scale.high, 128)[None].repeat(8, axis=0)
    return scalar_map(values, np.ones(values.shape, bool), scale)


def png_data_uri(picture: np.ndarray) -> str:
    """The picture as a PNG inside a `data:` URI; exact, and with a palette where 256 colours suffice."""
    codes, positions = np.unique(picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32), return_inverse=True)
    if len(codes) <= 256:
        image = Image.fromarray(positions.reshape(picture.shape[:2]).astype(np.uint8))
        image.putpalette(codes[:, None].astype(">u4").view(np.uint8)[:, 1:].tobytes())
    else:
        image = Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
