"""Arrays -> pictures: exact class colours, shared stretches, and three textures that are never data."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from mpmae.modalities import MODALITIES
from mpmae.report import MapTriple, TilePicture, pictures
from mpmae.report.tiles import PICTURE_SIDE_PX, tile_view

G, PATCH = 4, 7
P = G * PATCH
VISIBLE = np.zeros((G, G), bool)
VISIBLE[0] = True


def decode(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB"))


def tile_of(**maps: MapTriple) -> TilePicture:
    return TilePicture("tile", "l2a", "val", VISIBLE, PATCH, maps)


def continuous(name: str, value: float, predicted: float | None = None, valid: bool = True) -> MapTriple:
    bands = MODALITIES[name].model_bands
    target = np.full((len(bands), P, P), value, np.float32)
    prediction = np.full_like(target, value if predicted is None else predicted)
    return MapTriple(bands, target, prediction, np.full(target.shape, valid))


def figures_of(row) -> dict[str, np.ndarray]:
    return {figure.title: decode(figure.uri) for figure in row.figures}


@pytest.mark.parametrize("name", ["dynamic_world", "esa_worldcover"])
def test_class_map_has_exactly_the_colours_of_the_modality_table(name):
    spec = MODALITIES[name]
    ids = np.arange(-1, len(spec.classes))[None]
    painted = pictures.class_map(ids, spec)[0]
    assert tuple(painted[0]) == pictures.NO_DATA
    assert ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in painted[1:]] == [c.colour for c in spec.classes]


@pytest.mark.parametrize("name", ["dynamic_world", "esa_worldcover"])
def test_no_data_and_textures_are_far_from_every_class_colour(name):
    for land_class in MODALITIES[name].classes:
        apart = np.subtract(pictures.rgb_of(land_class.colour), pictures.NO_DATA, dtype=float)
        assert np.linalg.norm(apart) > 100
    textures = [*pictures.HIDDEN, *pictures.UNSCORED]
    assert len(set(textures)) == 4
    assert not set(textures) & {pictures.rgb_of(c.colour) for c in MODALITIES[name].classes}


@pytest.mark.parametrize("side", [1, 28, 224])
def test_textures_have_their_size_and_two_colours(side):
    for texture, colours in ((pictures.hatch(side), pictures.HIDDEN), (pictures.dots(side), pictures.UNSCORED)):
        assert texture.shape == (side, side, 3)
        assert texture.dtype == np.uint8
        assert {tuple(rgb) for rgb in texture.reshape(-1, 3).tolist()} <= set(colours)


def test_stretch_comes_from_valid_target_values_only():
    values = np.tile(np.linspace(0.1, 0.3, 100), (3, 1)).reshape(3, 10, 10)
    valid = np.ones(values.shape, bool)
    values[:, 0, 0], valid[:, 0, 0] = 1e6, False
    stretch = pictures.Stretch.of(values, valid, min_span=0.01)
    assert np.all(stretch.high < 0.31)
    painted = pictures.colour_composite(
        np.stack([stretch.low, stretch.high, stretch.high])[:, :, None], np.ones((3, 1), bool), stretch
    )
    assert painted.min() == 0
    assert painted.max() == 255


def test_constant_image_stays_finite_and_mid_grey():
    values = np.full((3, 5, 5), 0.2)
    stretch = pictures.Stretch.of(values, np.ones(values.shape, bool), min_span=0.05)
    painted = pictures.colour_composite(values, np.ones((5, 5), bool), stretch)
    assert np.all(abs(painted.astype(int) - 128) <= 1)


def test_channel_without_data_does_not_divide_by_zero():
    values = np.full((3, 4, 4), np.nan)
    stretch = pictures.Stretch.of(values, np.zeros(values.shape, bool), min_span=0.05)
    painted = pictures.colour_composite(values, np.zeros((4, 4), bool), stretch)
    assert np.all(painted == pictures.NO_DATA)


def test_colour_scale_is_shared_clipped_and_starts_at_zero():
    target = np.array([[2.0, 30.0]])
    scale = pictures.ColourScale.of(target, np.ones(target.shape, bool), "viridis", 10.0, from_zero=True)
    assert (scale.low, scale.high) == (0.0, 30.0)
    assert np.array_equal(scale.paint(np.array([99.0])), scale.paint(np.array([30.0])))
    flat = pictures.ColourScale.of(np.full((2, 2), 5.0), np.ones((2, 2), bool), "viridis", 10.0)
    assert (flat.low, flat.high) == (0.0, 10.0)


def test_hillshade_is_brighter_on_the_north_west_side():
    y, x = np.indices((9, 9)).astype(float)
    towards, away, flat = (pictures.hillshade(z, 10.0)[4, 4] for z in (10 * (x + y), -10 * (x + y), 0 * x))
    assert flat == pytest.approx(np.sin(np.pi / 4))
    assert towards > flat > away  # rising to the south-east faces the sun in the north-west


@pytest.mark.parametrize("colours", [3, 400])
def test_png_is_lossless_with_and_without_a_palette(colours):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (colours, 3), np.uint8)[rng.integers(0, colours, (40, 40))]
    assert np.array_equal(decode(pictures.png_data_uri(picture)), picture)


def test_hidden_visible_and_filled_in_patches():
    view = tile_view(tile_of(sentinel2=continuous("sentinel2", 2000, predicted=2600)))
    assert [row.title for row in view.inputs] == ["Sentinel-2, true colour", "Sentinel-2, false colour"]
    shown = figures_of(view.inputs[0])
    assert list(shown) == ["Seen by the encoder", "Prediction", "Filled in", "Target"]
    side = P * (PICTURE_SIDE_PX // P)
    assert all(picture.shape == (side, side, 3) for picture in shown.values())
    top, rest = slice(0, side // G), slice(side // G, None)  # the first row of patches is visible
    assert np.array_equal(shown["Seen by the encoder"][rest], pictures.hatch(side)[rest])
    assert np.array_equal(shown["Seen by the encoder"][top], shown["Target"][top])
    assert np.array_equal(shown["Prediction"][top], pictures.dots(side)[top])
    assert np.array_equal(shown["Filled in"][top], shown["Target"][top])
    assert np.array_equal(shown["Filled in"][rest], shown["Prediction"][rest])
    assert np.all(shown["Prediction"][rest] == 255)  # 0.06 above a target stretched by 0.05: full white, not restretched
    assert view.inputs[0].error == "RMSE 0.0600; spread of the target 0.0000"


def test_no_data_of_the_target_has_one_colour_and_does_not_count():
    triple = continuous("canopy_height_eth", 12.0, predicted=15.0)
    triple.target[:, -PATCH:, :], triple.valid[:, -PATCH:, :] = 127, False
    row = tile_view(tile_of(canopy_height_eth=triple)).others[0]
    target = figures_of(row)["Target"]
    assert np.all(target[-1] == pictures.NO_DATA)
    assert not np.any(np.all(target[: len(target) // 2] == pictures.NO_DATA, axis=-1))
    assert row.error == "RMSE 3.0\N{NO-BREAK SPACE}m; spread of the target 0.0\N{NO-BREAK SPACE}m"
    assert (row.scale.low, row.scale.high, row.scale.unit) == ("0", "12", "m")


@pytest.mark.parametrize("name", [n for n, spec in MODALITIES.items() if spec.scope == "pixel"])
def test_all_invalid_modality_is_named_and_not_drawn(name):
    spec = MODALITIES[name]
    if spec.kind == "categorical":
        ids = np.full((P, P), -1)
        triple = MapTriple(spec.bands, ids, np.zeros_like(ids), ids >= 0)
    else:
        triple = continuous(name, np.nan, predicted=0.0, valid=False)
    view = tile_view(tile_of(**{name: triple}))
    assert view.inputs == view.others == []
    assert view.absent == [spec.title]


def test_a_view_of_two_bands_is_red_and_cyan_and_counts_each_band_once():
    target = np.full((2, P, P), 1000.0)
    target[0, :, ::2], target[1, :, 1::2] = 3000, 3000  # B11 in every other column, B12 in the rest
    prediction = target.copy()
    prediction[0] += 100
    triple = MapTriple(("B11", "B12"), target, prediction, np.ones(target.shape, bool))
    row = tile_view(tile_of(sired=triple)).others[0]
    assert row.title == "Sentinel-2 short-wave infrared (sired)"
    assert row.detail.startswith("Red B12, green and blue B11. ")
    shown = figures_of(row)["Target"][:: PICTURE_SIDE_PX // P, :: PICTURE_SIDE_PX // P]
    assert {tuple(rgb) for rgb in shown[:, ::2].reshape(-1, 3).tolist()} == {(0, 255, 255)}
    assert {tuple(rgb) for rgb in shown[:, 1::2].reshape(-1, 3).tolist()} == {(255, 0, 0)}
    assert row.error.startswith(f"RMSE {0.01 / np.sqrt(2):.4f};")  # one of two bands is 0.01 off


def test_bands_that_have_a_range_of_their_own():
    row = tile_view(tile_of(ndvi=continuous("ndvi", 0.4, predicted=0.65))).others[0]
    assert (row.scale.low, row.scale.high) == ("\N{MINUS SIGN}0.2", "1.0")
    assert row.error == "RMSE 0.25; spread of the target 0.00"
    rows = tile_view(tile_of(sentinel1_rtc=continuous("sentinel1_rtc", -12.0))).others
    assert [row.title for row in rows] == [
        f"Sentinel-1 terrain-corrected, {orbit} pass" for orbit in ("ascending", "descending")
    ]


def masked_apart(**visible: np.ndarray) -> TilePicture:
    maps = {"rgb": continuous("sentinel2", 2000), "semseg": MapTriple(("Map",), *[np.zeros((G, G), int)] * 2, VISIBLE)}
    maps["rgb"].bands, bands = ("B4", "B3", "B2"), slice(3)
    maps["rgb"] = MapTriple(
        maps["rgb"].bands, *(part[bands] for part in (maps["rgb"].target, maps["rgb"].target, maps["rgb"].valid))
    )
    return TilePicture("tile", "l2a", "val", visible, PATCH, maps, inputs=("rgb",))


def test_maps_of_their_own_visible_patches_and_resolution():
    tile = masked_apart(rgb=VISIBLE, semseg=~VISIBLE)
    assert tile.problems() == []
    assert tile.size_px == P
    assert tile.hidden_pixels("rgb").shape == (P, P)
    assert np.array_equal(tile.hidden_pixels("semseg"), VISIBLE)
    assert "4 of 16 patches visible: rgb 4" in tile_view(tile).facts


@pytest.mark.parametrize(
    ("visible", "problem"),
    [
        ({"rgb": VISIBLE}, "tile tile: `visible` has rgb, expected rgb, semseg"),
        ({"rgb": VISIBLE, "semseg": VISIBLE[:2]}, "`visible` of semseg is bool (2, 4), expected bool [G, G]"),
        ({"rgb": VISIBLE, "semseg": VISIBLE[:3, :3]}, "`visible` has maps with different numbers of patches"),
    ],
)
def test_visible_patches_that_do_not_fit(visible, problem):
    assert problem in masked_apart(**visible).problems()[0]


def test_orbits_without_data_are_named_and_the_other_drawn():
    triple = continuous("sentinel1", -12.0)
    triple.valid[4:] = False
    triple.target[4:] = -np.inf
    triple.valid[2:4] = False
    view = tile_view(tile_of(sentinel1=triple))
    assert [row.title for row in view.others] == ["Sentinel-1, ascending pass"]
    assert view.absent == ["Sentinel-1, descending pass"]


def test_land_cover_row_counts_hidden_pixels_only():
    truth = np.zeros((P, P), int)
    truth[:, P // 2 :] = 1
    guess = np.zeros((P, P), int)
    guess[:PATCH] = 5  # visible patches: must not count
    triple = MapTriple(("label",), truth, guess, np.ones((P, P), bool))
    row = tile_view(tile_of(dynamic_world=triple)).others[0]
    assert row.error == "50 % of pixels right; always the commonest class: 50 %"
    shares = {c.name: (c.target_percent, c.prediction_percent) for c in row.classes}
    assert shares == {"Water": (50, 100), "Trees": (50, 0)}


def test_everything_visible_leaves_nothing_to_compare():
    tile = tile_of(sentinel2=continuous("sentinel2", 2000))
    tile.visible = np.ones((G, G), bool)
    row = tile_view(tile).inputs[0]
    assert row.error == "No hidden pixel has data to compare with."
