"""Labelled HDF5 files and GeoTIFF tables, and the way to whichever lies there."""

import json
import logging
import threading

import h5py
import numpy as np
import pytest

from mpmae.errors import DatasetError
from mpmae.eval.config import DatasetSection
from mpmae.eval.dataset import IGNORED
from mpmae.eval.geotiff_table import GeoTiffTable
from mpmae.eval.labelled_h5 import LabelledH5
from mpmae.eval.open_set import open_set
from mpmae.eval.reading import same_size
from tests.eval.labelled_files import BANDS, CLASSES, SPLITS, images, write_h5, write_table, write_tif, write_tifs

THIRDS = np.arange(12) % 3
NAMES = [CLASSES[i] for i in THIRDS]
SPLIT_COLUMN = [split for split in SPLITS for _ in SPLITS[split]]


def test_an_h5_file(tmp_path):
    image = images()
    found = LabelledH5(write_h5(tmp_path / "mine.h5", image, THIRDS, product_level="l2a"), progress=False)
    task = found.task
    assert (task.name, task.kind, task.metric, task.product_level) == ("mine", "multiclass", "accuracy", "l2a")
    assert (task.class_names, task.band_names) == (tuple(CLASSES), tuple(BANDS))
    assert [band.wavelength_um for band in task.bands] == [0.49, 0.56, 0.665]
    assert len(found) == 12
    assert {split: indices.tolist() for split, indices in found.splits.items()} == SPLITS
    np.testing.assert_array_equal(found.image(7), image[7].astype(np.float32))
    assert (found.label(7), found.sample_id(7), found.location(7)) == (1, "7", None)
    train = image[:6].astype(np.float64)
    assert [band.mean for band in task.bands] == pytest.approx(train.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert [band.std for band in task.bands] == pytest.approx(train.std((0, 2, 3)).tolist(), rel=1e-12)


def test_no_data_of_an_h5_file(tmp_path):
    image = images()
    image[0, 1, :4] = 0
    found = LabelledH5(write_h5(tmp_path / "mine.h5", image, THIRDS, no_data=0), progress=False)
    assert np.isnan(found.image(0)[1, :4]).all()
    assert np.isfinite(found.image(0)[[0, 2]]).all()
    valid = np.where(image[:6, 1] == 0, np.nan, image[:6, 1].astype(np.float64))
    assert found.task.bands[1].mean == pytest.approx(np.nanmean(valid), rel=1e-12)
    assert found.task.bands[1].std == pytest.approx(np.nanstd(valid), rel=1e-12)


def test_several_labels_and_label_maps(tmp_path):
    several = np.eye(3, dtype=np.uint8)[THIRDS]
    several[:, 0] = 1
    found = LabelledH5(write_h5(tmp_path / "a.h5", images(), several), progress=False)
    assert (found.task.kind, found.label(4).dtype, found.label(4).tolist()) == ("multilabel", bool, [True, True, False])
    maps = np.tile(np.arange(64).reshape(8, 8) % 4 - 1, (12, 1, 1)).astype(np.int16)
    found = LabelledH5(write_h5(tmp_path / "b.h5", images(), maps), progress=False)
    assert (found.task.kind, found.task.metric, found.label(3).dtype) == ("segmentation", "miou", np.int64)
    np.testing.assert_array_equal(found.label(3), maps[3])
    assert found.label(3)[0, 0] == IGNORED


def test_bands_and_classes_may_stand_in_the_json(tmp_path):
    path = write_h5(tmp_path / "mine.h5", images(), THIRDS, beside=False, bands=None, classes=None)
    other = {"bands": ["B02", "b3", "B4"], "classes": CLASSES, "splits": {"train": [0, 1, 2], "valid": [3], "test": [4]}}
    (tmp_path / "about.json").write_text("[]")
    (tmp_path / "splits.json").write_text(json.dumps(other))
    found = LabelledH5(path, progress=False)
    assert (found.task.band_names, found.task.class_names) == (("B2", "B3", "B4"), tuple(CLASSES))
    assert found.splits["val"].tolist() == [3]


def test_the_shared_set(shared_dir):
    found = open_set(DatasetSection(path=shared_dir / "data" / "eurosat_ms", product_level="l1c"), progress=False)
    assert (found.task.name, found.task.product_level, len(found)) == ("eurosat_ms_270", "l1c", 270)
    assert {split: len(indices) for split, indices in found.splits.items()} == {"train": 182, "val": 34, "test": 54}
    assert (found.sample_id(0), found.label(0), found.location(0)) == (
        "AnnualCrop_50",
        0,
        pytest.approx((48.892776, 4.5730267), abs=1e-6),
    )
    cirrus = found.task.bands[found.task.band_names.index("B10")]
    assert 10 < cirrus.mean < 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": ["B2", "B3"]}, r"bands \['B2', 'B3'\]; expected 3 names"),
        ({"bands": None}, "bands None; expected 3 names"),
        ({"bands": ["B2", "B2", "B3"]}, "each once"),
        ({"product_level": "l3"}, "product_level = 'l3'; expected l1c"),
        ({"label": np.zeros(5)}, r"label of shape \[5\]"),
        ({"label": np.zeros((12, 2))}, r"label of shape \[12, 2\] .* 3 classes"),
        ({"label": np.zeros((12, 8, 7))}, r"label of shape \[12, 8, 7\]"),
        ({"image": np.zeros((12, 8, 8))}, r"image of shape \[12, 8, 8\]"),
        ({"splits": {"train": [12]}}, "split train names 12; the set has the samples 0..11"),
        ({"splits": {"train": [0, 1], "val": [1]}}, "split val has samples that are also in train"),
        ({"splits": {"train": [0], "dev": [1]}}, "a split 'dev'"),
        ({"splits": {"train": ["image-0", "image-1"]}}, "split train holds 'image-0', 'image-1'; expected indices"),
        ({"splits": {"train": [0.7, 1]}}, "split train holds 0.7; expected indices"),
        ({"splits": {"train": None}}, "split train is of type NoneType; expected a list"),
        ({"label": np.array([b"water"] * 12)}, r"label of type \|S5; expected whole numbers"),
        ({"label": np.zeros(12)}, "label of type float64; expected whole numbers"),
        ({"label": np.zeros(12, int), "classes": None}, "no label above 0 and no `classes`"),
        ({"scale": "x"}, "scale = 'x'; expected a number above 0"),
        ({"scale": 0.0}, "scale = 0.0; expected a number above 0"),
    ],
)
def test_h5_files_that_do_not_fit(tmp_path, change, message):
    arguments = {"image": images(), "label": THIRDS} | change
    with pytest.raises(DatasetError, match=message):
        LabelledH5(write_h5(tmp_path / "mine.h5", **arguments), progress=False)


