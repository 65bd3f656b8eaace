"""Merged and subset sets: the same tiles, bytes copied as they are, statistics of what is there, clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpmae.errors import ShardError
from mpmae.shard_files import load_manifest
from mpmae.shard_tools.build import build
from mpmae.shard_tools.merge import merge
from mpmae.shard_tools.rewrite import RewriteOptions
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.stats import band_stats
from mpmae.shard_tools.subset import Wanted, subset
from mpmae.shard_tools.synth import synth
from mpmae.shard_tools.verify import verify

BY_THREE = RewriteOptions(max_samples_per_shard=3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Two sets of 10 and 12 tiles of 16 px with other ids."""
    folder = tmp_path_factory.mktemp("sets")
    for name, num, seed in (("a", 10, 1), ("b", 12, 2)):
        source = synth(folder / f"source_{name}", num_tiles=num, tile_size_px=16, seed=seed, progress=False)
        rename_tiles(source, name)
        build(source, folder / name, max_samples_per_shard=4, progress=False)
    return folder / "a", folder / "b"


def rename_tiles(source: Path, prefix: str) -> None:
    import h5py

    name = source.name
    with h5py.File(source / f"{name}.h5", "r+") as file:
        records = file["metadata"][:]
        field = records.dtype.names[0]
        records[field] = [prefix.encode() + old for old in records[field]]
        file["metadata"][...] = records
    path = source / f"{name}_tile_info.json"
    path.write_text(json.dumps({prefix + key: value for key, value in json.loads(path.read_text()).items()}))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def by_id(folder: Path, split: str | None = None) -> dict[bytes, dict[str, bytes]]:
    return {t.tile_id: {k: v.tobytes() for k, v in t.values.items()} for t in ShardSet(folder).tiles(split)}


def check_good(folder: Path) -> None:
    assert verify(folder).problems == []
    stats = {key: value.model_dump() for key, value in load_manifest(folder).band_stats.items()}
    for key, value in band_stats(ShardSet(folder)).items():
        assert {name: list(column) for name, column in stats[key].items()} == value, key


def test_a_whole_subset_is_the_same_set(sets, tmp_path):
    """Same seed, same cut: tars and indices are the builder's own, byte for byte."""
    subset(sets[0], tmp_path / "all", Wanted(), options=RewriteOptions(max_samples_per_shard=4))
    before, after = files(sets[0]), files(tmp_path / "all")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]


def test_merge_has_every_tile_of_both(sets, tmp_path):
    merge(tmp_path / "ab", sets, options=BY_THREE)
    check_good(tmp_path / "ab")
    manifest, parts = load_manifest(tmp_path / "ab"), [load_manifest(folder) for folder in sets]
    for split in ("train", "val", "test"):
        assert by_id(tmp_path / "ab", split) == by_id(sets[0], split) | by_id(sets[1], split)
    assert manifest.source.name == "source_a + source_b"
    assert manifest.source.num_tiles == 22
    rows = {t.tile_id: t.row for t in ShardSet(tmp_path / "ab").tiles(None)}
    assert rows == {t.tile_id: t.row for t in ShardSet(sets[0]).tiles(None)} | {
        t.tile_id: t.row + 10 for t in ShardSet(sets[1]).tiles(None)
    }
    assert manifest.source.fingerprint not in {m.source.fingerprint for m in parts}
    ids = [t.tile_id[:1] for t in ShardSet(tmp_path / "ab").tiles("train")]
    assert ids != sorted(ids), "shuffled over both sets"


def test_the_bytes_do_not_depend_on_threads_and_change_with_the_seed(sets, tmp_path):
    for name, seed, workers in (("one", 7, 1), ("three", 7, 3), ("other", 8, 3)):
        merge(tmp_path / name, sets, options=RewriteOptions(seed=seed, workers=workers, shard_size_mb=0.05))
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert files(tmp_path / "one")["train-00000.tar"] != files(tmp_path / "other")["train-00000.tar"]


def test_tiles_in_both_sets(sets, tmp_path):
    subset(sets[0], tmp_path / "part", Wanted(splits=("train",), rename={"train": "val"}))
    both = [sets[0], tmp_path / "part"]
    with pytest.raises(ShardError, match=r"8 tile ids are there twice \(asynth_0.*--keep-first"):
        merge(tmp_path / "ab", both)
    assert not (tmp_path / "ab").exists()
    merge(tmp_path / "ab", both, keep_first=True)
    check_good(tmp_path / "ab")
    assert by_id(tmp_path / "ab", "train") == by_id(sets[0], "train")
    assert by_id(tmp_path / "ab", "val") == by_id(sets[0], "val")


