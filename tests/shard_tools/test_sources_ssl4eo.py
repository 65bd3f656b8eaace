"""SSL4EO-S12 v1.1: four seasons a place, in tars or in chunk files of many places."""

import numpy as np
import pytest

from mpmae.errors import SourceError
from mpmae.shard_tools.sources import open_source
from tests.shard_tools.foreign_sets import EVENING_NS, MORNING_NS, S2_NAMES, TarSet, rows_by_id, zarr_zip

DAY_NS = 86_400 * 10**9
TIMES = np.array([MORNING_NS, EVENING_NS + 90 * DAY_NS, MORNING_NS + 180 * DAY_NS, EVENING_NS + 270 * DAY_NS])
MONTHS = (5, 8, 10, 1)
NUM_PLACES, P = 3, 16


def write_chunk_file(root, layer: str, bands: np.ndarray, names: list[str], samples, places_per_chunk: int = 2) -> None:
    path = root / "train" / layer / "ssl4eos12_train_seasonal_data_000001.zarr.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "bands": bands,
        "band": np.array(names),
        "sample": np.array(samples),
        "center_lat": np.arange(len(samples)) * 10.0,
        "center_lon": np.full(len(samples), 10.0),
        "time": np.arange(4),
        "time_": np.broadcast_to(TIMES, (len(samples), 4)).astype("datetime64[ns]"),
    }
    zarr_zip(path, arrays, chunks={"bands": (places_per_chunk, 1, *bands.shape[2:])})


@pytest.fixture
def chunk_files(tmp_path):
    rng = np.random.default_rng(2)
    s2 = rng.integers(1, 4000, (NUM_PLACES, 4, 12, P, P)).astype(np.int16)
    s1 = rng.normal(-12, 4, (NUM_PLACES, 4, 2, P, P)).astype(np.float16)
    root = tmp_path / "SSL4EO"
    write_chunk_file(root, "S2L2A", s2, S2_NAMES, ["0080717", "0060573", "0000009"])
    # The places of the other layer stand in another order.
    write_chunk_file(root, "S1GRD", s1[::-1], ["vv", "vh"], ["0000009", "0060573", "0080717"])
    return root, s2, s1


def test_chunk_files_give_a_tile_per_place_and_season(chunk_files):
    root, s2, s1 = chunk_files
    with open_source(root, "ssl4eo") as source:
        assert (source.num_tiles, source.tile_size_px) == (12, P)
        rows = rows_by_id(source)
        for place, key in enumerate(["0080717", "0060573", "0000009"]):
            for season in range(4):
                tile = source.read_tile(rows[f"{key}_t{season}"])
                ours = tile.values["sentinel2"][source.bands["sentinel2"].index("B8A")]
                np.testing.assert_array_equal(ours, s2[place, season, 8])
                filled = slice(0, 2) if season % 2 else slice(2, 4)
                np.testing.assert_array_equal(tile.values["sentinel1"][filled], s1[place, season].astype(np.float32))
                assert np.isneginf(np.delete(tile.values["sentinel1"], filled, axis=0)).all()
                angle = 2 * np.pi * MONTHS[season] / 12
                np.testing.assert_allclose(tile.values["month"], [np.sin(angle), np.cos(angle)], atol=1e-6)
                assert np.degrees(np.arctan2(*tile.values["lat"])) == pytest.approx(10 * place, abs=1e-4)


def test_chunk_files_are_cut_and_keep_the_seasons_apart(chunk_files):
    root, s2, _ = chunk_files
    with open_source(root, "ssl4eo", {"tile_size_px": "5", "modalities": "sentinel2"}) as source:
        assert source.num_tiles == 3 * 4 * 9
        tile = source.read_tile(rows_by_id(source)["0060573_t3_r2c1"])
        np.testing.assert_array_equal(tile.values["sentinel2"][0], s2[1, 3, 0, 10:15, 5:10])


def test_places_without_counterpart(tmp_path, chunk_files):
    root, _, s1 = chunk_files
    write_chunk_file(root, "S1GRD", s1[:2], ["vv", "vh"], ["0000009", "0099999"])
    with open_source(root, "ssl4eo") as source:
        assert {key.partition("_")[0] for key in rows_by_id(source)} == {"0000009"}
        assert any("2 samples with Sentinel-2 have none (0080717 of" in note for note in source.notes())
        assert any("1 samples have no Sentinel-2 (0099999 of" in note for note in source.notes())


def test_tars_with_seasons_and_a_static_layer(tmp_path):
    tar_set = TarSet(tmp_path / "SSL4EO", tmp_path, times=4)
    for split, shard, key in (("train", "ssl4eos12_shard_000001", "0000173"), ("val", "ssl4eos12_shard_000001", "0000200")):
        tar_set.shard(split, shard, {layer: [key] for layer in ("S2L2A", "S1GRD", "DEM")}, time_ns=TIMES)
    with open_source(tar_set.root, "ssl4eo") as source:
        rows = rows_by_id(source)
        assert sorted(rows) == [f"{key}_t{t}" for key in ("0000173", "0000200") for t in range(4)]
        assert {split: len(r) for split, r in source.splits.items()} == {"train": 4, "val": 4}
        for season in range(4):
            values = source.read_tile(rows[f"0000200_t{season}"]).values
            np.testing.assert_array_equal(values["sentinel2"][0], tar_set.values["0000200", "S2L2A"][season, 0])
            np.testing.assert_array_equal(values["dem"], tar_set.values["0000200", "DEM"][0])


def test_a_damaged_chunk_file(chunk_files):
    root, *_ = chunk_files
    path = root / "train/S1GRD/ssl4eos12_train_seasonal_data_000001.zarr.zip"
    sound = path.read_bytes()
    path.write_bytes(sound[:-200])
    with pytest.raises(SourceError, match=r"S1GRD/.*000001\.zarr\.zip: not a whole zarr zip"):
        open_source(root, "ssl4eo")
    data = bytearray(sound)
    start = data.index(b"bands/1.3.0.0.0") + 200
    data[start : start + 50] = b"\x55" * 50
    path.write_bytes(data)
    with open_source(root, "ssl4eo") as source:
        rows = rows_by_id(source)
        with pytest.raises(SourceError, match=r"tile 0080717_t3 \(row 3\), sentinel1: array bands cannot be read"):
            source.read_tile(rows["0080717_t3"])
        source.read_tile(rows["0080717_t2"])


def test_arrays_of_another_shape_are_named(tmp_path):
    root = tmp_path / "SSL4EO"
    write_chunk_file(root, "S2L2A", np.ones((2, 4, 12, P, P), np.int16)[:, :, :, 0], S2_NAMES, ["a", "b"])
    with pytest.raises(SourceError, match=r"bands of shape \(2, 4, 12, 16\), expected \(places, times, bands"):
        open_source(root, "ssl4eo")
    write_chunk_file(root, "S2L2A", np.ones((2, 4, 12, P, P), np.int16), ["B01", "Bx", *S2_NAMES[2:]], ["a", "b"])
    with pytest.raises(SourceError, match="sentinel2: bands Bx, expected some of B1, B2"):
        open_source(root, "ssl4eo")
