"""Shard sets equal their source bit for bit, are reproducible, and a failed build never looks finished."""

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset

from mpmae.errors import ShardError, SourceError
from mpmae.files import TEMP_SUFFIX
from mpmae.modalities import MMEARTH, MODALITIES, no_data_rule
from mpmae.shard_codecs import decode_pixels
from mpmae.shard_files import load_manifest
from mpmae.shard_tools import output
from mpmae.shard_tools.build import build
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.tile import presence_bits


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def assert_equals_source(shards_dir: Path, source_dir: Path, num_samples: int) -> None:
    """Compares with the HDF5 file through h5py alone."""
    shard_set = ShardSet(shards_dir)
    splits = json.loads((source_dir / f"{source_dir.name}_splits.json").read_text())
    num_seen = 0
    with h5py.File(source_dir / f"{source_dir.name}.h5") as file:
        assert set(shard_set.modalities) == set(file) - {"metadata"}
        for split, rows in splits.items():
            tiles = list(shard_set.tiles(split))
            assert sorted(tile.row for tile in tiles) == sorted(rows)
            for tile in tiles:
                assert (tile.tile_id, tile.product_level) == tuple(file["metadata"][tile.row])
                for name in shard_set.modalities:
                    expected = file[name][tile.row]
                    assert tile.values[name].dtype == expected.dtype, name
                    assert tile.values[name].shape == expected.shape, name
                    assert tile.values[name].tobytes() == expected.tobytes(), (name, tile.row)
            num_seen += len(tiles)
    assert num_seen == num_samples


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("source", ["source_32", "source_64", "source_128"])
def test_equals_the_source(source, codec, request, tmp_path):
    source_dir = request.getfixturevalue(source)
    manifest = build(source_dir, tmp_path / "set", codec=codec, max_samples_per_shard=7, progress=False)
    assert manifest == load_manifest(tmp_path / "set")
    assert manifest.tile_size_px == int(source.removeprefix("source_"))
    assert_equals_source(tmp_path / "set", source_dir, manifest.source.num_tiles)


@pytest.mark.parametrize("codec", ["raw", "lz4"])
def test_real_tiles_equal_the_source(real_source, codec, tmp_path):
    manifest = build(real_source, tmp_path / "set", codec=codec, shard_size_mb=8, progress=False)
    assert_equals_source(tmp_path / "set", real_source, manifest.source.num_tiles)


def test_presence_bits_follow_the_file(source_64, tmp_path):
    manifest = build(source_64, tmp_path / "set", progress=False)
    shard_set, absent = ShardSet(tmp_path / "set"), 0
    with h5py.File(source_64 / f"{source_64.name}.h5") as file:
        for row in shard_set.index(manifest.shards("train")[0]):
            for i, name in enumerate(manifest.modalities):
                values = file[name][row["row"]]
                expected = bool(no_data_rule(name, values.dtype).valid(values).any())
                assert bool(int(row["presence"]) >> i & 1) == expected, (name, row["row"])
                absent += not expected
    assert absent > 5, "the synthetic set must have absent modalities for this test to mean anything"


def test_one_hot_rows_without_a_class_are_absent_and_kept(own_source, tmp_path):
    with h5py.File(own_source / "tiny.h5", "r+") as file:
        file["biome"][0] = 0
        file["biome"][1] = 255
        file["eco_region"][0] = 65535
    build(own_source, tmp_path / "set", progress=False)
    assert_equals_source(tmp_path / "set", own_source, 10)
    shard_set = ShardSet(tmp_path / "set")
    for tile in shard_set.tiles(None):
        bits = presence_bits(shard_set.manifest, tile.values)
        assert bool(bits >> shard_set.modalities.index("biome") & 1) == (tile.row not in (0, 1))
        assert bool(bits >> shard_set.modalities.index("eco_region") & 1) == (tile.row != 0)


def test_other_dtypes_and_byte_order(own_source, tmp_path):
    with h5py.File(own_source / "tiny.h5", "r+") as file:
        for name, dtype in {"sentinel2": ">u2", "aster": "<f4", "canopy_height_eth": "u1", "sentinel1": "<f2"}.items():
            values = file[name][:]
            del file[name]
            file[name] = values.astype(dtype)
    build(own_source, tmp_path / "set", progress=False)
    shard_set = ShardSet(tmp_path / "set")
    assert [np.dtype(e.dtype).str for e in shard_set.manifest.pixels[:2]] == ["<u2", "<f2"]
    with h5py.File(own_source / "tiny.h5") as file:
        for tile in shard_set.tiles(None):
            for name in ("sentinel2", "aster", "canopy_height_eth", "sentinel1"):
                np.testing.assert_array_equal(tile.values[name], file[name][tile.row])


