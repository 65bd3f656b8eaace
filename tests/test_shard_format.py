"""A manifest or an index that cannot be right is refused where it is loaded, with every field at once."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from mpmae.errors import ShardError
from mpmae.modalities import no_data_rule
from mpmae.shard_format import index_bytes, index_name, load_index, load_manifest


@pytest.fixture
def own_shards(shards_dir, tmp_path):
    """A copy of the small files of the shard set that a test may damage."""
    for path in shards_dir.iterdir():
        if path.suffix != ".tar":
            shutil.copy(path, tmp_path)
    return tmp_path


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(tree):
        for key in keys:
            tree = tree[key]
        tree[last] = value

    return change


MANIFEST_CASES = {
    "dtype": (put("pixels", 0, "dtype", "nonsense"), "pixels.0 (sentinel2).dtype: 'nonsense'"),
    "object dtype": (put("pixels", 0, "dtype", "O"), "pixels.0 (sentinel2).dtype: 'O'"),
    "one-hot floats": (put("scalars", 3, "dtype", "<f4"), ".dtype: '<f4', expected a numpy dtype of integers"),
    "empty shape": (
        put("pixels", 0, "shape", [0, 64, 64]),
        "pixels.0 (sentinel2).shape: [0, 64, 64], expected numbers above 0",
    ),
    "not square": (put("pixels", 0, "shape", [13, 64, 32]), "shape: [13, 64, 32], expected sides of tile_size_px = 64"),
    "tile size": (put("tile_size_px", 32), "pixels.1 (sentinel1).shape: [8, 64, 64], expected sides of tile_size_px = 32"),
    "bands": (put("pixels", 0, "bands", ["B1"]), "pixels.0 (sentinel2).bands: 1 names, expected 13"),
    "length": (put("scalars", 0, "length", 0), "scalars.0 (era5).length: 0"),
    "unknown": (put("pixels", 0, "name", "sentinel9"), "pixels.0 (sentinel9).name: no such modality"),
    "twice": (put("scalars", 1, "name", "era5"), "scalars.1 (era5).name: era5 is listed twice"),
    "statistics short": (put("band_stats", "era5", "std", [1.0]), "band_stats.era5.std: 1 values, expected 12"),
    "sentinel2 long": (put("band_stats", "sentinel2_l2a", "max", [1.0] * 14), "band_stats.sentinel2_l2a.max: 14 values"),
    "statistics NaN": (put("band_stats", "aster", "mean", [float("nan"), 0]), "band_stats.aster.mean: [nan, 0.0], expected"),
    "statistics of nothing": (
        lambda tree: tree["band_stats"].update(moon=tree["band_stats"]["aster"]),
        "band_stats.moon: the set has no such modality",
    ),
    "num_samples": (put("splits", "train", 0, "num_samples", -1), "splits.train.0.num_samples: -1"),
    "num_bytes": (put("splits", "train", 0, "num_bytes", 2**64), "splits.train.0.num_bytes: 18446744073709551616"),
    "path": (put("splits", "train", 0, "name", "../train-00000.tar"), "splits.train.0.name: '../train-00000.tar'"),
    "number of 401 digits": (put("band_stats", "aster", "mean", [10**400, 0]), "band_stats.aster.mean"),
    "number of 5001 digits": (put("seed", "BIG"), "is not JSON"),
}


@pytest.mark.parametrize(("change", "expected"), MANIFEST_CASES.values(), ids=MANIFEST_CASES)
def test_a_manifest_that_cannot_be_right(change, expected, own_shards):
    path = own_shards / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree).replace('"BIG"', "1" + "0" * 5000))
    with pytest.raises(ShardError) as caught:
        load_manifest(own_shards)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


def test_all_problems_at_once(own_shards):
    path = own_shards / "manifest.json"
    tree = json.loads(path.read_text())
    for name in ("dtype", "statistics short", "num_samples"):
        MANIFEST_CASES[name][0](tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ShardError) as caught:
        load_manifest(own_shards)
    assert len(caught.value.problems) == 3


def load_changed(folder, data: bytes):
    """`load_index` of the first shard with `data` for its index, as a faulty writer would have left it."""
    manifest = load_manifest(folder)
    shard = manifest.shards("train")[0].model_copy(update={"index_sha256": hashlib.sha256(data).hexdigest()})
    path = folder / index_name(shard.name)
    path.write_bytes(data)
    return load_index(path, manifest, shard)


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"PK\x03\x04"], ids=["empty", "cut off", "zip"])
def test_an_index_that_is_none(data, own_shards):
    with pytest.raises(ShardError, match=r"train-00000\.index\.npy: cannot read the index"):
        load_changed(own_shards, data)


@pytest.mark.parametrize("offset", [2**64 - 1, -1, 0])
def test_offsets_outside_the_shard(offset, own_shards):
    manifest = load_manifest(own_shards)
    shard = manifest.shards("train")[0]
    rows = np.load(own_shards / index_name(shard.name))
    assert len(load_changed(own_shards, index_bytes(rows))) == shard.num_samples
    size = int(rows["size"][2, 1])
    # -1: the last byte lies just outside; 0: the member ends with the shard
    rows["offset"][2, 1] = offset if offset > 0 else shard.num_bytes - size - offset
    changed = index_bytes(rows)
    if offset == 0:
        load_changed(own_shards, changed)
        return
    with pytest.raises(
        ShardError, match=r"1 members lie outside the \d+ bytes of train-00000\.tar, first sentinel1 of sample 2"
    ):
        load_changed(own_shards, changed)


@pytest.mark.parametrize("dtype", ["<u2", "<f2", "<f4"])
def test_sentinel2_code_0_is_no_data_in_any_dtype(dtype):
    values = np.array([0, 1, 2000], dtype)
    assert no_data_rule("sentinel2", dtype).valid(values).tolist() == [False, True, True]


def test_sentinel2_floats_that_are_no_numbers():
    assert not no_data_rule("sentinel2", "f4").valid(np.array([np.nan, -np.inf], "f4")).any()
