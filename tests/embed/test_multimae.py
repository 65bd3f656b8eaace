"""mpmae-embed with a MultiMAE: any subset of its input domains, whatever of them a tile has."""

import json

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mpmae
from mpmae.embed import open_source, read_embeddings
from mpmae.embed.cli import main
from mpmae.embed.opening import open_stored
from mpmae.embed.parquet import own_metadata
from mpmae.errors import ConfigError, ShardError
from mpmae.eval.config import EncoderSection, ImageSection
from mpmae.eval.encoders import open_encoder
from mpmae.loader import Augmentation, CpuLoader, ShardReader
from mpmae.models.interop import as_weights
from tests.embed.test_labelled_tiles import labelled
from tests.models.multimae.small import build

DOMAINS = ("rgb", "depth", "semseg", "sentinel1")


@pytest.fixture(scope="module")
def model():
    return build(torch.float32, img_size=64, domains_in=DOMAINS, domains_out=("rgb",)).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A small MultiMAE that says what it reads, but no statistics."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"domains_in": DOMAINS, "img_size": 64, "step": 7}))
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint, shards_dir, tmp_path_factory):
    """All tiles, all domains."""
    folder = tmp_path_factory.mktemp("out") / "embeddings"
    assert main([str(checkpoint), str(shards_dir), "--output", str(folder), "--batch-size", "7", "--map", "none"]) == 0
    return folder


def some(checkpoint, shards_dir, folder, *options) -> list[str]:
    return [str(checkpoint), str(shards_dir), "--output", str(folder), "--map", "none", "--max-samples", "12", *options]


def training_batch(shards_dir, ids):
    """The tiles of the training split with these names, as the model's training loads them."""
    reader = ShardReader(shards_dir, "train")
    modalities = ("sentinel2", "aster", "esa_worldcover", "sentinel1")
    loader = CpuLoader(reader, modalities, 64, seed=0, augmentation=Augmentation.none(), num_workers=1)
    by_id = {reader.scalars(i)["tile_id"].decode(): i for i in range(len(reader))}
    return loader.batch_of(np.array([by_id[tile_id] for tile_id in ids]))


def pooled(features):
    """The mean over tokens with data and the global one, tile by tile."""
    vectors = []
    for row, summary in enumerate(features.summary):
        tokens = [patches[row][features.available[name][row]] for name, patches in features.patches.items()]
        vectors.append(torch.cat([*tokens, summary[None]]).mean(0))
    return torch.stack(vectors)


@pytest.mark.parametrize(
    ("domains", "pooling"), [(None, "mean"), ("sentinel1,depth", "mean"), ("semseg", "mean"), ("depth,rgb", "global")]
)
def test_the_vectors_are_those_of_the_model_on_the_loaders_batch(
    domains, pooling, model, checkpoint, whole, shards_dir, tmp_path
):
    folder = whole
    if domains is not None:
        folder = tmp_path / "out"
        options = ("--split", "train", "--domains", domains, "--pooling", pooling)
        assert main(some(checkpoint, shards_dir, folder, *options)) == 0
    table, vectors = read_embeddings(folder)
    rows = [
        i
        for i, (split, fraction) in enumerate(
            zip(table["split"].to_pylist(), table["valid_fraction"].to_pylist(), strict=True)
        )
        if split == "train" and fraction > 0
    ]
    assert len(rows) > 5
    batch = training_batch(shards_dir, [table["id"][row].as_py() for row in rows])
    with torch.no_grad():
        features = model.encode(batch, None if domains is None else domains.split(","))
    if domains is None:
        assert not all(bool(flags.all()) for flags in features.available.values()), "some patches have no data"
        assert any(not bool(flags.any(1).all()) for flags in features.available.values()), "some tiles lack a modality"
    expected = features.summary if pooling == "global" else pooled(features)
    torch.testing.assert_close(torch.from_numpy(vectors[rows]), expected, rtol=2**-9, atol=1e-4)


