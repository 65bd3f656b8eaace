"""The synthetic folder has MMEarth's layout, is a pure function of its options, and one modality tells of another."""

import errno
import hashlib
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest

from mpmae.errors import ShardError, SourceError
from mpmae.modalities import MODALITIES, class_lookup, no_data_rule
from mpmae.shard_tools import synth as synth_module
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.synth import DTYPES, synth


def pixels(file: h5py.File, name: str, rows) -> np.ndarray:
    """Values [bands, all pixels of `rows`]."""
    return np.concatenate([file[name][int(row)].reshape(file[name].shape[1], -1) for row in rows], axis=1)


def r2(features: np.ndarray, target: np.ndarray, num_train: int) -> float:
    """Held-out R2 of a linear fit of target [N] on features [F, N]."""
    x = np.vstack([features, np.ones(features.shape[1])]).T
    weights, *_ = np.linalg.lstsq(x[:num_train], target[:num_train], rcond=None)
    held_out = target[num_train:]
    return 1 - ((held_out - x[num_train:] @ weights) ** 2).mean() / ((held_out - target[:num_train].mean()) ** 2).mean()


def test_layout(source_64):
    with h5py.File(source_64 / "synth64.h5") as file:
        assert set(file) == {*DTYPES, "metadata"}
        for name, dtype in DTYPES.items():
            dataset = file[name]
            assert dataset.dtype == dtype
            assert dataset.chunks == (1, *dataset.shape[1:])
            assert dataset.compression == "gzip"
            if MODALITIES[name].classes:
                values = dataset[:]
                valid = no_data_rule(name, dataset.dtype).valid(values)
                assert (class_lookup(MODALITIES[name])[values[valid]] >= 0).all()
        assert file["metadata"].dtype == np.dtype([("tile_id", "S100"), ("S2_type", "S10")])
        levels = file["metadata"]["S2_type"]
        assert set(levels) == {b"l1c", b"l2a"}
        assert (file["sentinel2"][:, 10][levels == b"l2a"] == 0).all()
        assert (file["sentinel2"][:, 10][levels == b"l1c"] > 0).any()
        assert (file["aster"][:, 0][file["aster"][:, 0] != -32768] >= 0).all()
    with MMEarthSource(source_64) as source:
        assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 38, "val": 5, "test": 5}
        assert source.ignored == ()


def test_pure_function_of_seed_and_tile(tmp_path):
    digests = []
    for name, num_tiles, seed in (("a/s", 4, 0), ("b/s", 4, 0), ("c/s", 6, 0), ("d/s", 4, 1)):
        folder = synth(tmp_path / name, num_tiles=num_tiles, tile_size_px=16, seed=seed, progress=False)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()})
    assert digests[0] == digests[1]
    assert digests[0]["s.h5"] != digests[3]["s.h5"]
    with h5py.File(tmp_path / "a/s/s.h5") as few, h5py.File(tmp_path / "c/s/s.h5") as more:
        for name in DTYPES:
            np.testing.assert_array_equal(few[name][:], more[name][:4])


def test_some_tiles_lack_some_modalities(source_64):
    with h5py.File(source_64 / "synth64.h5") as file:
        orbit = np.isfinite(file["sentinel1"][:].reshape(48, 2, -1)).any(axis=-1)
        assert 0 < (~orbit).sum() < 48
        canopy = file["canopy_height_eth"][:, 0] != 127
        assert 0 < canopy.mean() < 1


