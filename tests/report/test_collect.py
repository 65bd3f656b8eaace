"""From a finished run to the page: arrays are put together rightly and every modality arrives."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from mpmae.config import validate
from mpmae.errors import CheckpointError, ReportError
from mpmae.loader import ShardReader
from mpmae.modalities import TARGETS
from mpmae.models.losses import normalise_patches
from mpmae.report import ReportData
from mpmae.report.cli import main
from mpmae.report.collect import collect
from mpmae.report.of_mpmae import unpatch
from mpmae.report.page import render_report
from mpmae.report.reconstruct import Reconstructor
from mpmae.report.tiles import tile_view
from mpmae.report.units import denormalise_patches
from mpmae.train.loop import build_model
from tests.report.test_embedding_map import make_map
from tests.train.launches import launch_ok


def to_patches(image: torch.Tensor, p: int) -> torch.Tensor:
    """[G*G, p*p*C] with channel (row*p + column)*C + c, written out pixel by pixel."""
    channels, side, _ = image.shape
    rows = []
    for top in range(0, side, p):
        for left in range(0, side, p):
            rows.append([image[c, top + r, left + k] for r in range(p) for k in range(p) for c in range(channels)])
    return torch.tensor(rows)


def test_unpatch_inverts_the_layout_of_predictions():
    image = torch.randn(3, 16, 16)
    prediction = to_patches(image, 8).T.unflatten(1, (2, 2))
    assert torch.equal(unpatch(prediction, 3, 8), image)


def test_denormalise_inverts_the_patch_normalisation():
    target, valid = 5 + 3 * torch.randn(3, 16, 16), torch.rand(3, 16, 16) > 0.2
    normalised = normalise_patches(to_patches(target, 8)[None], to_patches(valid.float(), 8)[None].bool())[0]
    image = unpatch(normalised.T.unflatten(1, (2, 2)), 3, 8)
    back = denormalise_patches(image, target, valid, 8)
    torch.testing.assert_close(back[valid], target[valid])


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ReportError, match=r"is not a run folder.*run.json"):
        collect(tmp_path)


@pytest.fixture(scope="module")
def run_dir(shards_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    launch_ok(
        "python",
        1,
        folder,
        f"data.shards={shards_dir}",
        "train.global_batch_size=4",
        "train.max_steps=1",
        "model.modalities_out={sentinel2: [B4, B3, B2, B8], sentinel1: null, aster: null, era5: null, dynamic_world: null,"
        " canopy_height_eth: null, lat: [cos], lon: null, biome: null, eco_region: null, month: null, esa_worldcover: null}",
    )
    return folder


def test_every_modality_arrives(run_dir):
    data = collect(run_dir, num_tiles=2)
    assert len(data.tiles) == 2
    for tile in data.tiles:
        assert set(tile.maps) | set(tile.vectors) == set(TARGETS)
        assert tile.visible.sum() == 19
        assert -90 <= tile.lat <= 90
    assert [line["step"] for line in data.history] == [1]
    page = render_report(data)
    assert data.tiles[0].tile_id in page
    assert data.embeddings is None


def test_embeddings_in_the_run_folder_are_shown(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / "embeddings").mkdir()
    assert "embeddings/ has no map yet" in render_report(collect(run, num_tiles=0))
    make_map(step=1).save(run / "embeddings")
    assert '<section id="embeddings">' in render_report(collect(run, num_tiles=0))


def test_targets_are_in_raw_units(run_dir, mmearth_dir):
    import h5py

    tile = collect(run_dir, num_tiles=1).tiles[0]
    with h5py.File(mmearth_dir / f"{mmearth_dir.name}.h5") as file:
        ids = [row["tile_id"].decode() for row in file["metadata"][:]]
        raw = file["sentinel2"][ids.index(tile.tile_id)][[3, 2, 1, 8], 4:60, 4:60].astype("f4")
    triple = tile.maps["sentinel2"]
    assert triple.bands == ("B4", "B3", "B2", "B8")
    torch.testing.assert_close(
        torch.from_numpy(triple.target)[triple.valid], torch.from_numpy(raw)[triple.valid], rtol=1e-4, atol=0.5
    )


@pytest.mark.parametrize("modalities_out", [{"sentinel2": ["B8", "B4"], "aster": None}, {"aster": None}])
def test_sentinel2_is_shown_though_true_colour_is_not_reconstructed(run_dir, modalities_out):
    tree = json.loads((run_dir / "run.json").read_text())["config"]
    tree["model"]["modalities_out"] = modalities_out
    config = validate(tree, "test")
    reader = ShardReader(config.data.shards, "val")
    tile = Reconstructor(build_model(config, reader.manifest).eval(), reader, config).tiles(1)[0]
    assert tile.problems() == []
    view = tile_view(tile)
    assert [row.title for row in view.inputs] == ["Sentinel-2, true colour", "Sentinel-2, false colour"]
    for row in view.inputs:
        assert [figure.title for figure in row.figures] == ["Seen by the encoder", "Target"]
        assert any("not among the reconstructed bands" in note for note in row.notes)
    whole = collect(run_dir, num_tiles=len(reader)).tiles
    other = next(t for t in whole if t.tile_id == tile.tile_id).maps["sentinel2"]
    triple = tile.maps["sentinel2"]
    for band in other.bands:
        assert np.array_equal(triple.target[triple.bands.index(band)], other.target[other.bands.index(band)])
    render_report(ReportData("t", tiles=[tile]))


def change_record(run_dir, tmp_path, change):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    record = change(json.loads((folder / "run.json").read_text()))
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_another_shard_set_is_refused(run_dir, tmp_path):
    folder = change_record(run_dir, tmp_path, lambda record: record | {"shards_fingerprint": "0123456789abcdef"})
    with pytest.raises(ReportError, match=r"is not the shard set of the run .*run.json says 0123456789ab;"):
        collect(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda record: [record], ["run.json holds a list, expected an object"]),
        (lambda record: {}, ["run.json: no `config`", "run.json: no `shards_fingerprint`"]),
        (
            lambda record: record | {"config": 3, "environment": []},
            ["`config` is not an obj", "`environment` is not an obj"],
        ),
        (lambda record: record | {"environment": {}}, ["`environment.packages` is not an object"]),
    ],
)
def test_a_record_that_is_none(change, expected, run_dir, tmp_path, capsys):
    folder = change_record(run_dir, tmp_path, change)
    assert main([str(folder)]) == 2
    told = capsys.readouterr().err
    assert all(text in told for text in expected), told


def test_an_output_that_cannot_be_written(run_dir, tmp_path, capsys):
    (tmp_path / "file").touch()
    for output, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "report.html", "Not a directory|File exists")):
        assert main([str(run_dir), "--tiles", "0", "--output", str(output)]) == 2
        assert re.search(rf"error: {output} cannot be written \(({reason})\)", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("count", ["-1", "two"])
def test_a_number_of_tiles_that_cannot_be(count, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--tiles", count])
    assert f"'{count}' is not a whole number from 0 on" in capsys.readouterr().err


def test_a_run_without_a_checkpoint(run_dir, tmp_path):
    (tmp_path / "run.json").write_text((run_dir / "run.json").read_text())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        collect(tmp_path)