def test_what_stands_beside_the_vectors(whole, checkpoint, shards_dir):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["is_complete"]
    assert manifest["encoder"]["domains"] == list(DOMAINS)
    assert manifest["encoder"]["pooling"].startswith("mean over the tokens of all patches with data")
    bands = manifest["prepared"]["bands"]
    assert bands[:6] == ["B4", "B3", "B2", "aster elevation", "esa_worldcover", "sentinel1 asc_VV"]
    assert set(manifest["prepared"]["statistics"]) == {"l1c", "l2a", "aster", "sentinel1"}
    table, _ = read_embeddings(whole)
    assert own_metadata(table)["encoder"] == manifest["encoder"]
    rows = [i for i, split in enumerate(table["split"].to_pylist()) if split == "train"]
    batch = training_batch(shards_dir, [table["id"][row].as_py() for row in rows])
    told = {name: (["B4", "B3", "B2"] if name == "sentinel2" else None) for name in batch.values}
    stored = ShardReader(shards_dir, "train").manifest.pixels
    for i, row in enumerate(rows):
        there = []
        for name in told:
            valid = batch.valid[name][i]
            if name == "sentinel2":
                valid = valid[[next(e for e in stored if e.name == name).bands.index(band) for band in told[name]]]
            valid = valid[:1] if name == "aster" else valid  # elevation alone
            there += [name] if valid.any() else []
        assert table["modalities"][row].as_py() == there


def test_the_same_again_goes_on_and_anything_else_is_refused(checkpoint, shards_dir, tmp_path, capsys):
    arguments = some(checkpoint, shards_dir, tmp_path / "out", "--split", "val", "--domains", "rgb,depth")
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "domains: rgb, depth" in said
    assert "pooling: mean over the tokens" in said
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().err
    (tmp_path / "out" / "part-00000.parquet").unlink()
    assert main(arguments) == 0
    assert "it was made again" in capsys.readouterr().err
    assert main([*arguments[:-1], "depth"]) == 2
    assert "; domains: rgb, depth), now it is" in capsys.readouterr().err.replace("\n", " ")
    assert main([*arguments, "--pooling", "global"]) == 2
    assert "; pooling: the global token)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--domains", "rgb,ired"), "--domains: {} does not read ired; its input domains are rgb, depth, semseg, sentinel1"),
        (("--domains", "rgb,rgb"), "--domains names a domain twice: rgb, rgb"),
        (("--bands", "B2,B3"), "--bands: {} is a MultiMAE, which reads domains; use --domains instead"),
        (("--normalise", "pretraining"), "the checkpoint has no statistics of aster; give --normalise dataset"),
        (("--size", "60"), "multiples of its patch size, 8 px"),
    ],
)
def test_mistakes_are_told(options, told, checkpoint, shards_dir, tmp_path, capsys):
    assert main(some(checkpoint, shards_dir, tmp_path / "out", *options)) == 2
    said = capsys.readouterr().err
    assert told.format(checkpoint) in said
    assert "encoder." not in said
    assert not (tmp_path / "out").exists()


def test_a_convnext_has_no_domains(shards_dir, tmp_path, capsys):
    save_file(mpmae.create_encoder("convnextv2_atto").state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"bands_in": mpmae.create_model("mpmae_atto").bands_in}))
    assert main(some(tmp_path, shards_dir, tmp_path / "out", "--domains", "rgb")) == 2
    assert "--domains: " in capsys.readouterr().err


def lacking(stored, *names):
    """The set without these modalities."""
    manifest = stored.manifest
    left = tuple(entry for entry in manifest.pixels if entry.name not in names)
    return type(stored)(stored.folder, manifest.model_copy(update={"pixels": left}))


def test_only_what_the_set_has_is_read(checkpoint, shards_dir):
    stored, weights = open_stored(shards_dir), as_weights(checkpoint)
    every = EncoderSection(checkpoint=checkpoint)
    assert stored.encoder(every, weights).facts["domains"] == list(DOMAINS)
    assert lacking(stored, "aster", "sentinel1").encoder(every, weights).facts["domains"] == ["rgb", "semseg"]
    some_bands = [e.model_copy(update={"bands": ("B2", "B3"), "shape": (2, 64, 64)}) for e in stored.manifest.pixels[:1]]
    only = type(stored)(stored.folder, stored.manifest.model_copy(update={"pixels": tuple(some_bands)}))
    with pytest.raises(
        ShardError, match=r"none of the input domains .* rgb \(sentinel2 B4 B3 B2\), depth .*it has sentinel2"
    ):
        only.encoder(every, weights)
    asked = EncoderSection(checkpoint=checkpoint, domains=("depth", "sentinel1"))
    without = lacking(stored, "aster", "sentinel1")
    with pytest.raises(ShardError, match="has no aster, sentinel1, which the encoder reads"):
        without.tiles(without.encoder(asked, weights).input, ImageSection())