def test_modalities_predict_each_other(source_64):
    """Linear fits on other tiles beat the mean by far: what a masked autoencoder has to learn is there."""
    with h5py.File(source_64 / "synth64.h5") as file:
        levels = file["metadata"]["S2_type"]
        s1, canopy = file["sentinel1"][:], file["canopy_height_eth"][:]
        rows = [
            row for row in np.flatnonzero(levels == b"l2a") if np.isfinite(s1[row, :2]).all() and (canopy[row] != 127).any()
        ]
        assert len(rows) >= 8
        s2 = np.log(np.maximum(pixels(file, "sentinel2", rows)[[1, 2, 3, 8, 11, 12]].astype(float), 1))
        num_train = s2.shape[1] * 2 // 3
        assert r2(s2, pixels(file, "sentinel1", rows)[1].astype(float), num_train) > 0.25
        height = pixels(file, "canopy_height_eth", rows)[0].astype(float)
        known = height != 127
        num_train = int(known[:num_train].sum())
        assert r2(s2[:, known], height[known], num_train) > 0.3

        month_k = file["era5"][:, 4].astype(float)
        known = np.isfinite(month_k)
        features = np.vstack([file["lat"][:].T ** 2, file["lat"][:, :1].T * file["month"][:].T])[:, known]
        assert r2(features, month_k[known], known.sum() * 2 // 3) > 0.5


def test_dynamic_world_follows_worldcover(source_64):
    with h5py.File(source_64 / "synth64.h5") as file:
        world, cover = file["dynamic_world"][:], file["esa_worldcover"][:]
        both = (world != 0) & (cover != 255)
        for label in np.unique(world[both]):
            assert len(np.unique(cover[both & (world == label)])) <= 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_tiles": 0}, "num_tiles 0"),
        ({"tile_size_px": 30}, "tile_size_px 30; expected a multiple of 4"),
        ({"seed": -1}, "seed -1"),
        ({"split_fractions": (0.5, 0.1)}, "split_fractions"),
    ],
)
def test_bad_options(options, expected, tmp_path):
    with pytest.raises(SourceError, match=expected):
        synth(tmp_path / "out", progress=False, **options)


def test_never_overwrites(source_32):
    with pytest.raises(SourceError, match="is not an empty folder"):
        synth(source_32, num_tiles=1, progress=False)


KILLED_SYNTH = """
import os, sys
from mpmae.shard_tools import synth as module

where, num_calls, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
original, calls = getattr(module, where), []

def killed(*args):
    calls.append(args)
    if len(calls) == num_calls:
        os._exit(9)
    return original(*args)

setattr(module, where, killed)
module.synth(folder, num_tiles=5, tile_size_px=16, progress=False)
"""


@pytest.mark.parametrize(("where", "num_calls"), [("draw_climate", 3), ("write_whole", 2)])
def test_a_killed_run_does_not_hinder_the_next(where, num_calls, tmp_path):
    arguments = [where, str(num_calls), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED_SYNTH, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    synth(tmp_path / "out", num_tiles=5, tile_size_px=16, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with MMEarthSource(tmp_path / "out") as source:
        assert source.num_tiles == 5


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth_module, "draw_climate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path / "out", num_tiles=5, tile_size_px=16, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_partial_folder_of_other_origin_is_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(SourceError, match=r"out\.partial .*holds other files \(thesis\.tex\)"):
        synth(tmp_path / "out", num_tiles=1, progress=False)
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


def test_an_empty_folder_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    synth(tmp_path / "out", num_tiles=2, tile_size_px=16, progress=False)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out.h5").is_file()


def test_a_full_disk_gives_advice_that_synth_can_follow(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synth_module, "write_whole", full)
    with pytest.raises(ShardError, match=r"is full .*free some space.*then run the command again$"):
        synth(tmp_path / "out", num_tiles=2, tile_size_px=16, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_tile_info_states_the_same_as_the_file(source_64):
    info = json.loads((source_64 / "synth64_tile_info.json").read_text())
    with h5py.File(source_64 / "synth64.h5") as file:
        for row, (tile_id, level) in enumerate(file["metadata"]):
            tile = info[tile_id.decode()]
            assert tile["S2_type"] == level.decode()
            assert np.isclose(file["lat"][row, 0], np.sin(np.radians(tile["lat"])), atol=1e-6)
            assert file["biome"][row, tile["biome"]] == 1
            assert file["eco_region"][row, tile["eco_region"]] == 1
