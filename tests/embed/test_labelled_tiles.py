"""Images of a labelled set as tiles to embed."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpmae.embed import open_source
from mpmae.embed.source import UNKNOWN
from mpmae.errors import DatasetError
from mpmae.eval.config import DatasetSection, ImageSection
from mpmae.eval.encoder_input import EncoderInput

INPUT = EncoderInput(("B3", "B2"), 8)
NUM = 6


def labelled(folder: Path, kind: str = "multiclass", splits: dict | None = None, located: bool = True) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    path = folder / "set.h5"
    label = {
        "multiclass": np.arange(NUM) % 3,
        "multilabel": np.arange(NUM * 3).reshape(NUM, 3) % 2,
        "segmentation": np.repeat(np.array([0, 1, 2, -1, 1, 0]), 256).reshape(NUM, 16, 16),
    }[kind]
    with h5py.File(path, "w") as file:
        file["image"] = rng.integers(1, 1000, (NUM, 3, 16, 16)).astype(np.int16)
        file["image"][0, :, :8] = 0
        file["label"] = label
        if located:
            file["latlon"] = np.stack([np.arange(NUM) * 10.0, np.arange(NUM) * -20.0], axis=1)
        file.attrs.update({"bands": ["B2", "B3", "B8"], "classes": ["x", "y", "z"], "no_data": 0})
    if splits is not None:
        path.with_suffix(".json").write_text(json.dumps({"splits": splits}))
    return path


def test_images_labels_and_places(tmp_path):
    source = open_source(labelled(tmp_path, splits={"test": [5], "train": [0, 2, 4]}), INPUT)
    assert source.num_tiles == {"train": 3, "test": 1}
    tiles = source.read(np.arange(4))
    assert tiles.splits == ["train"] * 3 + ["test"]
    assert tiles.ids == ["0", "2", "4", "5"]
    assert tiles.classes["label"].tolist() == [0, 2, 1, 2]
    np.testing.assert_array_equal(tiles.locations, [[0, 0], [20, -40], [40, -80], [50, -100]])
    np.testing.assert_array_equal(tiles.valid_fraction, [0.5, 1, 1, 1])
    assert [tuple(image.shape) for image in tiles.images] == [(1, 2, 16, 16)] * 4
    with h5py.File(tmp_path / "set.h5") as file:
        stored = file["image"][()].astype(np.float64)
    used = np.where(stored == 0, np.nan, stored)[[0, 2, 4]][:, [1, 0]]
    mean, std = np.nanmean(used, (0, 2, 3)), np.nanstd(used, (0, 2, 3))
    expected = (used[1] - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(tiles.images[1][0], expected, atol=1e-4)
    assert source.facts["bands"] == ["B3", "B2"]
    assert source.facts["statistics"].startswith("the dataset's (")
    assert source.facts["image"] == "resize, 16 px"


def test_chosen_splits_and_samples(tmp_path):
    path = labelled(tmp_path, splits={"train": [0, 2, 4], "val": [1], "test": [5]})
    assert open_source(path, INPUT, splits=("test", "val")).num_tiles == {"val": 1, "test": 1}
    assert sum(open_source(path, INPUT, max_samples=2).num_tiles.values()) == 2
    with pytest.raises(DatasetError, match="no split tset; it has train, val, test"):
        open_source(path, INPUT, splits=("tset",))


def test_a_set_without_splits_and_places(tmp_path):
    source = open_source(labelled(tmp_path, located=False), INPUT)
    assert source.num_tiles == {"all": NUM}
    assert np.isnan(source.read(np.arange(NUM)).locations).all()


def test_several_labels_and_label_maps(tmp_path):
    several = open_source(labelled(tmp_path / "several", "multilabel"), INPUT)
    assert several.columns[0].several
    assert several.read(np.array([1])).classes["label"].tolist() == [[True, False, True]]
    maps = open_source(labelled(tmp_path / "maps", "segmentation"), INPUT)
    assert maps.read(np.arange(NUM)).classes["most_frequent_label"].tolist() == [0, 1, 2, UNKNOWN, 1, 0]


def test_windows_of_an_image(tmp_path):
    source = open_source(labelled(tmp_path), INPUT, ImageSection(size=8, fit="tile"))
    assert source.read(np.array([1])).images[0].shape == (4, 2, 8, 8)


def test_another_set_has_another_fingerprint(tmp_path):
    path = labelled(tmp_path, splits={"train": [0, 2, 4], "val": [1], "test": [5]})
    first = open_source(path, INPUT).fingerprint
    assert open_source(path, INPUT).fingerprint == first
    assert open_source(path, INPUT, dataset=DatasetSection(product_level="l2a")).fingerprint != first
    labelled(tmp_path, splits={"train": [0, 2, 4], "val": [5], "test": [1]})
    assert open_source(path, INPUT).fingerprint != first
    labelled(tmp_path, splits={"train": [0, 2, 4], "val": [1], "test": [5]})
    with h5py.File(path, "a") as file:
        file["image"][0, 0, 15, 15] += 1
    assert open_source(path, INPUT).fingerprint != first