def test_names_of_an_h5_file_are_unique(tmp_path):
    path = write_h5(tmp_path / "mine.h5", images(), THIRDS)
    with h5py.File(path, "r+") as file:
        file["name"] = np.array([b"a"] * 2 + [b"b"] * 10)
    with pytest.raises(DatasetError, match="2 different names of 12 samples"):
        LabelledH5(path, progress=False)


@pytest.mark.parametrize("kind", ["multiclass", "segmentation"])
def test_h5_labels_out_of_range(tmp_path, kind):
    label = THIRDS + 1 if kind == "multiclass" else np.full((12, 8, 8), 3)
    found = LabelledH5(write_h5(tmp_path / "mine.h5", images(), label), progress=False)
    with pytest.raises(DatasetError, match=r"label\[2\].* 3.*the classes 0\.\.2 of mine"):
        found.label(2)


def test_a_table_of_geotiffs(tmp_path):
    pytest.importorskip("rasterio")
    found = GeoTiffTable(write_tifs(tmp_path / "fields", NAMES, SPLIT_COLUMN), "l1c", progress=False)
    task = found.task
    assert (task.name, task.kind, task.product_level, task.class_names) == (
        "fields",
        "multiclass",
        "l1c",
        ("built", "trees", "water"),
    )
    assert task.band_names == tuple(BANDS)
    assert {split: indices.tolist() for split, indices in found.splits.items()} == SPLITS
    np.testing.assert_array_equal(found.image(5), images()[5].astype(np.float32))
    assert (found.sample_id(5), found.label(5)) == ("images/5.tif", 0)
    assert found.location(5) == pytest.approx((45.1532, 15.0005), abs=1e-3)


def test_no_data_and_colours_of_a_table(tmp_path):
    pytest.importorskip("rasterio")
    path = write_tifs(tmp_path, NAMES, bands=["Red", "Green", "elevation"], no_data=0, crs=None)
    image = images()[0]
    image[:, 0, 0] = 0
    write_tif(tmp_path / "images" / "0.tif", image, ["Red", "Green", "elevation"], no_data=0, crs=None)
    found = GeoTiffTable(path, progress=False)
    assert [band.wavelength_um for band in found.task.bands] == [0.665, 0.56, None]
    assert np.isnan(found.image(0)[:, 0, 0]).all()
    assert np.isfinite(found.image(0)[:, 1:]).all()
    assert found.location(0) is None
    assert found.splits == {}


