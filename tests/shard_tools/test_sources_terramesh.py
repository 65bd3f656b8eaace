"""TerraMesh: tars of zarr zips, one series per layer, joined by key."""

import threading

import numpy as np
import pytest

from mpmae.errors import SourceError
from mpmae.modalities import MODALITIES
from mpmae.shard_tools.sources import FORMATS, open_source
from tests.shard_tools import foreign_sets
from tests.shard_tools.foreign_sets import EVENING_NS, TarSet, rows_by_id

LAYERS = ("S2L2A", "S1GRD", "DEM", "NDVI", "LULC", "S2RGB")


@pytest.fixture
def tar_set(tmp_path) -> TarSet:
    return TarSet(tmp_path / "TerraMesh", tmp_path)


@pytest.fixture
def whole(tar_set) -> TarSet:
    tar_set.shard("train", "ssl4eos12_shard_000001", {layer: ["a_1", "a_2"] for layer in LAYERS})
    tar_set.shard("val", "ssl4eos12_shard_000009", {layer: ["v_1"] for layer in LAYERS})
    return tar_set


def test_tiles_hold_what_the_arrays_held(whole):
    with open_source(whole.root, "terramesh", {}) as source:
        assert source.num_tiles == 3
        assert source.tile_size_px == 24
        assert {split: rows.tolist() for split, rows in source.splits.items()} == {"train": [0, 1], "val": [2]}
        assert source.pixels == ("sentinel2", "sentinel1", "dem", "ndvi", "lulc", "sentinel2_rgb")
        assert source.bands["sentinel2"] == tuple(b for b in MODALITIES["sentinel2"].bands if b != "B10")
        rows = rows_by_id(source)
        assert set(rows) == {"a_1", "a_2", "v_1"}
        tile = source.read_tile(rows["a_2"])
        assert tile.product_level == b"l2a"
        for band, ours in zip(source.bands["sentinel2"], tile.values["sentinel2"], strict=True):
            name = f"B{int(band[1:]):02d}" if band[1:].isdigit() else band
            np.testing.assert_array_equal(ours, whole.values["a_2", "S2L2A"][0][foreign_sets.S2_NAMES.index(name)])
        for ours, theirs in (("dem", "DEM"), ("ndvi", "NDVI"), ("lulc", "LULC"), ("sentinel2_rgb", "S2RGB")):
            np.testing.assert_array_equal(tile.values[ours], whole.values["a_2", theirs][0])
        for name, values in tile.values.items():
            assert values.shape == source.shapes[name]
            assert values.dtype == source.dtypes[name]


def test_l1c_on_request(tar_set):
    tar_set.shard("train", "s", {"S2L2A": ["a"], "S2L1C": ["a"]})
    with open_source(tar_set.root, "terramesh", {"sentinel2": "l1c"}) as source:
        assert source.bands["sentinel2"] == MODALITIES["sentinel2"].bands
        tile = source.read_tile(0)
        assert tile.product_level == b"l1c"
        np.testing.assert_array_equal(tile.values["sentinel2"][10], tar_set.values["a", "S2L1C"][0, 10])


def test_radar_goes_into_the_pass_of_its_local_time(tar_set):
    tar_set.shard("train", "one", {"S2L2A": ["am"], "S1GRD": ["am"]})
    tar_set.shard("train", "two", {"S2L2A": ["pm"], "S1GRD": ["pm"]}, time_ns=[EVENING_NS])
    with open_source(tar_set.root, "terramesh") as source:
        assert source.bands["sentinel1"] == ("asc_VV", "asc_VH", "desc_VV", "desc_VH")
        rows = rows_by_id(source)
        for key, filled, empty in (("am", slice(2, 4), slice(0, 2)), ("pm", slice(0, 2), slice(2, 4))):
            values = source.read_tile(rows[key]).values["sentinel1"]
            np.testing.assert_array_equal(values[filled], tar_set.values[key, "S1GRD"][0].astype(np.float32))
            assert np.isneginf(values[empty]).all()
    with open_source(tar_set.root, "terramesh", {"orbit": "asc"}) as source:
        assert source.bands["sentinel1"] == ("asc_VV", "asc_VH")
        np.testing.assert_array_equal(
            source.read_tile(0).values["sentinel1"], tar_set.values["am", "S1GRD"][0].astype(np.float32)
        )


def test_radar_without_a_time_says_what_to_do(tar_set):
    tar_set.shard("train", "one", {"S2L2A": ["a"], "S1GRD": ["a"]}, time_ns=[0])
    with (
        open_source(tar_set.root, "terramesh") as source,
        pytest.raises(SourceError, match=r"tile a .*sentinel1.*orbit=asc"),
    ):
        source.read_tile(0)


