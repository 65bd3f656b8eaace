"""The map of embeddings: projections, colours, files."""

import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from mpmae.embed import read_embeddings
from mpmae.embed.picture import MAX_CLASSES, draw_map
from mpmae.embed.projection import as_colours, principal_components, umap_positions
from mpmae.errors import ConfigError
from mpmae.report.embedding_map import UNKNOWN, load_map
from tests.embed.made import MadeTiles, run


def test_components_of_a_known_cloud():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    spread = rng.normal(size=(500, 4)) * [8, 4, 1, 0]
    positions, percent = principal_components((spread @ axes.T + 7).astype(np.float32), 3)
    np.testing.assert_allclose(percent, 100 * np.array([64, 16, 1]) / 81, atol=4)
    centred = spread - spread.mean(0)
    for i in range(3):
        assert abs(np.corrcoef(positions[:, i], centred[:, i])[0, 1]) > 0.98
    assert np.abs(np.corrcoef(positions.T) - np.eye(3)).max() < 1e-6


def test_the_sign_does_not_depend_on_the_order():
    vectors = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
    order = np.random.default_rng(2).permutation(40)
    np.testing.assert_allclose(
        principal_components(vectors, 3)[0][order], principal_components(vectors[order], 3)[0], atol=1e-5
    )


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 2), (4, 1)])
def test_few_vectors_or_features(shape):
    positions, percent = principal_components(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), 3)
    assert positions.shape == (shape[0], 3)
    assert np.isfinite(positions).all()
    assert np.isfinite(percent).all()
    assert len(as_colours(positions)) == shape[0]


def test_colours_follow_the_components():
    ramp = np.stack([np.linspace(-1, 1, 101), np.zeros(101), np.linspace(5, 0, 101)], axis=1)
    colours = as_colours(ramp)
    assert colours[0] == "#0066ff"
    assert colours[-1] == "#ff6600"


def test_the_map_says_what_the_folder_holds(tmp_path):
    source = MadeTiles()
    run(tmp_path, source)
    paths = draw_map(tmp_path, "pca")
    assert sorted(path.name for path in paths) == ["earth.svg", "map-cover.svg", "map-split.svg"]
    data = load_map(tmp_path)
    positions, percent = principal_components(read_embeddings(tmp_path)[1], 3)
    np.testing.assert_allclose(data.points, positions[:, :2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(data.explained_percent, percent, atol=0.01)
    assert [place is None for place in data.locations] == np.isnan(source.places[:, 0]).tolist()
    cover, split = data.groupings
    names = [cover.names[k] if k != UNKNOWN else None for k in cover.classes]
    assert names == [source.columns[0].class_names[k] if k != UNKNOWN else None for k in source.classes]
    assert cover.num_unknown == int((source.classes == UNKNOWN).sum())
    assert sum(cover.counts) + cover.num_unknown == 10
    assert (split.names, split.counts) == (("train", "val"), (7, 3))
    text = (tmp_path / "map-cover.svg").read_text()
    assert "&lt;ice&gt;" in text
    for path in paths:
        root = ElementTree.parse(path).getroot()
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 20


def test_drawing_again_gives_the_same_files_and_no_old_ones(tmp_path):
    run(tmp_path)
    draw_map(tmp_path, "pca")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "map-old.svg").write_text("<svg/>")
    draw_map(tmp_path, "pca")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(tmp_path).num_before == 10, "pictures do not make it another folder"


def test_many_classes_are_told_together(tmp_path):
    source = MadeTiles(60)
    column = source.columns[0]
    names = tuple(f"class {i}" for i in range(40))
    source.columns = (type(column)(column.name, column.title, names), source.columns[1])
    source.classes = np.concatenate([np.arange(40), np.arange(20)])
    run(tmp_path, source, tiles_per_part=64, batch_size=64)
    draw_map(tmp_path, "pca")
    cover = load_map(tmp_path).groupings[0]
    assert len(cover.names) == MAX_CLASSES
    assert cover.names[-1] == "25 other classes"
    assert cover.counts == (*[2] * 15, 30)


def test_no_places_no_earth_and_no_tiles_no_picture(tmp_path):
    source = MadeTiles()
    source.places[:] = np.nan
    run(tmp_path / "nowhere", source)
    assert "earth.svg" not in {path.name for path in draw_map(tmp_path / "nowhere", "pca")}
    run(tmp_path / "empty", MadeTiles(0))
    assert draw_map(tmp_path / "empty", "pca") == []
    assert load_map(tmp_path / "empty").num_tiles == 0


def test_a_small_region_is_drawn_closer(tmp_path):
    source = MadeTiles()
    source.places = np.random.default_rng(3).uniform((50, 8), (52, 12), (10, 2))
    run(tmp_path, source)
    draw_map(tmp_path, "pca")
    labels = re.findall(r">([\d.]+)°([NE])<", (tmp_path / "earth.svg").read_text())
    assert {letter for _, letter in labels} == {"N", "E"}
    assert all(45 < float(value) < 57 for value, letter in labels if letter == "N")


def test_umap_needs_its_package_and_some_vectors(monkeypatch):
    with pytest.raises(ConfigError, match="3 vectors are too few"):
        umap_positions(np.zeros((3, 5), np.float32))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpmae\[umap\]'"):
        umap_positions(np.zeros((5, 5), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("num", [4, 60])
def test_umap_is_repeatable_and_keeps_groups_together(num):
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(num, 8)) + 30 * (np.arange(num) % 2)[:, None]).astype(np.float32)
    positions = umap_positions(vectors)
    np.testing.assert_array_equal(positions, umap_positions(vectors))
    assert np.isfinite(positions).all()
    if num == 60:
        one, other = positions[::2], positions[1::2]
        assert np.linalg.norm(one.mean(0) - other.mean(0)) > 2 * max(one.std(0).max(), other.std(0).max())


def test_the_map_is_json_of_known_fields(tmp_path):
    run(tmp_path)
    draw_map(tmp_path, "pca")
    data = json.loads((tmp_path / "map.json").read_text())
    assert data["checkpoint"] == "small 0"
    assert data["step"] is None
