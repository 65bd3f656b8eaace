"""Any number of workers gives the same bytes; bad tiles are told or left out; statistics are made where there are none."""

import inspect
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpmae.errors import ShardError, SourceError
from mpmae.shard_format import pixel_entry
from mpmae.shard_tools import progress
from mpmae.shard_tools.build import build, build_from
from mpmae.shard_tools.cli import main
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.stats import band_stats
from mpmae.shard_tools.tile import Tile, TileError, encode_members, presence_bits
from mpmae.shard_tools.verify import verify
from tests.shard_tools.test_shards_build import digests
from tests.shard_tools.test_shards_resume import Computed, interrupted
from tests.shard_tools.test_shards_source import spoil_chunk


@pytest.mark.parametrize("codec", ["lz4", "raw"])
def test_any_number_of_workers_gives_the_same_bytes(codec, source_64, tmp_path):
    for workers in (1, 2, 7):
        build(source_64, tmp_path / f"{workers}", codec=codec, workers=workers, shard_size_mb=1, progress=False)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "7")
    with pytest.raises(ShardError, match="workers 0; expected at least 1"):
        build(source_64, tmp_path / "0", workers=0)


def test_real_tiles_with_several_workers(real_source, tmp_path):
    for workers in (1, 3):
        build(real_source, tmp_path / f"{workers}", workers=workers, splits=["val", "test"], progress=False)
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


def test_statistics_are_made_where_there_are_none(source_32, tmp_path, monkeypatch):
    with MMEarthSource(source_32, need_band_stats=False) as plain:
        source = Computed(plain)
        manifests = [
            build_from(source, tmp_path / f"{workers}", workers=workers, max_samples_per_shard=3, progress=False)
            for workers in (1, 2)
        ]
        expected = band_stats(plain, "train")
        assert manifests[0] == manifests[1]
        assert set(manifests[0].band_stats) == set(expected)
        for key, columns in expected.items():
            for quantity, column in columns.items():
                np.testing.assert_allclose(getattr(manifests[0].band_stats[key], quantity), column, rtol=1e-12)
        only_val = build_from(source, tmp_path / "val", splits=["val"], progress=False)
        assert only_val.band_stats["era5"].max == tuple(band_stats(plain, "val")["era5"]["max"])


class OneBad:
    """A source of another kind, one of whose tiles cannot be read."""

    def __init__(self, source: MMEarthSource, row: int):
        self._source, self._row = source, row
        self.band_stats = source.band_stats

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def read_tile(self, row: int, names=None) -> Tile:
        if row == self._row:
            raise SourceError(f"row {row}: nothing there")
        return self._source.read_tile(row, names)


def spoiled(folder: Path) -> dict[int, str]:
    """Damages three tiles; their rows and the modalities at fault."""
    spoil_chunk(folder, "sentinel1", 6)
    spoil_chunk(folder, "month", 1)
    with h5py.File(folder / "tiny.h5", "r+") as file:
        file["biome"][7] = np.full(14, 3, np.uint8)
    return {6: "sentinel1", 1: "month", 7: "biome"}


def test_bad_tiles_are_left_out_on_request(own_source, tmp_path, capsys):
    bad = spoiled(own_source)
    splits = json.loads((own_source / "tiny_splits.json").read_text())
    with pytest.raises(TileError, match=r"add --skip-bad to leave such tiles out"):
        build(own_source, tmp_path / "stopped", progress=False)
    manifests = [
        build(own_source, tmp_path / f"{workers}", workers=workers, skip_bad=True, max_samples_per_shard=2, progress=False)
        for workers in (1, 3)
    ]
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    tiles = json.loads((tmp_path / "1" / "skipped.json").read_text())["tiles"]
    assert {tile["row"]: tile["modality"] for tile in tiles} == bad
    for tile in tiles:
        assert tile["tile"] == f"tile synth_{tile['row']:08d} (row {tile['row']})"
        assert tile["row"] in splits[tile["split"]]
        assert tile["tile"] in tile["error"]
    kept = [tile.row for tile in ShardSet(tmp_path / "1").tiles(None, ())]
    assert sorted(kept) == sorted(set(range(10)) - set(bad))
    assert sum(manifests[0].num_samples(split) for split in manifests[0].splits) == 7