def test_bytes_are_reproducible_and_follow_the_seed(source_64, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(source_64, tmp_path / name, seed=seed, shard_size_mb=1, progress=False)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    orders = [[tile.row for tile in ShardSet(tmp_path / name).tiles("train", ())] for name in ("a", "c")]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) != orders[0]


def test_shards_respect_their_limits(source_64, tmp_path):
    manifest = build(source_64, tmp_path / "bytes", shard_size_mb=0.5, progress=False)
    shards = manifest.shards("train")
    assert len(shards) > 3
    assert all(shard.num_bytes <= 500_000 for shard in shards)
    assert all((tmp_path / "bytes" / shard.name).stat().st_size == shard.num_bytes for shard in shards)
    manifest = build(source_64, tmp_path / "count", max_samples_per_shard=5, progress=False)
    assert [shard.num_samples for shard in manifest.shards("train")] == [5] * 7 + [3]
    manifest = build(source_64, tmp_path / "tiny", shard_size_mb=0.001, progress=False)
    assert all(shard.num_samples == 1 for shard in manifest.shards("train"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_plain_webdataset_reads_the_shards(built_32):
    manifest = load_manifest(built_32)
    urls = [str(built_32 / shard.name) for shard in manifest.shards("train")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(8)]
    entry = next(e for e in manifest.pixels if e.name == "sentinel2")
    for sample, tile in zip(samples, ShardSet(built_32).tiles("train"), strict=True):
        assert {k for k in sample if not k.startswith("__")} == {f"{e.name}.lz4" for e in manifest.pixels} | {"scalars.raw"}
        np.testing.assert_array_equal(decode_pixels(entry, sample["sentinel2.lz4"]), tile.values["sentinel2"])


def test_dali_index_lists_data_offsets(built_32):
    lines = (built_32 / "train-00001.idx").read_text().splitlines()
    tar = (built_32 / "train-00001.tar").read_bytes()
    assert lines[0] == f"v1.2 {len(lines) - 1}" == "v1.2 3"
    extension, offset, size, name = lines[1].split()[:4]
    assert (extension, name) == ("sentinel2.lz4", "00000003.sentinel2.lz4")
    header = tar[int(offset) - 512 : int(offset)]
    assert header.startswith(name.encode() + b"\0")
    assert int(header[124:135], 8) == int(size)


def test_chosen_modalities_and_splits(source_32, tmp_path):
    chosen = ["month", "sentinel2", "aster"]
    manifest = build(source_32, tmp_path / "set", modalities=chosen, splits=["val"], progress=False)
    assert manifest.modalities == ("sentinel2", "aster", "month")
    assert list(manifest.splits) == ["val"]
    assert set(manifest.band_stats) == {"sentinel2_l1c", "sentinel2_l2a", "aster", "month"}


def test_band_statistics_are_those_of_the_source(source_32, built_32):
    stats = json.loads((source_32 / "tiny_band_stats.json").read_text())
    manifest = load_manifest(built_32)
    assert set(manifest.band_stats) == set(stats)
    assert list(manifest.band_stats["era5"].mean) == stats["era5"]["mean"]


def test_an_empty_split_is_kept(own_source, tmp_path):
    (own_source / "tiny_splits.json").write_text(json.dumps({"train": [0, 1], "val": []}))
    manifest = build(own_source, tmp_path / "set", progress=False)
    assert manifest.splits["val"] == ()
    assert manifest.num_samples("train") == 2


def test_output_must_be_empty(own_shards, source_32, tmp_path):
    with pytest.raises(ShardError, match=r"holds a shard set of \d+ files.*--overwrite"):
        build(source_32, own_shards, progress=False)
    (own_shards / "manifest.json").unlink()
    with pytest.raises(ShardError, match="holds an unfinished build"):
        build(source_32, own_shards, progress=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(ShardError, match=r"1 other files \(notes.txt\); give another folder$"):
        build(source_32, foreign, progress=False)
    with pytest.raises(ShardError, match="is a file"):
        build(source_32, foreign / "notes.txt", progress=False)
    with pytest.raises(ShardError, match="is the source folder"):
        build(source_32, source_32, overwrite=True, progress=False)


def test_overwrite_removes_the_set_and_nothing_else(own_shards, source_32, tmp_path):
    (own_shards / "notes.txt").write_text("mine")
    (own_shards / f"train-00009.tar{TEMP_SUFFIX}").write_text("left by a killed build")
    assert len(list(own_shards.glob("*.tar"))) == 5
    build(source_32, own_shards, overwrite=True, progress=False)
    build(source_32, tmp_path / "fresh", progress=False)
    assert (own_shards / "notes.txt").read_text() == "mine"
    assert {k: v for k, v in digests(own_shards).items() if k != "notes.txt"} == digests(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.tar"])
def test_overwrite_refuses_files_of_other_tools(name, source_32, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ShardError, match=f"{name}, not written by this tool"):
        build(source_32, tmp_path, overwrite=True, progress=False)
    assert (tmp_path / name).read_text() == "{}"


def test_a_bad_source_leaves_the_old_set_alone(own_shards, own_source):
    before = digests(own_shards)
    (own_source / "tiny_splits.json").write_text("{")
    with pytest.raises(SourceError, match=r"tiny_splits\.json is not JSON"):
        build(own_source, own_shards, overwrite=True, progress=False)
    assert digests(own_shards) == before


def test_full_disk_names_shard_and_tile_and_leaves_the_journal(source_32, tmp_path, monkeypatch):
    write, num_calls = output.ShardWriter._write, 0

    def full_after_2_samples(self, data):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(output.ShardWriter, "_write", full_after_2_samples)
    with pytest.raises(
        ShardError, match=r"train-00000.tar, tile synth_\d{8} \(row \d\): the disk .* is full.*free some space.*--resume"
    ):
        build(source_32, tmp_path / "set", progress=False)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["build.jsonl"]


def test_too_small_a_disk_is_known_up_front(source_32, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ShardError, match=r"needs about [\d.,]+ MB \(from 10 of 10 tiles.*the disk has 0 MB"):
        build(source_32, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


def test_space_estimate_is_close(source_64, tmp_path, monkeypatch):
    actual = sum(s.num_bytes for shards in build(source_64, tmp_path / "a", progress=False).splits.values() for s in shards)
    for factor, fits in ((0.8, False), (1.4, True)):
        usage = namedtuple("usage", "total used free")(10**9, 0, int(actual * factor))
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            build(source_64, tmp_path / "b", progress=False)
        else:
            with pytest.raises(ShardError, match="needs about"):
                build(source_64, tmp_path / "b", progress=False)


def test_interrupted_build_leaves_no_manifest_and_whole_shards_only(source_32, tmp_path, monkeypatch):
    add, num_calls = output.ShardWriter.add, 0

    def interrupt_at_the_fifth(self, *args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise KeyboardInterrupt
        return add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(output.ShardWriter, "add", interrupt_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            build(source_32, tmp_path / "set", max_samples_per_shard=3, progress=False)
    assert {p.name for p in (tmp_path / "set").iterdir()} == {
        "build.jsonl",
        "train-00000.tar",
        "train-00000.index.npy",
        "train-00000.idx",
    }
    with pytest.raises(ShardError, match=r"no manifest.json \(an unfinished build\?\)"):
        ShardSet(tmp_path / "set")
    build(source_32, tmp_path / "set", overwrite=True, progress=False)
    assert_equals_source(tmp_path / "set", source_32, 10)


def test_bad_options_are_told_together(source_32, tmp_path):
    with pytest.raises(ShardError) as caught:
        build(source_32, tmp_path / "set", codec="zip", shard_size_mb=0, max_samples_per_shard=0, seed=-1, progress=False)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "codec",
        "shard_size_mb",
        "max_samples_per_shard",
        "seed",
    ]
    with pytest.raises(SourceError, match="no split holdout; it has train, val, test"):
        build(source_32, tmp_path / "set", splits=["holdout"], progress=False)


def test_modality_table_is_the_fixed_one(built_32):
    manifest = load_manifest(built_32)
    assert [e.name for e in manifest.pixels] == [n for n in MMEARTH if MODALITIES[n].scope == "pixel"]
    assert [e.filter for e in manifest.pixels if e.name == "dynamic_world"] == ["none"]