def test_a_tile_without_any_data_says_so(checkpoint, shards_dir, tmp_path, capsys):
    arguments = [str(checkpoint), str(shards_dir), "--output", str(tmp_path), "--map", "none", "--domains", "sentinel1"]
    assert main(arguments) == 0
    table, vectors = read_embeddings(tmp_path)
    empty = np.array(table["valid_fraction"].to_pylist()) == 0
    assert empty.any()
    assert f"{empty.sum()} tiles have no data at all" in capsys.readouterr().err
    assert [not names for names in table["modalities"].to_pylist()] == empty.tolist()
    first = vectors[empty][0]
    np.testing.assert_allclose(vectors[empty], np.broadcast_to(first, vectors[empty].shape), atol=1e-3)


def test_statistics_of_the_checkpoint_win(checkpoint, shards_dir):
    section = EncoderSection(checkpoint=checkpoint, domains=("rgb", "sentinel1"))
    stored, weights = open_stored(shards_dir), as_weights(checkpoint)
    bands = next(entry.bands for entry in stored.manifest.pixels if entry.name == "sentinel1")
    num = len(bands)
    weights.config["statistics"] = {"sentinel1": {"bands": list(bands), "mean": [-20.0] * num, "std": [4.0] * num}}
    encoder_input = stored.encoder(section, weights).input
    source = stored.tiles(encoder_input, ImageSection(), max_samples=20)
    origins = {"l1c": "the shard set's", "l2a": "the shard set's", "sentinel1": "the checkpoint's"}
    assert source.facts["statistics"] == origins
    ours = source.read(np.arange(20)).images
    theirs = stored.tiles(encoder_input, ImageSection(normalise="dataset"), max_samples=20).read(np.arange(20)).images
    stats = stored.manifest.band_stats["sentinel1"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (stats.mean, stats.std))
    torch.testing.assert_close(ours[:, :, :3], theirs[:, :, :3], equal_nan=True)
    expected = (theirs[:, :, 3:] * std + mean + 20) / 4
    torch.testing.assert_close(ours[:, :, 3:], expected.float(), atol=1e-3, rtol=1e-3, equal_nan=True)
    with pytest.raises(ConfigError, match="no statistics of sentinel2; give --normalise dataset"):
        stored.tiles(encoder_input, ImageSection(normalise="pretraining"))


def test_at_another_size_class_ids_stay_ids_and_no_data_stays_none(checkpoint, shards_dir):
    encoder_input = open_encoder(EncoderSection(checkpoint=checkpoint)).input
    source = open_source(shards_dir, encoder_input, ImageSection(size=32), max_samples=20)
    images = source.read(np.arange(20)).images[:, 0]
    assert images.shape[2:] == (32, 32)
    (class_channel,) = encoder_input.class_channels
    ids = images[:, class_channel]
    assert torch.equal(ids[ids.isfinite()], ids[ids.isfinite()].round())
    assert ids.isfinite().any()
    assert images[:, 5:].isnan().any(), "a tile without Sentinel-1"


def test_a_labelled_set_says_what_is_read(checkpoint, tmp_path, capsys):
    path = labelled(tmp_path, splits={"train": [0, 2, 4], "val": [1], "test": [5]})
    with h5py.File(path, "a") as file:
        file.attrs["bands"] = ["B2", "B3", "B4"]
    arguments = [str(checkpoint), str(path), "--output", str(tmp_path / "out"), "--map", "none"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "not read, since the source lacks their bands: depth, semseg, sentinel1" in said
    table, vectors = read_embeddings(tmp_path / "out")
    assert own_metadata(table)["encoder"]["domains"] == ["rgb"]
    assert table["modalities"].to_pylist() == [["sentinel2"]] * 5
    assert table["valid_fraction"].to_pylist() == [0.5, 1, 1, 1, 1]
    encoder = open_encoder(EncoderSection(checkpoint=checkpoint, domains=("rgb",)))
    tiles = open_source(path, encoder.input).read(np.arange(5))
    with torch.no_grad():
        expected = torch.cat([encoder(image) for image in tiles.images])
    torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=2**-9, atol=1e-4)
