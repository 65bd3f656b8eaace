"""Tiles of a shard set, compared with what the source file holds."""

import json

import fsspec
import h5py
import numpy as np
import pytest
import torch

from mpmae.embed import open_source
from mpmae.embed.source import UNKNOWN, Tiles
from mpmae.errors import ConfigError, ShardError
from mpmae.eval.config import ImageSection
from mpmae.eval.encoder_input import EncoderInput
from mpmae.modalities import MODALITIES

BANDS = ("B4", "B2", "B12")
INPUT = EncoderInput(BANDS, 8)
ROWS = [MODALITIES["sentinel2"].bands.index(band) for band in BANDS]


@pytest.fixture(scope="module")
def truth(mmearth_dir):
    """By tile id: stored arrays, split, place and product level."""
    (path,) = mmearth_dir.glob("*.h5")
    splits = json.loads((mmearth_dir / f"{path.stem}_splits.json").read_text())
    split_of = {row: split for split, rows in splits.items() for row in rows}
    tiles = {}
    with h5py.File(path) as file:
        for row, (tile_id, level) in enumerate(file["metadata"][()].tolist()):
            arrays = {name: file[name][row] for name in file if name != "metadata"}
            tiles[tile_id.decode()] = arrays | {"split": split_of[row], "level": level.decode()}
    stats = json.loads((mmearth_dir / f"{path.stem}_band_stats.json").read_text())
    return tiles, stats


def whole(source) -> Tiles:
    return source.read(np.arange(len(source)))


def test_everything_about_every_tile(shards_dir, truth):
    tiles, stats = truth
    source = open_source(shards_dir, INPUT)
    read = whole(source)
    assert sorted(read.ids) == sorted(tiles)
    assert source.facts["statistics"] == {"l1c": "the shard set's", "l2a": "the shard set's"}
    names = {column.name: column.class_names for column in source.columns}
    for i, tile_id in enumerate(read.ids):
        stored = tiles[tile_id]
        assert read.splits[i] == stored["split"]
        assert read.product_levels[i] == stored["level"]
        values = stored["sentinel2"][ROWS].astype(np.float64)
        mean, std = (np.array(stats[f"sentinel2_{stored['level']}"][key])[ROWS, None, None] for key in ("mean", "std"))
        expected = np.where(values != 0, (values - mean) / std, 0)
        np.testing.assert_allclose(read.images[i, 0].numpy(), expected, atol=1e-4)
        assert read.valid_fraction[i] == pytest.approx((values != 0).mean())
        place = [np.degrees(np.arctan2(*stored[name].astype(np.float64))) for name in ("lat", "lon")]
        np.testing.assert_allclose(read.locations[i], place, atol=1e-9)
        for name in ("esa_worldcover", "dynamic_world"):
            assert class_name(names[name], read.classes[name][i]) in most_frequent(name, stored[name])
        assert read.classes["biome"][i] == (stored["biome"].argmax() if (stored["biome"] == 1).any() else UNKNOWN)
    source.close()


def class_name(names, class_id):
    return None if class_id == UNKNOWN else names[class_id]


def most_frequent(name: str, codes: np.ndarray) -> set:
    """Names of the most frequent classes, counted one by one."""
    counts = {c.name: int((codes == c.code).sum()) for c in MODALITIES[name].classes}
    most = max(counts.values())
    return {n for n, count in counts.items() if count == most} if most else {None}


def test_splits_in_the_order_asked_for_and_across_batches(shards_dir):
    source = open_source(shards_dir, INPUT, splits=("val", "train"))
    assert list(source.num_tiles) == ["val", "train"]
    read = whole(source)
    assert read.splits == ["val"] * source.num_tiles["val"] + ["train"] * source.num_tiles["train"]
    some = np.array([0, len(source) - 1, source.num_tiles["val"], 1])
    assert source.read(some).ids == [read.ids[i] for i in some]
    torch.testing.assert_close(source.read(some).images, read.images[torch.from_numpy(some)])
    source.prefetch(some)
    with pytest.raises(ShardError, match="no split 'tset'; it has train, val, test"):
        open_source(shards_dir, INPUT, splits=("tset",))


def test_a_set_behind_a_url(shards_dir, tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    store.put(f"{shards_dir}/", "/embedded/", recursive=True)
    monkeypatch.setenv("MPMAE_CACHE_DIR", str(tmp_path))
    source, local = (open_source(where, INPUT, max_samples=5) for where in ("memory://embedded", shards_dir))
    source.prefetch(np.arange(5))
    assert torch.equal(whole(source).images, whole(local).images)
    assert source.fingerprint == local.fingerprint
    source.close()
    store.rm("/embedded", recursive=True)


def test_max_samples_are_spread_over_all_splits(shards_dir):
    source = open_source(shards_dir, INPUT, max_samples=20)
    assert sum(source.num_tiles.values()) == len(source) == 20
    assert all(source.num_tiles.values())
    every = whole(open_source(shards_dir, INPUT)).ids
    places = [every.index(tile_id) for tile_id in whole(source).ids]
    assert np.diff(places).min() >= 1
    assert np.diff(places).max() <= 5


STATISTICS = {"l2a": {"mean": (100.0, 200.0, 300.0), "std": (10.0, 20.0, 30.0)}}


@pytest.mark.parametrize(
    ("normalise", "origins"),
    [
        ("auto", {"l1c": "the shard set's", "l2a": "the checkpoint's"}),
        ("dataset", {"l1c": "the shard set's", "l2a": "the shard set's"}),
    ],
)
def test_whose_statistics(shards_dir, truth, normalise, origins):
    source = open_source(shards_dir, EncoderInput(BANDS, 8, STATISTICS), ImageSection(normalise=normalise), max_samples=20)
    assert source.facts["statistics"] == origins
    read = whole(source)
    i = read.product_levels.index("l2a")
    values = truth[0][read.ids[i]]["sentinel2"][ROWS].astype(np.float64)
    mean, std = (np.array(STATISTICS["l2a"][key])[:, None, None] for key in ("mean", "std"))
    is_ours = np.allclose(read.images[i, 0], np.where(values != 0, (values - mean) / std, 0), atol=1e-3)
    assert is_ours == (normalise == "auto")


def test_statistics_of_pretraining_alone(shards_dir):
    with pytest.raises(ConfigError, match="the checkpoint has no statistics"):
        open_source(shards_dir, INPUT, ImageSection(normalise="pretraining"))
    source = open_source(shards_dir, EncoderInput(BANDS, 8, STATISTICS), ImageSection(normalise="pretraining"))
    assert source.facts["statistics"] == {"l2a": "the checkpoint's"}
    with pytest.raises(ShardError, match="'l1c', but no statistics of sentinel2_l1c"):
        whole(source)


def test_the_centre_is_cut_to_a_multiple_of_the_patch(shards_dir):
    every = whole(open_source(shards_dir, INPUT, max_samples=4)).images
    source = open_source(shards_dir, EncoderInput(BANDS, 12), max_samples=4)
    assert source.facts["image"] == "its centre of 60 px of 64 px"
    assert torch.equal(whole(source).images, every[..., 2:62, 2:62])


def test_a_size_that_is_asked_for(shards_dir):
    every = whole(open_source(shards_dir, INPUT, max_samples=4)).images
    cut = open_source(shards_dir, INPUT, ImageSection(size=48, fit="crop"), max_samples=4)
    assert torch.equal(whole(cut).images, every[..., 8:56, 8:56])
    scaled = open_source(shards_dir, INPUT, ImageSection(size=32), max_samples=4)
    assert scaled.facts["image"] == "the whole tile of 64 px, scaled to 32 px"
    images = whole(scaled).images
    assert images.shape[-2:] == (32, 32)
    torch.testing.assert_close(images.mean((3, 4)), every.mean((3, 4)), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("encoder_input", "image", "told"),
    [
        (INPUT, ImageSection(size=60), "--size 60: the encoder takes multiples of its patch size, 8 px"),
        (INPUT, ImageSection(size=72, fit="crop"), "tiles of 64 px are cropped to at most their side"),
        (INPUT, ImageSection(size=32, fit="tile"), "--fit tile"),
        (EncoderInput(BANDS, 128), ImageSection(), "smaller than a patch"),
        (EncoderInput(("B4", "B17"), 8), ImageSection(), "no band B17"),
    ],
)
def test_what_cannot_be(shards_dir, encoder_input, image, told):
    with pytest.raises(ConfigError, match=told):
        open_source(shards_dir, encoder_input, image)