def test_a_layer_that_a_shard_lacks_is_no_data(tar_set):
    tar_set.shard("train", "majortom_shard_000001", {"S2L2A": ["m"], "S1RTC": ["m"]})
    tar_set.shard("train", "ssl4eos12_shard_000794", {"S2L2A": ["s"], "S1GRD": ["s"]})
    with open_source(tar_set.root, "terramesh") as source:
        tile = source.read_tile(rows_by_id(source)["m"])
        assert not source.no_data("sentinel1").valid(tile.values["sentinel1"]).any()
        assert source.no_data("sentinel1_rtc").valid(tile.values["sentinel1_rtc"]).mean() == 0.5
        assert any(
            "sentinel1_rtc: no tar for 1 shards (train/ssl4eos12_shard_000794.tar)" in note for note in source.notes()
        )


def test_samples_without_a_counterpart_are_counted(tar_set):
    tar_set.shard("train", "x", {"S2L2A": ["a", "b", "c"], "DEM": ["a", "c", "z"]})
    with open_source(tar_set.root, "terramesh") as source:
        assert set(rows_by_id(source)) == {"a", "c"}
        assert "dem: 1 samples with Sentinel-2 have none (b of x.tar); they are left out" in source.notes()
        assert "dem: 1 samples have no Sentinel-2 (z of x.tar); they are left out" in source.notes()
        np.testing.assert_array_equal(source.read_tile(rows_by_id(source)["c"]).values["dem"], tar_set.values["c", "DEM"][0])
    with open_source(tar_set.root, "terramesh", {"join": "sentinel2"}) as source:
        rows = rows_by_id(source)
        assert set(rows) == {"a", "b", "c"}
        assert (source.read_tile(rows["b"]).values["dem"] == -32768).all()


@pytest.mark.parametrize("tile_size_px", [8, 7])
def test_images_are_cut_into_tiles(whole, tile_size_px):
    with open_source(whole.root, "terramesh", {"tile_size_px": str(tile_size_px)}) as source:
        assert source.num_tiles == 27
        tile = source.read_tile(rows_by_id(source)["a_1_r1c2"])
        top, left = tile_size_px, 2 * tile_size_px
        np.testing.assert_array_equal(
            tile.values["lulc"],
            whole.values["a_1", "LULC"][0][:, top : top + tile_size_px, left : left + tile_size_px],
        )
        assert len(source.splits["val"]) == 9
        edge = [note for note in source.notes() if "dropped" in note]
        assert len(edge) == (tile_size_px == 7)
        if edge:
            assert "3 px at the right and 3 px at the lower edge" in edge[0]


def test_place_and_month_as_mmearth_encodes_them(whole):
    with open_source(whole.root, "terramesh", {"tile_size_px": "8"}) as source:
        rows = rows_by_id(source)
        north, south, east, west = (
            {n: np.degrees(np.arctan2(*v)) for n, v in source.read_tile(rows[k], ["lat", "lon"]).values.items()}
            for k in ("a_1_r0c1", "a_1_r2c1", "a_1_r1c2", "a_1_r1c0")
        )
        assert north["lat"] - south["lat"] == pytest.approx(160 / 111_320, abs=1e-5)
        assert (north["lat"] + south["lat"]) / 2 == pytest.approx(45, abs=1e-5)
        assert east["lon"] - west["lon"] == pytest.approx(160 / 111_320 / np.cos(np.radians(45)), abs=1e-5)
        month = source.read_tile(0, ["month"]).values["month"]
        np.testing.assert_allclose(month, [np.sin(2 * np.pi * 5 / 12), np.cos(2 * np.pi * 5 / 12)], atol=1e-6)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_both_zarr_formats_and_fill_values(tmp_path, zarr_format):
    tar_set = TarSet(tmp_path / "set", tmp_path, zarr_format=zarr_format)
    tar_set.bands_of = tar_set.bands

    def bands(layer):
        values, names = tar_set.bands_of(layer)
        values[..., 0, 0] = -9999 if values.dtype.kind == "i" else np.nan
        return values, names

    tar_set.bands = bands
    tar_set.shard("train", "s", {"S2L2A": ["a"], "DEM": ["a"], "NDVI": ["a"]}, _FillValue=-9999)
    with open_source(tar_set.root, "terramesh") as source:
        values = source.read_tile(0).values
    assert (values["sentinel2"][:, 0, 0] == 0).all()
    assert values["dem"][0, 0, 0] == -32768
    assert np.isneginf(values["ndvi"][0, 0, 0])
    assert source.no_data("dem").valid(values["dem"]).sum() == 24 * 24 - 1


def test_a_set_without_split_folders_is_divided_by_image(tar_set):
    keys = [f"k{i}" for i in range(10)]
    tar_set.shard("", "s", {"S2L2A": keys})
    options = {"tile_size_px": "12", "val_fraction": "0.3", "split_seed": "4"}
    with open_source(tar_set.root, "terramesh", options) as source:
        splits = {
            split: {source.read_tile(int(r), ["month"]).tile_id.decode().partition("_r")[0] for r in rows}
            for split, rows in source.splits.items()
        }
    assert len(splits["val"]) == 3
    assert not splits["train"] & splits["val"]
    assert splits["train"] | splits["val"] == set(keys)
    with open_source(tar_set.root, "terramesh", options | {"split_seed": "5"}) as other:
        assert other.splits["val"].tolist() != source.splits["val"].tolist()
        assert other.fingerprint != source.fingerprint


