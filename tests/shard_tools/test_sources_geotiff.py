"""A folder of GeoTIFFs per modality."""

import threading

import numpy as np
import pytest

from mpmae.errors import SourceError
from mpmae.shard_tools.sources import open_source
from tests.shard_tools.foreign_sets import geotiff, rows_by_id

BANDS = ["B02", "B03", "B04", "B08"]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(3)
    root, values = tmp_path / "tiffs", {}
    for split, name, size in (("train", "alpine", 24), ("train", "coast", 24), ("val", "plain", 24)):
        s2 = rng.integers(1, 5000, (4, size, size)).astype(np.uint16)
        s2[:, 0, 0] = 65535
        dem = rng.normal(500, 30, (1, size // 3, size // 3)).astype(np.float32)
        dem[0, 1, 1] = -9999
        values[name] = {"sentinel2": s2, "dem": dem}
        geotiff(root / split / "sentinel2" / f"{name}.tif", s2, BANDS, nodata=65535, taken="2021:07:04 10:00:00")
        if name != "coast":
            geotiff(root / split / "dem" / f"{name}.tif", dem, nodata=-9999, pixel_m=30)
    return root, values


def test_tiles_hold_what_the_files_held(folder):
    root, values = folder
    with open_source(root, "geotiff") as source:
        assert (source.num_tiles, source.tile_size_px) == (3, 24)
        assert source.pixels == ("sentinel2", "dem")
        assert source.bands["sentinel2"] == ("B2", "B3", "B4", "B8")
        rows = rows_by_id(source)
        assert source.splits["train"].tolist() == sorted([rows["alpine"], rows["coast"]])
        tile = source.read_tile(rows["alpine"])
        expected = values["alpine"]["sentinel2"].copy()
        expected[:, 0, 0] = 0
        np.testing.assert_array_equal(tile.values["sentinel2"], expected)
        dem = values["alpine"]["dem"].repeat(3, axis=1).repeat(3, axis=2)
        dem[dem == -9999] = -np.inf
        np.testing.assert_array_equal(tile.values["dem"], dem)
        assert np.isneginf(source.read_tile(rows["coast"]).values["dem"]).all()
        assert "dem: 1 images have none (coast); their tiles lack it" in source.notes()


@pytest.mark.parametrize("side", [8, 7])
def test_windows_equal_the_whole_image_cut(folder, side):
    root, values = folder
    dem = values["plain"]["dem"].repeat(3, axis=1).repeat(3, axis=2)
    with open_source(root, "geotiff", {"tile_size_px": str(side)}) as source:
        rows = rows_by_id(source)
        for i in range(3):
            for j in range(3):
                window = np.s_[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
                tile = source.read_tile(rows[f"plain_r{i}c{j}"])
                got = np.where(np.isneginf(tile.values["dem"]), -9999, tile.values["dem"])
                np.testing.assert_array_equal(got, dem[window])
                s2 = values["plain"]["sentinel2"][window]
                np.testing.assert_array_equal(tile.values["sentinel2"], np.where(s2 == 65535, 0, s2))


def test_place_and_month(folder):
    root, _ = folder
    with open_source(root, "geotiff") as source:
        values = source.read_tile(0, ["lat", "lon", "month"]).values
    degrees = {name: float(np.degrees(np.arctan2(*values[name]))) for name in ("lat", "lon")}
    # The centre lies 120 m east of the central meridian, 9 degrees east, and 4,999,880 m north of the equator.
    assert degrees["lon"] == pytest.approx(9 + 120 / (111_320 * np.cos(np.radians(45.15))), abs=1e-4)
    assert degrees["lat"] == pytest.approx(45.1517, abs=1e-3)
    np.testing.assert_allclose(values["month"], [np.sin(7 * np.pi / 6), np.cos(7 * np.pi / 6)], atol=1e-6)


def test_images_without_georeference_have_no_place(tmp_path):
    geotiff(tmp_path / "t/sentinel2/a.tif", np.ones((4, 8, 8), np.uint16), BANDS, crs=None)
    with open_source(tmp_path / "t", "geotiff") as source:
        assert source.scalars == ()
    geotiff(tmp_path / "t/sentinel2/b.tif", np.ones((4, 8, 8), np.uint16), BANDS, taken="2020:01:01 00:00:00")
    with open_source(tmp_path / "t", "geotiff") as source:
        tile = source.read_tile(rows_by_id(source)["a"])
        assert all(np.isneginf(tile.values[name]).all() for name in ("lat", "lon", "month"))


def test_bands_by_option_and_splits_by_seed(tmp_path):
    root = tmp_path / "plain"
    rng = np.random.default_rng(0)
    arrays = {}
    for i in range(8):
        arrays[f"i{i}"] = rng.integers(1, 900, (3, 8, 8)).astype(np.int16)
        geotiff(root / "sentinel2" / f"i{i}.tif", arrays[f"i{i}"])
        geotiff(root / "sentinel1" / f"i{i}.tif", np.full((2, 8, 8), -float(i + 1), np.float64), ["VV", "VH"])
    with pytest.raises(SourceError, match=r"3 bands without descriptions; name them with the option bands_sentinel2="):
        open_source(root, "geotiff", {"orbit": "asc"})
    with pytest.raises(SourceError, match=r"VV, VH name no pass; give the option orbit=asc"):
        open_source(root, "geotiff", {"bands_sentinel2": "B8,B4,B3"})
    options = {"bands_sentinel2": "B8,B4,B3", "orbit": "desc", "val_fraction": "0.25", "tile_size_px": "4"}
    with open_source(root, "geotiff", options) as source:
        assert source.bands == {"sentinel2": ("B3", "B4", "B8"), "sentinel1": ("desc_VV", "desc_VH")}
        tile = source.read_tile(rows_by_id(source)["i5_r1c0"])
        np.testing.assert_array_equal(tile.values["sentinel2"], arrays["i5"][::-1, 4:, :4])
        assert (tile.values["sentinel1"] == -6).all()
        assert tile.values["sentinel1"].dtype == np.float32
        assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 24, "val": 8}


def test_every_problem_of_the_files_at_once(folder):
    root, values = folder
    path = root / "train/sentinel2/alpine.tif"
    path.write_bytes(path.read_bytes()[:150])
    geotiff(root / "train/sentinel2/coast.tif", values["coast"]["sentinel2"].astype(np.float32), BANDS)
    geotiff(root / "val/dem/plain.tif", np.zeros((1, 7, 7), np.float32))
    with pytest.raises(SourceError) as caught:
        open_source(root, "geotiff")
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "alpine.tif: not a readable GeoTIFF" in text
    assert "plain.tif: bands 4 of uint16 (B02, B03, B04, B08), expected 4 of float32" in text
    assert "plain.tif: 7 x 7 px, expected the 24 x 24 of sentinel2 or that divided by a whole number" in text


def test_damaged_pixels_name_tile_and_modality(folder):
    root, _ = folder
    path = root / "val/sentinel2/plain.tif"
    data = bytearray(path.read_bytes())
    start = data.index(b"\x78")  # of the first block, whose zlib header then makes no sense
    data[start : start + 600] = b"\xff" * 600
    path.write_bytes(data)
    with open_source(root, "geotiff") as source:
        with pytest.raises(SourceError, match=r"tile plain \(row 2\), sentinel2: not a readable GeoTIFF"):
            source.read_tile(2)
        assert source.read_tile(2, ["dem"]).tile_id == b"plain"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"modalities": "dem"}, "has no sentinel2 images"),
        ({"modalities": "sentinel2,ndvi"}, "has no folder for modality 'ndvi'"),
        ({"bands_foo": "a"}, "option bands_foo: no such modality"),
        ({"bands_sentinel2": "B2,B3"}, "4 bands, but 2 names"),
        ({"bands_sentinel2": "B2,B3,B3,B4"}, "bands B3 given twice"),
        ({"colour": "blue"}, r"unknown option 'colour'; geotiff knows tile_size_px, .*bands_NAME"),
    ],
)
def test_options_are_checked(folder, change, expected):
    with pytest.raises(SourceError, match=expected):
        open_source(folder[0], "geotiff", change)


def test_many_threads_read_the_same(folder):
    with open_source(folder[0], "geotiff", {"tile_size_px": "8"}) as source:
        expected = [source.read_tile(row).values for row in range(source.num_tiles)]
        wrong = []

        def work(seed: int) -> None:
            for row in np.random.default_rng(seed).permutation(source.num_tiles):
                values = source.read_tile(int(row)).values
                wrong.extend(n for n, v in values.items() if not np.array_equal(v, expected[row][n]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong
