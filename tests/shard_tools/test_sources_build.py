"""Other people's sets all the way: into shards, out of the loader, into a training step."""

import inspect
import itertools
import json
import re

import numpy as np
import pytest
import torch

import mpmae
from mpmae.loader import CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.modalities import ALL_TARGETS, MODALITIES
from mpmae.shard_tools.build import build_from
from mpmae.shard_tools.cli import main
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.sources import FORMATS, open_source
from mpmae.shard_tools.tile import presence_bits
from mpmae.shard_tools.tile_source import TileSource
from tests.shard_tools.foreign_sets import TarSet, geotiff

LAYERS = ("S2L2A", "S1GRD", "DEM", "NDVI", "LULC", "S2RGB")


def adapter_of_the_docs(repo) -> type:
    text = (repo / "docs/new_source.md").read_text()
    names: dict = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "docs/new_source.md", "exec"), names)
    return names["NpySource"]


def assert_has_the_interface(source) -> None:
    for name in TileSource.__annotations__:
        assert hasattr(source, name), name
    for name, method in inspect.getmembers(TileSource, inspect.isfunction):
        if name.startswith("_"):
            continue
        wanted = [n for n in inspect.signature(method).parameters if n != "self"]
        assert list(inspect.signature(getattr(source, name)).parameters) == wanted, name
    assert set(source.shapes) == set(source.dtypes) == {*source.pixels, *source.scalars}
    assert all(source.shapes[name] == (len(source.bands[name]), *[source.tile_size_px] * 2) for name in source.pixels)
    assert list(source.pixels) == [name for name in MODALITIES if name in source.pixels]


def assert_shards_equal(source, folder) -> None:
    shards = ShardSet(folder)
    for split, rows in source.splits.items():
        tiles = {tile.row: tile for tile in shards.tiles(split)}
        assert sorted(tiles) == rows.tolist()
        for row, stored in tiles.items():
            tile = source.read_tile(row)
            assert (stored.tile_id, stored.product_level) == (tile.tile_id, tile.product_level)
            for name, values in tile.values.items():
                np.testing.assert_array_equal(stored.values[name], values, err_msg=f"{tile.tile_id} {name}")
        for shard in shards.manifest.shards(split):
            for entry in shards.index(shard):
                assert entry["presence"] == presence_bits(shards.manifest, tiles[int(entry["row"])].values)
    for name in source.pixels:
        entry = next(e for e in shards.manifest.pixels if e.name == name)
        assert entry.bands == source.bands[name]


@pytest.fixture(scope="module")
def terramesh(tmp_path_factory):
    root = tmp_path_factory.mktemp("terramesh")
    tar_set = TarSet(root / "TerraMesh", root, size_px=48)
    tar_set.shard("train", "ssl4eos12_shard_000794", {layer: [f"s{i}" for i in range(4)] for layer in LAYERS})
    others = [layer for layer in LAYERS if layer != "S1GRD"]
    tar_set.shard("train", "majortom_shard_000001", {layer: [f"m{i}" for i in range(4)] for layer in (*others, "S1RTC")})
    tar_set.shard("val", "ssl4eos12_shard_000009", {layer: ["v0", "v1"] for layer in LAYERS})
    return tar_set.root


@pytest.fixture(scope="module")
def terramesh_shards(terramesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "set"
    with open_source(terramesh, "terramesh", {"tile_size_px": "24"}) as source:
        assert_has_the_interface(source)
        build_from(source, folder, max_samples_per_shard=10, progress=False)
        assert_shards_equal(source, folder)
    return folder


def test_terramesh_becomes_shards_that_a_model_trains_on(terramesh_shards):
    reader = ShardReader(terramesh_shards, "train")
    manifest = reader.manifest
    targets = [name for name in ALL_TARGETS if name in manifest.modalities]
    assert targets == ["sentinel2", "sentinel1", "lat", "lon", "month", "sentinel1_rtc", "dem", "ndvi", "lulc"]
    assert set(manifest.band_stats) == {"sentinel2_l2a", "sentinel2_rgb", *targets} - {"sentinel2", "lulc"}
    loader = CpuLoader(reader, targets, 24, seed=0)
    order = TrainOrder(ExactOrder(len(reader)), 8, seed=0)
    batch = next(b for _, b in itertools.islice(loader.training(order, plan_batches(8, None, 1), 0, 0), 1))
    assert batch.values["sentinel2"].shape == (8, 12, 24, 24)
    bands = {entry.name: entry.bands for entry in manifest.pixels}
    model = mpmae.create_model("mpmae_atto", img_size=24, modalities_out=targets, decoder_dim=16, bands_available=bands)
    out = model(batch)
    assert list(out.losses) == targets
    assert torch.isfinite(out.loss)
    out.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_command_line_takes_formats_and_options(terramesh, tmp_path, capsys):
    options = ["--option", "tile_size_px=24", "--option", "modalities=sentinel2,dem"]
    assert main(["build", str(terramesh), str(tmp_path / "set"), "--format", "terramesh", *options]) == 0
    assert "sentinel2" in json.loads((tmp_path / "set" / "manifest.json").read_text())["pixels"][0]["name"]
    assert main(["build", str(terramesh), str(tmp_path / "no"), "--format", "terramash"]) != 0
    assert f"known: {', '.join(FORMATS)}" in capsys.readouterr().err


def test_geotiffs_become_shards(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        image = rng.integers(0, 5000, (4, 40, 32)).astype(np.uint16)
        geotiff(tmp_path / "tiffs/sentinel2" / f"i{i}.tif", image, ["B2", "B3", "B4", "B8"], taken="2020:01:02 00:00:00")
        if i % 2:
            geotiff(tmp_path / "tiffs/dem" / f"i{i}.tif", rng.normal(0, 9, (1, 20, 16)).astype(np.float32), pixel_m=20)
    with open_source(tmp_path / "tiffs", "geotiff", {"tile_size_px": "16", "val_fraction": "0.2"}) as source:
        assert_has_the_interface(source)
        manifest = build_from(source, tmp_path / "set", codec="raw", progress=False)
        assert {split: manifest.num_samples(split) for split in manifest.splits} == {"train": 16, "val": 4}
        assert_shards_equal(source, tmp_path / "set")


def test_the_adapter_of_the_docs(repo, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "tiles").mkdir()
    for i in range(12):
        np.save(tmp_path / "tiles" / f"t{i:02d}.npy", rng.integers(0, 3000, (4, 16, 16)).astype(np.uint16))
    adapter = adapter_of_the_docs(repo)
    with adapter(tmp_path / "tiles") as source:
        assert_has_the_interface(source)
        build_from(source, tmp_path / "set", progress=False)
        assert_shards_equal(source, tmp_path / "set")
        (tmp_path / "tiles" / "t03.npy").write_bytes(b"")
        with pytest.raises(mpmae.errors.SourceError, match=r"tile t03 \(row 3\), sentinel2"):
            source.read_tile(3)
    np.save(tmp_path / "tiles" / "t03.npy", np.zeros((3, 16, 16)))
    with pytest.raises(mpmae.errors.SourceError, match=r"t03.npy: shape or dtype differs"):
        adapter(tmp_path / "tiles")


@pytest.mark.parametrize("name", FORMATS)
def test_the_docs_list_the_options_of_every_format(repo, tmp_path, name):
    with pytest.raises(mpmae.errors.SourceError, match="unknown option 'x'") as caught:
        open_source(tmp_path, name, {"x": "1", "tile_size_px": "1"} if name == "major_tom" else {"x": "1"})
    known = re.search(r"knows (.*)", str(caught.value))[1].replace("none", "").replace("bands_NAME", "bands_MODALITY")
    row = next(line for line in (repo / "docs/new_source.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert set(re.findall(r"`(\w+)`", row.split("|")[3])) == set(filter(None, known.split(", ")))