def test_left_out_tiles_survive_a_resume(own_source, tmp_path, monkeypatch):
    spoiled(own_source)
    options = {"max_samples_per_shard": 2, "skip_bad": True, "progress": False}
    build(own_source, tmp_path / "whole", **options)
    with MMEarthSource(own_source) as source:
        for num_samples in range(1, 7):
            folder = tmp_path / f"{num_samples}"
            interrupted(source, folder, monkeypatch, num_samples, skip_bad=True)
            build_from(source, folder, resume=True, **options)
            assert digests(folder) == digests(tmp_path / "whole")


def test_a_build_stopped_by_a_bad_tile_goes_on_without_it(own_source, tmp_path):
    spoiled(own_source)
    options = {"max_samples_per_shard": 1, "progress": False}
    with pytest.raises(SourceError):
        build(own_source, tmp_path / "set", seed=1, **options)
    build(own_source, tmp_path / "set", seed=1, resume=True, skip_bad=True, **options)
    build(own_source, tmp_path / "whole", seed=1, skip_bad=True, **options)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


def test_leaving_tiles_out_is_not_forgotten(own_source, tmp_path, monkeypatch):
    spoiled(own_source)
    with MMEarthSource(own_source) as source:
        interrupted(source, tmp_path / "set", monkeypatch, 6, skip_bad=True)
        with pytest.raises(ShardError, match=r"the interrupted build left out \d bad tiles; add --skip-bad"):
            build_from(source, tmp_path / "set", max_samples_per_shard=2, resume=True, progress=False)


def test_bad_tiles_of_any_source(source_32, tmp_path):
    with MMEarthSource(source_32) as plain:
        for row in range(3):
            with pytest.raises(SourceError, match=f"row {row}: nothing there"):
                build_from(OneBad(plain, row), tmp_path / "set", overwrite=True, progress=False)
            build_from(OneBad(plain, row), tmp_path / "set", overwrite=True, skip_bad=True, progress=False)
            (tile,) = json.loads((tmp_path / "set" / "skipped.json").read_text())["tiles"]
            assert (tile["row"], tile["modality"]) == (row, None)
        build_from(plain, tmp_path / "set", overwrite=True, progress=False)
        assert not (tmp_path / "set" / "skipped.json").exists()


def test_a_set_without_any_tile_is_refused(own_source, tmp_path):
    (own_source / "tiny_splits.json").write_text(json.dumps({"train": [6], "val": []}))
    spoil_chunk(own_source, "sentinel1", 6)
    with pytest.raises(SourceError, match=r"none of the 1 tiles can be read: .*sentinel1"):
        build(own_source, tmp_path / "set", skip_bad=True, progress=False)


def test_modalities_that_the_source_lacks(source_32, tmp_path):
    with MMEarthSource(source_32, ["sentinel2", "aster"]) as source:
        with pytest.raises(
            SourceError, match="has no modality radar, sentinel1, which is to be quantised; it has sentinel2, as"
        ):
            build_from(source, tmp_path / "set", modalities=["sentinel2", "radar"], quantise_sentinel1=True)
        manifest = build_from(source, tmp_path / "set", modalities=["sentinel2"], progress=False)
    assert manifest.modalities == ("sentinel2",)
    assert set(manifest.band_stats) == {"sentinel2_l1c", "sentinel2_l2a"}


needs_new_codecs = pytest.mark.skipif(
    "quantise_step" not in inspect.signature(pixel_entry).parameters, reason="needs quantisation and zstd in shard_codecs"
)


