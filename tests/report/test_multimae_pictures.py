"""From a MultiMAE to its pictures: patches that are hidden in each domain by itself, units, classes, single inputs."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from mpmae.config import load_config
from mpmae.domains import title_of
from mpmae.loader import ShardReader
from mpmae.modalities import class_lookup, spec_of
from mpmae.models.losses import normalise_patches
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.views import map_of, patches_of, view_of
from mpmae.report import ReportData, numbers, pictures
from mpmae.report.cli import main
from mpmae.report.collect import collect
from mpmae.report.page import render_report
from mpmae.report.reconstruct import Reconstructor
from mpmae.report.tiles import tile_view
from mpmae.train.setup import build_model
from tests.report.test_report_pictures import decode, figures_of
from tests.train.launches import launch_ok

SMALL = ("model.name=multimae_tiny", "model.decoder_dim=32", "model.decoder_depth=1", "data.num_workers=1")
NO_DATA_LOGIT = 99.0


def reconstructor(shards_dir, *settings, split="val", change=None) -> Reconstructor:
    """The pictures of a new model; `change` is made to the model."""
    config = load_config(None, [f"data.shards={shards_dir}", *SMALL, *settings])
    reader = ShardReader(shards_dir, split)
    model = build_model(config, reader.manifest).eval()
    if change:
        change(model)
    return Reconstructor(model, reader, config)


def omniscient(model: MultiMAE) -> None:
    """Make the model predict its targets, in its own units, and the class for no data everywhere with the largest logit."""
    forward = model.forward

    def predict(batch, tokens, return_predictions):
        predictions = {}
        for name, domain in model.targets.items():
            bands = getattr(model, f"select_{domain.name}")
            values, valid = view_of(domain, batch, bands, torch.float32)
            if domain.loss == "classes":
                logits = torch.nn.functional.one_hot(values, domain.num_classes).permute(0, 3, 1, 2).float()
                logits[:, -1] = NO_DATA_LOGIT
                values = logits
            elif name == "norm_rgb":
                side, channels = model.num_patches_side, values.shape[1]
                patches = normalise_patches(patches_of(values, side), patches_of(valid, side))
                values = map_of(patches, channels, side)
            predictions[name] = values
        return forward(batch, tokens)._replace(predictions=predictions)

    model.forward = predict


@pytest.fixture(scope="module")
def unevenly_seen(shards_dir):
    """Tiles of which some domain is not seen at all."""
    return reconstructor(shards_dir, "model.alphas=0.05").tiles(3)


@pytest.fixture(scope="module")
def known(shards_dir):
    """Tiles of a model that predicts its targets, with maps of domains that are named like a modality."""
    inputs = "[rgb,depth,semseg,ired,sired,ebands,sentinel1,dynamic_world]"
    return reconstructor(shards_dir, f"model.domains_in={inputs}", f"model.domains_out={inputs}", change=omniscient).tiles(6)


def test_each_domain_shows_its_own_visible_patches(unevenly_seen):
    unseen = set()
    for tile in unevenly_seen:
        assert tile.problems() == []
        assert sum(tile.visible_of(name).sum() for name in tile.inputs) == 49
        view = tile_view(tile)
        assert [row.title for row in view.inputs[:2]] == [title_of("rgb"), title_of("norm_rgb")]
        assert view.others == []
        for name in (*tile.inputs, "norm_rgb"):
            visible = tile.visible_of(name)
            row = next(row for row in view.inputs if row.title == title_of(name))
            shown = figures_of(row)
            assert list(shown) == ["Seen by the encoder", "Prediction", "Filled in", "Target"]
            side = len(shown["Target"])
            large = np.kron(visible, np.ones((side // 7, side // 7), bool))
            assert np.array_equal(shown["Seen by the encoder"][~large], pictures.hatch(side)[~large])
            assert np.array_equal(shown["Seen by the encoder"][large], shown["Target"][large])
            assert np.array_equal(shown["Prediction"][large], pictures.dots(side)[large])
            if name != "depth":  # whose light depends on the neighbouring patches
                assert np.array_equal(shown["Filled in"][large], shown["Target"][large])
            if not visible.any():
                unseen.add(name)
                assert np.array_equal(shown["Seen by the encoder"], pictures.hatch(side))
    assert unseen, "no domain was left out: the case of one that is all hatched is not tried"
    each = ", ".join(f"{name} {tile.visible_of(name).sum()}" for name in tile.inputs)
    assert f"49 of 294 patches visible: {each}" in view.facts


def test_targets_and_predictions_are_in_raw_units(known, mmearth_dir):
    with h5py.File(mmearth_dir / f"{mmearth_dir.name}.h5") as file:
        ids = [row["tile_id"].decode() for row in file["metadata"][:]]
        for tile in known:
            raw = file["aster"][ids.index(tile.tile_id), 0, 4:60, 4:60]
            depth = tile.maps["depth"]
            valid = depth.valid[0]
            assert valid.any()
            for part in (depth.target, depth.prediction):
                np.testing.assert_allclose(part[0][valid], raw[valid], rtol=0, atol=1e-3)
            assert "mean and spread" in depth.note
            bands = file["sentinel2"][ids.index(tile.tile_id)][[3, 2, 1], 4:60, 4:60]
            for name in ("rgb", "norm_rgb"):
                triple = tile.maps[name]
                for part in (triple.target, triple.prediction):
                    np.testing.assert_allclose(part[triple.valid], bands[triple.valid], rtol=1e-4, atol=0.5)


@pytest.mark.parametrize(("name", "modality"), [("semseg", "esa_worldcover"), ("dynamic_world", "dynamic_world")])
def test_class_maps_are_those_of_the_file(known, mmearth_dir, name, modality):
    table = class_lookup(spec_of(modality))
    with h5py.File(mmearth_dir / f"{mmearth_dir.name}.h5") as file:
        ids = [row["tile_id"].decode() for row in file["metadata"][:]]
        for tile in known:
            triple = tile.maps[name]
            codes = file[modality][ids.index(tile.tile_id), 0, 4:60, 4:60][2::4, 2::4]
            assert np.array_equal(triple.target, table[codes])
            assert triple.prediction.max() < spec_of(modality).num_classes, "the class for no data is no prediction"
            assert np.array_equal(triple.prediction[triple.valid], triple.target[triple.valid])
    row = next(row for row in tile_view(tile).inputs if row.title == title_of(name))
    assert row.error.startswith("100 % of pixels right")
    assert row.detail == "One pixel of the map is 4 x 4 of the image."
    painted = figures_of(row)["Target"][8::16, 8::16]
    assert np.array_equal(painted, pictures.class_map(triple.target, spec_of(modality)))


def test_an_absent_modality_is_named_and_neither_seen_nor_drawn(known):
    lacking = [tile for tile in known if not tile.maps["sentinel1"].valid.any()]
    assert lacking
    assert len(lacking) < len(known)
    for tile in lacking:
        view = tile_view(tile)
        assert "Sentinel-1" in view.absent
        assert not tile.visible_of("sentinel1").any()
        assert not [row for row in view.inputs if row.title.startswith("Sentinel-1")]
        assert "sentinel1 0" in view.facts
    for tile in known:
        if tile.from_inputs:
            titles = [one.title for one in tile.from_inputs]
            assert ("sentinel1 alone" in titles) == (tile not in lacking)


def test_what_is_only_read_and_what_is_only_written(shards_dir):
    tile = reconstructor(
        shards_dir, "model.domains_in=[rgb,depth]", "model.domains_out=[ired,canopy_height_eth,esa_worldcover]"
    ).tiles(1)[0]
    assert tile.problems() == []
    assert tile.inputs == ("rgb", "depth")
    view = tile_view(tile)
    assert [row.title for row in view.inputs] == [title_of("rgb"), title_of("depth")]
    for row in view.inputs:
        assert list(figures_of(row)) == ["Seen by the encoder", "Target"]
        assert row.notes == ["An input alone: the model does not reconstruct it."]
        assert row.error == ""
    assert [row.title for row in view.others] == [title_of("ired"), "Canopy height", "ESA WorldCover"]
    for row in view.others:
        assert list(figures_of(row)) == ["Prediction", "Target"], "nothing is visible, so nothing is to be filled in"
        assert not np.any(np.all(figures_of(row)["Prediction"] == pictures.UNSCORED[1], axis=-1))
    assert view.strip.columns == ["ired", "canopy_height_eth", "esa_worldcover"]
    assert [row.title for row in view.strip.rows] == ["Target", "rgb alone", "depth alone"]
    render_report(ReportData("t", tiles=[tile]))


def test_single_inputs_give_maps_that_nothing_else_changes(shards_dir):
    def with_other_depth(model: MultiMAE) -> None:
        forward = model.forward

        def change(batch, *arguments, **options):
            values = batch.values | {"aster": batch.values["aster"].flip(2)}
            return forward(replace(batch, values=values), *arguments, **options)

        model.forward = change

    plain, changed = (reconstructor(shards_dir, change=each).tiles(3) for each in (None, with_other_depth))
    assert [len(tile.from_inputs) for tile in plain] == [4, 4, 0]
    for tile, other in zip(plain[:2], changed[:2], strict=True):
        found = {one.title: one for one in tile.from_inputs}
        assert {title: one.inputs for title, one in found.items()} == {
            "rgb alone": ("rgb",),
            "All of Sentinel-2": ("rgb", "ired", "sired", "ebands"),
            "depth alone": ("depth",),
            "semseg alone": ("semseg",),
        }
        assert set(found["rgb alone"].predictions) == {"depth", "semseg", "ired", "sired", "ebands"}
        assert set(found["All of Sentinel-2"].predictions) == {"depth", "semseg"}
        others = {one.title: one.predictions for one in other.from_inputs}
        for title, one in found.items():
            same = all(np.array_equal(values, others[title][name]) for name, values in one.predictions.items())
            assert same == (title != "depth alone")
        assert not np.array_equal(tile.maps["rgb"].prediction, other.maps["rgb"].prediction)
    strip = tile_view(plain[0]).strip
    assert strip.columns == ["rgb", "depth", "ired", "sired", "ebands", "semseg"]
    for row in strip.rows[1:]:
        names = {one.title: one.inputs for one in plain[0].from_inputs}[row.title]
        for name, figure in zip(strip.columns, row.figures, strict=True):
            picture = decode(figure.uri)
            assert picture.shape == (112, 112, 3)
            assert np.array_equal(picture, pictures.dots(112)) == (name in names) == (figure.title == "")


def test_the_report_of_a_run(shards_dir, tmp_path, capsys):
    settings = (f"data.shards={shards_dir}", *SMALL, "model.loss_weighting=uncertainty")
    launch_ok(
        "python", 1, tmp_path / "run", *settings, "train.global_batch_size=4", "train.max_steps=1", "train.val_samples=2"
    )
    data = collect(tmp_path / "run", num_tiles=1)
    names = ["rgb", "norm_rgb", "depth", "semseg", "ired", "sired", "ebands"]
    assert [row.name for row in numbers.comparisons(data)] == names
    assert data.run.model["visible tokens"] == "49 of 294"
    page = render_report(data)
    for text in (
        "Inputs: rgb, depth, semseg, ired, sired, ebands; outputs: rgb, depth, semseg, ired, sired, ebands, norm_rgb;",
        "Loss of each target",
        "Log variance of each target",
        "From one input alone",
        data.tiles[0].tile_id,
    ):
        assert text in page
    assert page.count(f"<b>{title_of('norm_rgb')}</b>") == 2, "a chart of its loss and one of its log variance"
    assert main([str(tmp_path / "run"), "--tiles", "0"]) == 0
    assert "report.html" in capsys.readouterr().out