def test_several_labels_of_a_table(tmp_path):
    pytest.importorskip("rasterio")
    found = GeoTiffTable(write_tifs(tmp_path, ["water;trees", "built", ""]), progress=False)
    assert (found.task.kind, found.task.class_names) == ("multilabel", ("built", "trees", "water"))
    assert [found.label(i).tolist() for i in range(3)] == [[False, True, True], [True, False, False], [False] * 3]


def test_label_maps_of_a_table(tmp_path):
    pytest.importorskip("rasterio")
    maps = (np.arange(64).reshape(1, 8, 8) % 3).astype(np.uint8)
    maps[0, 0, 0] = 255
    for i in range(3):
        write_tif(tmp_path / "maps" / f"{i}.tif", maps, no_data=255)
    path = write_tifs(tmp_path, [f"maps/{i}.tif" for i in range(3)], column="label_file")
    found = GeoTiffTable(path, progress=False)
    assert (found.task.kind, found.task.class_names) == ("segmentation", ("class 0", "class 1", "class 2"))
    assert found.label(1)[0, 0] == IGNORED
    np.testing.assert_array_equal(found.label(1)[1:], maps[0, 1:])
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DatasetError, match=r"maps/1.tif: the label map holds 2"):
        GeoTiffTable(path, progress=False).label(1)
    write_tif(tmp_path / "maps" / "2.tif", maps[:, :4])
    with pytest.raises(DatasetError, match=r"maps/2.tif of \[4, 8\] px for images/2.tif of \[8, 8\] px"):
        GeoTiffTable(path, progress=False).label(2)


def test_label_maps_of_floats_have_no_label_where_they_are_nan(tmp_path):
    pytest.importorskip("rasterio")
    maps = (np.arange(64).reshape(1, 8, 8) % 3).astype(np.float32)
    maps[0, 0, 0] = np.nan
    for i, no_data in enumerate((None, np.nan)):
        write_tif(tmp_path / "maps" / f"{i}.tif", maps, no_data=no_data)
    found = GeoTiffTable(write_tifs(tmp_path, ["maps/0.tif", "maps/1.tif"], column="label_file"), progress=False)
    assert found.task.num_classes == 3
    assert [found.label(i)[0, :3].tolist() for i in (0, 1)] == [[IGNORED, 1, 2]] * 2


def test_classes_of_a_table_by_index(tmp_path):
    pytest.importorskip("rasterio")
    path = write_tifs(tmp_path, ["1", "0", "2"])
    (tmp_path / "classes.txt").write_text("water\nforest\ntown\n")
    assert [int(GeoTiffTable(path, progress=False).label(i)) for i in range(3)] == [1, 0, 2]
    (tmp_path / "classes.txt").write_text("10\n20\n30\n")  # names that are numbers are no indices
    with pytest.raises(DatasetError, match=r"has the label '1'; expected 10, 20, 30"):
        GeoTiffTable(path, progress=False).label(0)
    (tmp_path / "classes.txt").write_text("water\nwater\n")
    with pytest.raises(DatasetError, match=r"2 names, 1 different"):
        GeoTiffTable(path, progress=False)