@needs_new_codecs
def test_quantised_sentinel1_states_its_error(source_32, own_source, tmp_path):
    manifest = build(source_32, tmp_path / "set", codec="zstd", quantise_sentinel1=True, progress=False)
    bound = next(entry.quantisation.max_error for entry in manifest.pixels if entry.name == "sentinel1")
    assert 0.005 <= bound < 0.006
    with MMEarthSource(source_32) as source:
        for tile in ShardSet(tmp_path / "set").tiles(None, ["sentinel1", "sentinel2"]):
            original = source.read_tile(tile.row)
            np.testing.assert_array_equal(tile.values["sentinel2"], original.values["sentinel2"])
            finite = np.isfinite(original.values["sentinel1"])
            difference = tile.values["sentinel1"][finite] - original.values["sentinel1"][finite]
            assert (np.abs(difference) <= bound).all()
    with h5py.File(own_source / "tiny.h5", "r+") as file:
        file["sentinel1"][4, 0, 0, 0] = 1e6
    with pytest.raises(SourceError, match=r"tile synth_00000004 \(row 4\): sentinel1: 1 values outside"):
        build(own_source, tmp_path / "bad", quantise_sentinel1=True, progress=False)


def test_presence_is_that_of_the_no_data_rules(source_64, tmp_path):
    manifest = build(source_64, tmp_path / "set", progress=False)
    entries = (*manifest.pixels, *manifest.scalars)
    rng = np.random.default_rng(0)
    with MMEarthSource(source_64) as source:
        for row in range(source.num_tiles):
            values = source.read_tile(row).values
            absent = [entry for entry in manifest.pixels if rng.random() < 0.3]
            for entry in absent:
                code = entry.no_data.codes[0] if entry.no_data.codes else -np.inf
                values[entry.name] = np.full(entry.shape, code, entry.dtype)
                if rng.random() < 0.5:
                    values[entry.name][-1, -1, -1] = 1
            expected = sum(int(e.no_data.valid(values[e.name]).any()) << i for i, e in enumerate(entries))
            assert presence_bits(manifest, values) == expected
    index = ShardSet(tmp_path / "set").index(manifest.shards("train")[0])
    for tile, presence in zip(ShardSet(tmp_path / "set").tiles("train"), index["presence"].tolist(), strict=True):
        assert presence == presence_bits(manifest, tile.values)
        assert len(encode_members(manifest, tile)) == len(manifest.members)


def test_command_line(own_source, tmp_path, capsys):
    spoiled(own_source)
    shards = str(tmp_path / "set")
    assert main(["build", str(own_source), shards, "--workers", "2"]) == 2
    assert "add --skip-bad" in capsys.readouterr().err
    assert main(["build", str(own_source), shards, "--resume", "--skip-bad", "--max-samples-per-shard", "2"]) == 2
    assert "max_samples_per_shard was null in the interrupted build, is 2 now" in capsys.readouterr().err
    assert main(["build", str(own_source), shards, "--resume", "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert f"LEFT OUT: 3 tiles that could not be read, listed in {tmp_path / 'set' / 'skipped.json'}" in captured.out
    assert "LEFT OUT: 3 tiles" in captured.err
    assert main(["build", str(own_source), shards, "--option", "a=b", "--resume"]) == 2
    assert "--option a: the format mmearth has no options" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["build", str(own_source), shards, "--option", "a"])
    assert "'a', expected KEY=VALUE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Memory stays below 2 GB" in text
    assert "(default: [])" not in text


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Meter("build train", 10_000, num_done=1000) as meter:
        for _ in range(70):
            now[0] += 1
            meter.advance(50, 10**7)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "build train: 2,500 of 10,000 tiles (25.0%), 50 tiles/s, 10 MB/s, 0:02:30 left",
        "build train: 4,000 of 10,000 tiles (40.0%), 50 tiles/s, 10 MB/s, 0:02:00 left",
    ]
    assert list(progress.track(iter("abc"), 3, "x", enabled=False)) == ["a", "b", "c"]


def test_a_built_set_passes_verify_whatever_the_codec(source_32, tmp_path):
    for codec in ("raw", "lz4"):
        build(source_32, tmp_path / codec, codec=codec, workers=2, progress=False)
        assert verify(tmp_path / codec, source_32).problems == []
