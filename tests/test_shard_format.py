"""A manifest or an index that cannot be right is refused where it is loaded, with every field at once."""

import hashlib
import json
import shutil
import tarfile

import numpy as np
import pytest

from mpmae.errors import ShardError
from mpmae.modalities import no_data_rule
from mpmae.shard_files import load_index, load_manifest
from mpmae.shard_format import index_bytes, index_name
from mpmae.tar_members import tar_header, tar_size


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
    "name": (put("splits", "train", 0, "name", "train-00000"), "expected a plain file name that ends in .tar"),
    "spread": (put("band_stats", "aster", "std", [0, 1]), "band_stats.aster.std: [0.0, 1.0], expected numbers above 0"),
    "tile of terabytes": (put("pixels", 0, "shape", [13, 2**40, 2**40]), "pixels.0 (sentinel2).shape: [13, 1099511627776"),
    "vector of terabytes": (put("scalars", 0, "length", 2**40), "scalars.0 (era5).length: 1099511627776"),
    "big-endian": (put("pixels", 0, "dtype", ">u2"), "pixels.0 (sentinel2).dtype: '>u2'"),
    "huge code": (
        put("pixels", 0, "no_data", "codes", [2**70]),
        "pixels.0 (sentinel2).no_data.codes: 1180591620717411303424",
    ),
    "text for a number": (put("splits", "train", 0, "num_bytes", "512"), "splits.train.0.num_bytes: Input should be"),
    "newer": (put("format_version", 3), "format_version 3, this version of mpmae reads 1 and 2; update mpmae"),
    "version true": (put("format_version", True), "format_version True"),
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


def overlap(rows):
    rows["offset"][2, 1] = rows["offset"][2, 0]


def far(rows):
    rows["offset"][2, 1] = 2**64 - 1


def behind(rows):
    rows["offset"][2, 1] -= 512


def swap(rows):
    rows["offset"][2, [1, 2]] = rows["offset"][2, [2, 1]]


def wrong_order(rows):
    rows[[1, 2]] = rows[[2, 1]]


def beyond(rows):
    rows["size"][-1, -1] += 512


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (overlap, "sample 2: sentinel1 at byte"),
        (far, "sample 2: sentinel1 at byte 18446744073709551615, expected at byte"),
        (behind, "sample 2: sentinel1 at byte"),
        (swap, "sample 2: sentinel1 at byte"),
        (wrong_order, "sample 1: sentinel2 at byte"),
        (beyond, "its members end the tar at byte"),
    ],
)
def test_an_index_that_is_no_layout_of_its_tar(change, expected, own_shards):
    manifest = load_manifest(own_shards)
    shard = manifest.shards("train")[0]
    rows = np.load(own_shards / index_name(shard.name))
    np.testing.assert_array_equal(load_changed(own_shards, index_bytes(rows)), rows)
    change(rows)
    with pytest.raises(ShardError, match=rf"index\.npy does not fit train-00000\.tar: {expected}"):
        load_changed(own_shards, index_bytes(rows))


def test_headers_of_indices_are_never_evaluated(own_shards):
    manifest = load_manifest(own_shards)
    good = (own_shards / index_name(manifest.shards("train")[0].name)).read_bytes()
    length = int.from_bytes(good[8:10], "little")
    for text in (
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }",
        b"(" * 60_000,
        b"{'descr': '|O', 'fortran_order': False, 'shape': (20,), }",
    ):
        data = good[:8] + max(length, len(text)).to_bytes(2, "little") + text.ljust(length) + good[10 + length :]
        with pytest.raises(ShardError, match="cannot read the index"):
            load_changed(own_shards, data)
    with pytest.raises(ShardError, match=r"bytes of rows, expected \d+ for 20"):
        load_changed(own_shards, good[:-1])


def test_tar_headers_are_those_of_tarfile():
    for name, size in (("00000012.sentinel2.lz4", 0), ("x" * 100, 1), ("a", 8**11 - 1)):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        header = info.tobuf(tarfile.USTAR_FORMAT)
        assert tar_header(name, size) == header
        assert tar_size(header) == size
        for position in (0, 101, 130, 150, 156, 257, 511):
            changed = bytearray(header)
            changed[position] ^= 1
            assert tar_size(bytes(changed)) is None


@pytest.mark.parametrize("dtype", ["<u2", "<f2", "<f4"])
def test_sentinel2_code_0_is_no_data_in_any_dtype(dtype):
    values = np.array([0, 1, 2000], dtype)
    assert no_data_rule("sentinel2", dtype).valid(values).tolist() == [False, True, True]


def test_sentinel2_floats_that_are_no_numbers():
    assert not no_data_rule("sentinel2", "f4").valid(np.array([np.nan, -np.inf], "f4")).any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"format": "mpmae-shards", "seed": 1, "seed": 2}', "the key 'seed' is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": "mpmae-shards", "format_version": 2}', "pixels: Field required"),
        ("\xff\xfe", "is not JSON"),
        ("[]", "is not a manifest"),
    ],
)
def test_texts_that_are_no_manifest(text, expected, tmp_path):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardError, match=expected):
        load_manifest(tmp_path)
