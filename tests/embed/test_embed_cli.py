"""The command as people use it."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mpmae
from mpmae.embed import read_embeddings
from mpmae.embed.cli import in_options, main
from mpmae.eval.config import EncoderSection
from mpmae.eval.encoders import open_encoder
from mpmae.loader import Augmentation, CpuLoader, ShardReader


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An exported atto encoder that says what it reads."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    save_file(mpmae.create_encoder("convnextv2_atto", patch_size=8).state_dict(), folder / "model.safetensors")
    bands = mpmae.create_model("mpmae_atto", img_size=56, patch_size=8).bands_in
    (folder / "config.json").write_text(json.dumps({"bands_in": bands, "step": 7}))
    return folder


@pytest.fixture(scope="module")
def done(checkpoint, shards_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "embeddings"
    assert main([str(checkpoint), str(shards_dir), "--output", str(folder), "--max-samples", "5", "--batch-size", "2"]) == 0
    return folder


def test_the_vectors_are_those_of_the_loaders_images(done, checkpoint, shards_dir):
    table, vectors = read_embeddings(done)
    encoder = open_encoder(EncoderSection(checkpoint=checkpoint))
    reader = ShardReader(shards_dir, "train")
    loader = CpuLoader(reader, ("sentinel2",), 64, seed=0, augmentation=Augmentation.none(), num_workers=1)
    rows = [i for i, split in enumerate(table.column("split").to_pylist()) if split == "train"]
    assert len(rows) > 2
    by_id = {reader.scalars(i)["tile_id"].decode(): i for i in range(len(reader))}
    bands = [i for i in range(13) if i != 10]  # without B10
    for row in rows:
        batch = loader.batch_of(torch.tensor([by_id[table.column("id")[row].as_py()]]).numpy())
        with torch.no_grad():
            expected = encoder(batch.values["sentinel2"][:, bands])[0]
        torch.testing.assert_close(torch.from_numpy(vectors[row]), expected, rtol=2**-9, atol=1e-4)


def test_the_manifest_says_which_checkpoint(done):
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["is_complete"]
    assert manifest["origin"]["step"] == 7
    assert manifest["prepared"]["bands"][:3] == ["B1", "B2", "B3"]
    assert {path.suffix for path in done.iterdir()} == {".json", ".parquet", ".svg", ""}


def test_once_more_says_that_it_is_complete(done, checkpoint, shards_dir, capsys):
    arguments = [str(checkpoint), str(shards_dir), "--output", str(done), "--max-samples", "5", "--map", "none"]
    assert main(arguments) == 0
    assert "is complete: 5 vectors, nothing to do" in capsys.readouterr().err
    assert main([*arguments, "--dtype", "int8"]) == 2
    assert 'its dtype is "float16", now it is "int8"' in capsys.readouterr().err
    assert main([*arguments[:4], "--max-samples", "4"]) == 2
    assert "its num_tiles is" in capsys.readouterr().err


def test_the_end_tells_the_rate(checkpoint, shards_dir, tmp_path, capsys):
    arguments = [str(checkpoint), str(shards_dir), "--output", str(tmp_path / "out"), "--split", "val", "--max-samples", "1"]
    assert main([*arguments, "--size", "32", "--dtype", "int8", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "1 tiles in" in said
    assert "tiles/s" in said
    assert "image: the whole tile of 64 px, scaled to 32 px" in said


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({1: "nowhere"}, "nothing at nowhere"),
        ({0: "nowhere"}, "no checkpoint nowhere"),
        ({4: "--device", 5: "cuda:99"}, "--device = cuda:99"),
        ({4: "--split", 5: "tset"}, "no split 'tset'"),
        ({4: "--size", 5: "60"}, "multiples of its patch size"),
    ],
)
def test_mistakes_are_told(checkpoint, shards_dir, tmp_path, capsys, changes, told):
    arguments = [str(checkpoint), str(shards_dir), "--output", str(tmp_path / "out"), "--dtype", "int8"]
    for place, text in changes.items():
        arguments[place] = text
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_bands(shards_dir, tmp_path, capsys):
    save_file(
        mpmae.create_encoder("convnextv2_atto", patch_size=8, bands_in=("B2", "B3")).state_dict(),
        tmp_path / "two.safetensors",
    )
    arguments = [str(tmp_path / "two.safetensors"), str(shards_dir), "--output", str(tmp_path / "out"), "--map", "none"]
    arguments += ["--max-samples", "1", "--size", "16"]
    assert main(arguments) == 2
    assert "such as --bands B2,B3,B4" in capsys.readouterr().err
    assert main([*arguments, "--bands", "B2,B3"]) == 0


def test_the_code_of_the_documentation_runs(done, repo):
    page = (repo / "docs" / "embeddings.md").read_text()
    block = page.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(block.replace("runs/NAME/embeddings", str(done)), names)
    assert len(names["table"]) == len(names["vectors"]) == 5


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("no file a.json; dataset.partition can be b", "no file a.json; --partition can be b"),
        ("the level is not known (dataset.product_level)", "the level is not known (--product-level)"),
        ("image.size = 20: a multiple of 8", "--size = 20: a multiple of 8"),
        ("dataset.path: x holds no labelled set (dataset.format=auto); expected", "x holds no labelled set; expected"),
    ],
)
def test_messages_name_options(told, expected):
    assert in_options(told) == expected


def test_what_is_said_of_a_labelled_set_names_options(checkpoint, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert main([str(checkpoint), str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "holds no labelled set; expected" in told
    assert "dataset." not in told