def test_many_threads_read_the_same(whole):
    with open_source(whole.root, "terramesh", {"tile_size_px": "8"}) as source:
        expected = [source.read_tile(row).values for row in range(source.num_tiles)]
        source.close()
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


@pytest.mark.parametrize(("key", "when"), [("a_1", "opened"), ("a_2", "read")])
def test_damaged_samples_name_tile_and_modality(whole, key, when):
    path = whole.root / "train/DEM/ssl4eos12_shard_000001.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x03\x04", data.index(f"{key}.zarr.zip".encode()))
    data[start + 60 : start + 1500] = b"\x55" * 1440
    path.write_bytes(data)
    if when == "opened":
        with pytest.raises(SourceError, match=r"DEM/ssl4eos12_shard_000001\.tar, a_1: no usable array bands"):
            open_source(whole.root, "terramesh")
        return
    with open_source(whole.root, "terramesh") as source:
        row = rows_by_id(source)["a_2"]
        with pytest.raises(SourceError, match=r"tile a_2 \(row 1\), dem: no usable array bands"):
            source.read_tile(row)
        assert source.read_tile(row, ["sentinel2"]).tile_id == b"a_2"


def test_every_kind_of_damage_is_an_error_of_the_tile(whole):
    """Bytes are changed at random: a tile then reads as some tile or fails with SourceError, never otherwise."""
    path = whole.root / "train/S2L2A/ssl4eos12_shard_000001.tar"
    sound = path.read_bytes()
    rng, failures = np.random.default_rng(1), 0
    with open_source(whole.root, "terramesh") as source:
        _, offset, size = (int(column[1]) for column in source._members["sentinel2"])
        for _ in range(60):
            data = bytearray(sound)
            at = offset + int(rng.integers(size))
            data[at : at + int(rng.integers(1, 40))] = rng.bytes(1)
            path.write_bytes(data)
            source.close()
            try:
                source.read_tile(1, ["sentinel2", "lat"])
            except SourceError:
                failures += 1
    assert failures > 20


@pytest.mark.parametrize("keep", [0.2, 0.6, 1.0])
def test_a_tar_cut_off_is_found_when_opened(whole, keep):
    path = whole.root / "train/NDVI/ssl4eos12_shard_000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data.rstrip(b"\0")) * keep)])
    with pytest.raises(SourceError, match=r"train/NDVI/ssl4eos12_shard_000001\.tar.*download the file again"):
        open_source(whole.root, "terramesh")


def test_long_member_names_are_read(tar_set):
    key = "k" * 98
    tar_set.shard("train", "s", {"S2L2A": [key, "b"]})
    with open_source(tar_set.root, "terramesh") as source:
        assert set(rows_by_id(source)) == {key, "b"}
    with pytest.raises(SourceError, match="1 image names make tile ids of more than 100 bytes"):
        open_source(tar_set.root, "terramesh", {"tile_size_px": "12"})


def test_a_bad_header_is_found_when_opened(whole):
    path = whole.root / "val/S2L2A/ssl4eos12_shard_000009.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 0x20
    path.write_bytes(data)
    with pytest.raises(SourceError, match="wrong checksum of the header at byte 0"):
        open_source(whole.root, "terramesh")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sise": "3"}, "unknown option 'sise'; terramesh knows tile_size_px, modalities"),
        ({"tile_size_px": "0"}, "tile_size_px=0, expected a whole number of at least 1"),
        ({"sentinel2": "l3"}, "sentinel2=l3, expected l2a or l1c"),
        ({"val_fraction": "1"}, "a number from 0 to below 1"),
        ({"modalities": "dem"}, "lacks sentinel2"),
        ({"modalities": "sentinel2,aster"}, "no layer for 'aster'; it has dem"),
        ({"tile_size_px": "25"}, "no image holds a tile of 25 px"),
    ],
)
def test_options_are_checked(whole, options, expected):
    with pytest.raises(SourceError, match=expected):
        open_source(whole.root, "terramesh", options)


def test_unknown_formats_and_folders(tmp_path):
    with pytest.raises(SourceError, match=f"unknown format 'npz'; known: {', '.join(FORMATS)}"):
        open_source(tmp_path, "npz")
    with pytest.raises(SourceError, match="not a TerraMesh set: expected SPLIT/LAYER folders"):
        open_source(tmp_path, "terramesh")
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "no", "terramesh")


def test_mmearth_is_a_format_too(source_32):
    with open_source(source_32, "mmearth") as source:
        assert {"sentinel2", "aster"} < set(source.pixels)
    with pytest.raises(SourceError, match="unknown option 'orbit'; mmearth knows none"):
        open_source(source_32, "mmearth", {"orbit": "asc"})