def test_sets_that_do_not_fit_together(sets, source_32, tmp_path):
    build(source_32, tmp_path / "c", codec="raw", modalities=["sentinel2", "aster"], progress=False)
    with pytest.raises(ShardError) as caught:
        merge(tmp_path / "out", [sets[0], tmp_path / "c"])
    text = "\n".join(caught.value.problems)
    for expected in ("tile_size_px 32", "codec raw", "c has no biome", "aster.codec raw", "sentinel2.filter none"):
        assert expected in text
    with pytest.raises(ShardError, match="1 set to merge"):
        merge(tmp_path / "out", sets[:1])
    with pytest.raises(ShardError, match="is one of the sets to read"):
        merge(sets[0], sets, options=RewriteOptions(overwrite=True))


def test_subset_by_modality_and_presence(sets, tmp_path):
    wanted = Wanted(modalities=("sentinel2", "biome", "aster"), require=("sentinel1",))
    subset(sets[1], tmp_path / "part", wanted, options=BY_THREE)
    check_good(tmp_path / "part")
    before = {t.tile_id: t for t in ShardSet(sets[1]).tiles(None)}
    has_sentinel1 = {i for i, t in before.items() if np.isfinite(t.values["sentinel1"]).any()}
    after = by_id(tmp_path / "part")
    assert 0 < len(has_sentinel1) < len(before)
    assert after.keys() == has_sentinel1
    for tile_id, values in after.items():
        assert values == {name: before[tile_id].values[name].tobytes() for name in ("sentinel2", "aster", "biome")}
    assert load_manifest(tmp_path / "part").modalities == ("sentinel2", "aster", "biome")


def test_subset_by_level_ids_and_name(sets, tmp_path):
    tiles = {t.tile_id: t for t in ShardSet(sets[1]).tiles("train")}
    ids = sorted(i for i, t in tiles.items() if t.product_level == b"l2a")[:3]
    other = next(i for i, t in tiles.items() if t.product_level == b"l1c")
    wanted = Wanted(
        splits=("train",), product_level="l2a", tile_ids=tuple(i.decode() for i in [*ids, other]), rename={"train": "few"}
    )
    manifest = subset(sets[1], tmp_path / "part", wanted)
    assert by_id(tmp_path / "part", "few").keys() == set(ids)
    assert list(manifest.splits) == ["few"]
    assert manifest.band_stats == load_manifest(sets[1]).band_stats, "no train split: the statistics of the whole set"
    assert verify(tmp_path / "part").ok
    with pytest.raises(ShardError, match=r"1 of 1 tile ids are not there \(nowhere\)"):
        subset(sets[1], tmp_path / "other", Wanted(tile_ids=("nowhere",)))


def test_a_larger_draw_includes_a_smaller_one(sets, tmp_path):
    for name, wanted in (
        ("two", Wanted(num_samples=2)),
        ("five", Wanted(num_samples=5)),
        ("half", Wanted(fraction=0.5, splits=("train",))),
    ):
        subset(sets[1], tmp_path / name, wanted, options=RewriteOptions(seed=3))
        check_good(tmp_path / name)
    assert by_id(tmp_path / "two", "train").keys() < by_id(tmp_path / "five", "train").keys()
    assert {s: load_manifest(tmp_path / "five").num_samples(s) for s in ("train", "val")} == {"train": 5, "val": 1}
    assert len(by_id(tmp_path / "half")) == round(0.5 * load_manifest(sets[1]).num_samples("train"))


def test_what_a_set_does_not_have_is_told_at_once(sets, tmp_path):
    wanted = Wanted(
        splits=("dev",), modalities=("aster",), require=("moon",), product_level="l3", num_samples=0, fraction=2.0,
        rename={"train": "a/b"},
    )  # fmt: skip
    with pytest.raises(ShardError) as caught:
        subset(sets[0], tmp_path / "out", wanted, options=RewriteOptions(seed=-1, shard_size_mb=0))
    assert len(caught.value.problems) == 10
    with pytest.raises(ShardError, match="no samples are left"):
        subset(sets[0], tmp_path / "out", Wanted(tile_ids=()))
    assert not (tmp_path / "out").exists()


def test_damage_is_not_copied(sets, tmp_path):
    broken = tmp_path / "broken"
    subset(sets[0], broken, Wanted())
    path = broken / "train-00000.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    (broken / "val-00000.tar").unlink()
    with pytest.raises(ShardError) as caught:
        subset(broken, tmp_path / "out", Wanted())
    assert "train-00000.tar: its sha256 is not the manifest's" in caught.value.problems[0]
    assert "val-00000.tar cannot be read" in caught.value.problems[1]
    assert not (tmp_path / "out").exists()


def test_an_interrupted_rewrite_has_no_manifest(sets, tmp_path, monkeypatch):
    from mpmae.shard_tools import output

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_whole", full)
    with pytest.raises(ShardError, match="is full"):
        subset(sets[0], tmp_path / "out", Wanted())
    assert not (tmp_path / "out" / "manifest.json").exists()