def test_bands_named_in_the_table(tmp_path):
    pytest.importorskip("rasterio")
    write_tif(tmp_path / "a.tif", images()[0])
    rows = [{"file": "a.tif", "label": "x", "bands": "B4; B8A; red"}]
    assert GeoTiffTable(write_table(tmp_path / "t.csv", rows), progress=False).task.band_names == ("B4", "B8A", "red")
    rows[0].pop("bands")
    with pytest.raises(DatasetError, match=r"a.tif: 3 bands without descriptions; name them in the column `bands`"):
        GeoTiffTable(write_table(tmp_path / "t.csv", rows), progress=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.tif", "label": "x"}], "expected rows with `file`"),
        ([{"file": "b.tif", "label": "x"}], "1 of its files are not there: b.tif"),
        ([{"file": "a.tif", "label": "x"}] * 2, "named twice or not at all: a.tif"),
        ([{"file": "a.tif", "label": ""}], "1 rows without a label"),
        ([{"file": "a.tif", "label": "x", "split": "dev"}], "the splits dev; expected train, val, test"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, rows, message):
    pytest.importorskip("rasterio")
    write_tif(tmp_path / "a.tif", images()[0], BANDS)
    with pytest.raises(DatasetError, match=message):
        GeoTiffTable(write_table(tmp_path / "t.csv", rows), progress=False)


def test_geotiffs_with_other_bands_or_torn(tmp_path):
    pytest.importorskip("rasterio")
    path = write_tifs(tmp_path, NAMES)
    write_tif(tmp_path / "images" / "3.tif", images()[3], ["B2", "B4", "B3"])
    with pytest.raises(DatasetError, match=r"images/3.tif: bands B2, B4, B3; images/0.tif has B2, B3, B4"):
        GeoTiffTable(path, progress=False)
    (tmp_path / "images" / "3.tif").write_bytes(b"II")
    with pytest.raises(DatasetError, match=r"3.tif: not a readable GeoTIFF"):
        GeoTiffTable(path, progress=False)


def test_open_set_tells_the_format(tmp_path, caplog):
    pytest.importorskip("rasterio")
    caplog.set_level(logging.INFO)
    h5 = write_h5(tmp_path / "h5" / "mine.h5", images(), THIRDS)
    table = write_tifs(tmp_path / "tifs", NAMES, SPLIT_COLUMN)
    assert type(open_set(DatasetSection(path=h5), progress=False)) is LabelledH5
    assert type(open_set(DatasetSection(path=h5.parent), progress=False)) is LabelledH5
    assert type(open_set(DatasetSection(path=table), progress=False)) is GeoTiffTable
    assert type(open_set(DatasetSection(path=table.parent), progress=False)) is GeoTiffTable
    assert "3 classes, 3 bands, product level not known, samples train 6, val 3, test 3" in caplog.text
    with pytest.raises(DatasetError, match="nothing at"):
        open_set(DatasetSection(path=tmp_path / "absent"))
    with pytest.raises(DatasetError, match=r"holds no labelled set \(dataset.format=auto\)"):
        open_set(DatasetSection(path=tmp_path))
    with pytest.raises(DatasetError, match=r"\(dataset.format=geobench\)"):
        open_set(DatasetSection(path=h5, format="geobench"))
    write_h5(h5.parent / "other.h5", images(), THIRDS)
    with pytest.raises(DatasetError, match=r"holds mine.h5, other.h5"):
        open_set(DatasetSection(path=h5.parent))


def test_sets_without_splits_need_folds(tmp_path):
    path = write_h5(tmp_path / "mine.h5", images(), THIRDS, splits={"train": [0, 1, 2]})
    with pytest.raises(DatasetError, match=r"no samples in val, test; .*dataset.num_folds=5"):
        open_set(DatasetSection(path=path), progress=False)
    assert len(open_set(DatasetSection(path=path, num_folds=3), progress=False)) == 12


def test_a_class_that_a_split_lacks(tmp_path, caplog):
    lacking = {"train": [0, 1, 2], "val": [3, 4], "test": [6, 7, 8]}
    path = write_h5(tmp_path / "mine.h5", images(), THIRDS, splits=lacking)
    open_set(DatasetSection(path=path), progress=False)
    assert "split val has no sample of built" in caplog.text
    write_h5(path, images(), THIRDS, splits={"train": [0, 1, 3], "val": [5], "test": [8]})
    with pytest.raises(DatasetError, match="split train has no sample of built; a classifier"):
        open_set(DatasetSection(path=path), progress=False)


def test_a_rare_label_may_lack_in_training(tmp_path, caplog):
    path = write_h5(tmp_path / "mine.h5", images(), np.eye(3)[np.r_[np.zeros(6, int), THIRDS[:6]]])
    open_set(DatasetSection(path=path), progress=False)
    assert "split train has no sample of trees, built" in caplog.text


def test_readers_serve_several_threads(tmp_path):
    image = images()
    found = LabelledH5(write_h5(tmp_path / "mine.h5", image, THIRDS), progress=False)
    wrong = []

    def read():
        wrong.extend(i for i in range(12) for _ in range(5) if not np.array_equal(found.image(i), image[i]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_bands_of_several_sizes():
    fine, coarse = np.arange(36.0).reshape(6, 6), np.arange(6.0).reshape(2, 3)
    image = same_size([fine, coarse])
    assert image.shape == (2, 6, 6)
    np.testing.assert_array_equal(image[0], fine)
    np.testing.assert_array_equal(image[1], coarse.repeat(3, 0).repeat(2, 1))
