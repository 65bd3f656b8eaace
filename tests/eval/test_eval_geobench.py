"""GEO-Bench tasks: the genuine file against figures written by hand, and all twelve in the published layout."""

import datetime
import json
import logging
import shutil

import numpy as np
import pytest

from mpmae.errors import DatasetError
from mpmae.eval.bands import match_bands
from mpmae.eval.config import DatasetSection
from mpmae.eval.geobench import GeoBenchSet
from mpmae.eval.geobench_tasks import CLASSIFICATION, SEGMENTATION, TASKS
from mpmae.eval.open_set import open_set
from mpmae.modalities import spec_of
from tests.eval.geobench_files import CLOUD, LANDSAT, NEON, RGB, S2_12, S2_13, SO2SAT, TWELVE, UTM, label_of, write_task

ENCODER_BANDS = spec_of("sentinel2").model_bands
DAY = datetime.date(2019, 11, 5)
EUROSAT_STATS = {name: {"mean": 1000.0, "std": 300.0, "max": 9000.0} for _, name, _ in S2_13}
EUROSAT_STATS["09 - Water vapour"] = {"mean": 12.3, "std": 5.1, "max": 90.0}
KILN_STATS = {name: {"mean": 1000.0, "std": 300.0, "max": 9000.0} for _, name, _ in S2_13}
KILN_STATS |= {name: {"mean": 80.0, "std": 30.0, "max": 255.0} for _, name, _ in S2_13[-3:]}
STATS = {"m-eurosat": EUROSAT_STATS, "m-brick-kiln": KILN_STATS}


@pytest.fixture
def genuine(shared_dir, tmp_path):
    """The genuine file of m-eurosat with a partition of what is there."""
    folder = tmp_path / "m-eurosat"
    shutil.copytree(shared_dir / "data" / "geobench" / CLASSIFICATION / "m-eurosat", folder)
    folder.chmod(0o755)
    (folder / "default_partition.json").write_text(json.dumps({"train": ["id_1905"], "valid": [], "test": []}))
    return folder


def test_the_genuine_file(genuine):
    found = GeoBenchSet(genuine)
    task = found.task
    assert (task.name, task.kind, task.metric, task.product_level, task.scale) == (
        "m-eurosat",
        "multiclass",
        "accuracy",
        "l1c",
        1.0,
    )
    assert (task.num_classes, task.class_names[1], task.class_names[9]) == (10, "Residential Buildings", "Forest")
    assert task.band_names == ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B11", "B12", "B8A")
    by_name = {band.name: band for band in task.bands}
    assert (by_name["B10"].mean, by_name["B10"].std) == (12.334183, 5.0792565127694616)
    assert (by_name["B8A"].mean, by_name["B8A"].wavelength_um) == (2699.777603, 0.865)
    assert (by_name["B4"].mean, by_name["B4"].std) == (959.177867, 590.9418161327985)
    assert len(found) == 1
    assert found.splits["train"].tolist() == [0]
    assert set(found.splits) == {"train"}
    assert found.sample_id(0) == "id_1905"
    assert found.label(0) == 1
    assert found.label(0).dtype == np.int64
    image = found.image(0)
    assert image.shape == (13, 64, 64)
    assert image.dtype == np.float32
    assert image[:, 0, 0].tolist() == [1214, 859, 632, 367, 576, 1635, 2112, 2253, 745, 8, 822, 301, 2349]
    assert image[3, 63, 63] == 344
    assert image[3].sum(dtype=np.float64) == 1_518_837
    # UTM 35N: x = 624602.23 + 32 * 10.0057 = 624922.4, y = 4877286.03 - 32 * 9.9941 = 4876966.2
    assert found.location(0) == pytest.approx((44.03522, 28.55905), abs=2e-5)


def test_the_genuine_names_as_published(genuine, caplog):
    caplog.set_level(logging.INFO)
    found = GeoBenchSet(genuine, band_names="published")
    assert found.task.band_names == ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
    assert found.task.product_level is None
    assert "known to be wrong" in caplog.text
    np.testing.assert_array_equal(found.image(0), GeoBenchSet(genuine).image(0))


def test_the_genuine_partition_names_absent_samples(genuine):
    with pytest.raises(DatasetError, match=r"names 2,019 samples of 2,020 that are not in the folder: id_"):
        GeoBenchSet(genuine, "0.01x_train")


def build(tmp_path, name, side=8, per_split=None, **options):
    """A small copy of a published task, and its images by sample."""
    bands, label, num_classes = TWELVE[name]
    num = per_split or num_classes
    names = {split: [f"{split}_{i}" for i in range(num)] for split in ("train", "valid", "test")}
    rng, samples = np.random.default_rng(0), {}
    for i, sample in enumerate(s for split in names.values() for s in split):
        image = {}
        for kind, band, _ in bands:
            values = rng.integers(1, 4000, (side, side)).astype(np.int16)
            if name == "m-so2sat":
                values = (values / 10_000).astype(np.float32)
            if name == "m-NeonTree" and kind in ("ElevationBand", "HyperSpectralBands"):
                values = values[: side // 2, : side // 2, None].repeat(3 if kind == "HyperSpectralBands" else 1, 2)
            image[band] = values
        samples[sample] = (image, label_of(label, num_classes, i % num, side))
    options.setdefault("stats", STATS.get(name))
    folder = tmp_path / (SEGMENTATION if label == "SegmentationClasses" else CLASSIFICATION) / name
    write_task(folder, bands, samples, names, label, num_classes, **options)
    return folder, samples


@pytest.mark.parametrize("name", sorted(TWELVE))
def test_the_twelve_tasks(tmp_path, name):
    dated = name in ("m-cashew-plant", "m-forestnet", "m-nz-cattle")
    folder, samples = build(
        tmp_path, name, per_split=3, date=DAY if dated else None, transform=(1, 0, 5, 0, -1, 50), crs="EPSG:4326"
    )
    found = GeoBenchSet(folder)
    known, (bands, _, num_classes) = TASKS[name], TWELVE[name]
    task = found.task
    assert (task.name, task.kind, task.metric, task.num_classes) == (name, known.kind, known.metric, num_classes)
    assert len(task.class_names) == num_classes
    assert {split: len(indices) for split, indices in found.splits.items()} == {"train": 3, "val": 3, "test": 3}
    assert len(set(task.band_names)) == len(task.bands)
    index = 4
    sample = found.sample_id(index)
    assert sample == "valid_1"
    image, label = found.image(index), found.label(index)
    stored, expected = samples[sample]
    assert image.shape == (len(task.bands), 8, 8)
    np.testing.assert_array_equal(image[0], np.asarray(stored[bands[0][1]], np.float32))
    np.testing.assert_array_equal(label, expected)
    assert label.dtype == (bool if task.kind == "multilabel" else np.int64)
    assert (found.location(index) == (46.0, 9.0)) == known.is_located
    assert (found.location(index) is None) == (not known.is_located)


def test_the_table_of_tasks():
    assert sorted(TASKS) == sorted(TWELVE)
    levels = {name: task.product_level for name, task in TASKS.items() if task.product_level}
    assert levels == {
        "m-bigearthnet": "l2a",
        "m-brick-kiln": "l2a",
        "m-cashew-plant": "l2a",
        "m-eurosat": "l1c",
        "m-so2sat": "l1c",
    }
    assert {task.metric for task in TASKS.values()} == {"accuracy", "f1_micro", "miou"}


def test_true_bands_of_brick_kiln(tmp_path):
    folder, _ = build(tmp_path, "m-brick-kiln", per_split=2)
    found = GeoBenchSet(folder)
    assert found.task.band_names == (
        *("B1", "B2", "B3", "B4", "B5", "B7", "B8A", "B8", "B11", "B12", "TCI_R", "TCI_G", "TCI_B"),
    )
    assert [band.wavelength_um for band in found.task.bands[-3:]] == [None] * 3
    assert GeoBenchSet(folder, band_names="published").task.band_names[5] == "B6"
    rows = {row.wanted: row.stored for row in match_bands(found.task, ENCODER_BANDS).rows if row.is_filled}
    assert rows == {"B6": "B5", "B9": "B8A"}


@pytest.mark.parametrize("name", ["m-eurosat", "m-brick-kiln"])
def test_a_release_with_right_names_is_left_alone(tmp_path, name, caplog):
    right = {band: {"mean": 1000.0, "std": 300.0, "max": 9000.0} for _, band, _ in S2_13}
    folder, _ = build(tmp_path, name, per_split=2, stats=right)
    assert GeoBenchSet(folder).task.band_names[8] == "B8A"
    assert "statistics fit its band names" in caplog.text


@pytest.mark.parametrize(("factor", "divided"), [(1.0, False), (10_000.0, True)])
def test_statistics_of_so2sat_are_in_the_unit_of_its_values(tmp_path, factor, divided, caplog):
    caplog.set_level(logging.INFO)
    stats = {name: {"mean": 0.0615, "std": 5.4568, "max": 9.0} for _, name, _ in SO2SAT[:8]}
    stats |= {name: {"mean": 0.12 * factor, "std": 0.05 * factor, "max": 2.8 * factor} for _, name, _ in SO2SAT[8:]}
    folder, _ = build(tmp_path, "m-so2sat", per_split=2, stats=stats)
    task = GeoBenchSet(folder).task
    assert task.scale == 10_000
    assert [(round(band.mean, 9), round(band.std, 9)) for band in task.bands[8:]] == [(0.12, 0.05)] * 10
    assert (task.bands[4].mean, task.bands[4].std, task.bands[4].wavelength_um) == (0.0615, 5.4568, None)
    assert ("divided by 10000" in caplog.text) == divided


# What MMEarth-train reads for its 12 bands, by its `BAND_NAMES_v1_full.json`.
FULL = {f"B{i}": f"B{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)} | {"B8A": "B8A"}
REFERENCE_ROWS = {
    "m-eurosat": FULL,
    "m-so2sat": FULL | {"B1": "B2", "B9": "B8A"},
    "m-bigearthnet": FULL,
    "m-cashew-plant": FULL,
    "m-SA-crop-type": FULL,
}


@pytest.mark.parametrize("name", sorted(REFERENCE_ROWS))
def test_bands_are_matched_as_the_reference_does(tmp_path, name):
    folder, _ = build(tmp_path, name, per_split=1)
    match = match_bands(GeoBenchSet(folder, band_names="published").task, ENCODER_BANDS)
    assert {row.wanted: row.stored for row in match.rows} == REFERENCE_ROWS[name]


def test_the_reference_reads_three_bands_of_brick_kiln(tmp_path):
    folder, samples = build(tmp_path, "m-brick-kiln", per_split=1)
    found = GeoBenchSet(folder)
    match = match_bands(found.task, ["B4", "B3", "B2"])
    stored = samples["train_0"][0]
    expected = [stored[name] for name in ("04 - Red", "03 - Green", "02 - Blue")]
    np.testing.assert_array_equal(found.image(0)[match.positions], np.stack(expected))


def test_landsat_keeps_names_and_wavelengths(tmp_path):
    folder, _ = build(tmp_path, "m-forestnet", per_split=1, date=DAY)
    task = GeoBenchSet(folder).task
    assert [(band.name, band.wavelength_um) for band in task.bands] == [(name, um) for _, name, um in LANDSAT]
    rows = {row.wanted: row.stored for row in match_bands(task, ["B4", "B8", "B8A", "B12"]).rows}
    assert rows == {"B4": "04 - Red", "B8": "05 - NIR", "B8A": "05 - NIR", "B12": "07 - SWIR2"}


def test_coarser_bands_are_brought_to_the_largest(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, samples = build(tmp_path, "m-NeonTree", per_split=1)
    found = GeoBenchSet(folder)
    assert found.task.band_names == ("Red", "Green", "Blue", "Canopy Height Model")
    coarse = samples["train_0"][0]["Canopy Height Model"][..., 0]
    np.testing.assert_array_equal(found.image(0)[3], coarse.repeat(2, 0).repeat(2, 1))
    found.image(1)
    assert caplog.text.count("by repeating pixels: Red 8x8, Green 8x8, Blue 8x8, Canopy Height Model 4x4") == 1
    assert len(NEON) == 5


def test_older_spellings_are_read(tmp_path):
    folder, _ = build(tmp_path, "m-pv4ger", per_split=1, root="ccb.io")
    assert GeoBenchSet(folder).task.band_names == ("Red", "Green", "Blue")


def test_a_reference_system_as_text_and_as_wkt(tmp_path):
    plain, _ = build(tmp_path / "a", "m-pv4ger", per_split=1, transform=(1e-4, 0, 7.0, 0, -1e-4, 51.0), crs="EPSG:4326")
    assert GeoBenchSet(plain).location(0) == pytest.approx((50.9996, 7.0004))
    utm, _ = build(tmp_path / "b", "m-pv4ger", per_split=1, transform=(10, 0, 499_960, 0, -10, 40), crs=UTM)
    assert GeoBenchSet(utm).location(0) == pytest.approx((0.0, 27.0), abs=1e-9)
    absurd, _ = build(tmp_path / "c", "m-pv4ger", per_split=1, transform=(1, 0, 7.0, 0, -1, 500.0), crs="EPSG:4326")
    assert GeoBenchSet(absurd).location(0) is None
    nowhere, _ = build(tmp_path / "d", "m-pv4ger", per_split=1)
    assert GeoBenchSet(nowhere).location(0) is None


def test_several_dates_are_refused(tmp_path):
    folder, _ = build(tmp_path, "m-cashew-plant", per_split=1, date=[DAY, datetime.date(2019, 11, 10)])
    with pytest.raises(DatasetError, match=r"band 01 - Coastal aerosol at 2 dates .*2019-11-05"):
        GeoBenchSet(folder).image(0)


def one_sample(tmp_path, image, label, kind="Classification", num_classes=2, bands=RGB, **options):
    return GeoBenchSet(
        write_task(tmp_path / "m-mine", bands, {"a": (image, label)}, {"train": ["a"]}, kind, num_classes, **options)
    )


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("Classification", 2, "label 2; expected one of the classes 0..1"),
        ("Classification", -1, "label -1"),
        ("Classification", 0.5, "label 0.5"),
        ("MultiLabelClassification", np.array([0, 1, 1]), r"shape \[3\]"),
        ("MultiLabelClassification", np.array([0, 2]), "values 0, 2"),
        ("SegmentationClasses", np.full((4, 4), 7), "the label map holds 7"),
        ("SegmentationClasses", np.zeros((4, 4, 2)), r"shape \[4, 4, 2\]"),
    ],
)
def test_labels_out_of_range(tmp_path, kind, label, message):
    found = one_sample(tmp_path, np.ones((3, 4, 4)), label, kind)
    with pytest.raises(DatasetError, match=f"a.hdf5.*{message}"):
        found.label(0)


def test_a_sample_that_lacks_a_band(tmp_path):
    found = one_sample(tmp_path, {"Red": np.ones((4, 4)), "Green": np.ones((4, 4))}, 0)
    with pytest.raises(DatasetError, match=r"a.hdf5: no band Blue; it has Green, Red"):
        found.image(0)


def test_a_torn_sample(tmp_path):
    found = one_sample(tmp_path, np.ones((3, 4, 4)), 0)
    (found.folder / "a.hdf5").write_bytes(b"junk")
    with pytest.raises(DatasetError, match=r"a.hdf5: not a readable HDF5 file"):
        found.image(0)


def test_a_sample_whose_pickle_asks_for_more(tmp_path):
    import h5py

    found = one_sample(tmp_path, np.ones((3, 4, 4)), 0)
    with h5py.File(found.folder / "a.hdf5", "r+") as file:
        file.attrs["pickle"] = str(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(DatasetError, match=r"a.hdf5 asks for posix.system"):
        found.label(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task_specs.pkl", b"cposix\nsystem\n(S'true'\ntR.", "asks for posix.system"),
        ("task_specs.pkl", b"\x80\x04}.", "expected TaskSpecifications"),
        ("band_stats.json", b'{"Red": {"mean": 1, "std": 1}}', "no mean and std of Green, Blue"),
        ("band_stats.json", b"[1]", "top level is a list"),
        ("band_stats.json", b"{", "is not JSON"),
        ("default_partition.json", b'{"train": ["a", "a"]}', "or twice"),
        ("default_partition.json", b'{"train": ["a"], "test": ["a"]}', "also in train"),
        ("default_partition.json", b'{"train": ["a"], "dev": []}', "a split 'dev'"),
        ("default_partition.json", b'{"train": ["a", "b"]}', "names 1 samples of 2 .*: b;"),
        ("default_partition.json", b'{"train": null, "test": "a"}', "train: None, test: a; expected lists of names"),
    ],
)
def test_broken_folders(tmp_path, name, content, message):
    folder = one_sample(tmp_path, np.ones((3, 4, 4)), 0).folder
    (folder / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        GeoBenchSet(folder)


def test_another_partition(tmp_path):
    folder = one_sample(tmp_path, np.ones((3, 4, 4)), 0).folder
    (folder / "0.05x_train_partition.json").write_text('{"test": ["a"], "train": [], "valid": []}')
    assert GeoBenchSet(folder, "0.05x_train").splits["test"].tolist() == [0]
    with pytest.raises(DatasetError, match=r"dataset.partition can be 0.05x_train, default"):
        GeoBenchSet(folder, "other")


def test_cloud_masks_never_stand_in(tmp_path):
    folder, _ = build(tmp_path, "m-cashew-plant", per_split=1)
    task = GeoBenchSet(folder).task
    assert task.band_names[-1] == CLOUD[0][1]
    assert {row.stored for row in match_bands(task, ["B10"]).rows} == {"B11"}
    assert len(S2_12) == 12


def test_open_set_checks_the_classes_of_a_task(tmp_path, caplog):
    folder, samples = build(tmp_path, "m-pv4ger", per_split=2)
    section = DatasetSection(path=folder)
    assert open_set(section, progress=False).task.name == "m-pv4ger"
    assert not caplog.text
    train = {name: [s for s in samples if s.startswith("train")] for name in ("0",)}
    others = [s for s in samples if not s.startswith("train")]
    (folder / "label_map.json").write_text(json.dumps({"0": train["0"] + others[:1], "1": others[1:]}))
    with pytest.raises(DatasetError, match="m-pv4ger: split train has no sample of class 1"):
        open_set(section, progress=False)
    (folder / "label_map.json").write_text(json.dumps({"0": train["0"]}))  # of other samples: the files are read
    open_set(section, progress=False)
    (folder / "label_map.json").write_text(json.dumps({"0": train["0"], "2": others}))
    with pytest.raises(DatasetError, match=r"label_map.json: label 2; expected one of the classes 0..1"):
        open_set(section, progress=False)


def test_classes_of_label_maps_are_known_from_the_statistics(tmp_path, caplog):
    folder, samples = build(tmp_path, "m-nz-cattle", per_split=1)
    (folder / "label_stats.json").write_text(json.dumps({name: [1.0, 0.0] for name in samples}))
    found = open_set(DatasetSection(path=folder), progress=False)
    assert found.task.kind == "segmentation"
    assert "split test has no sample of class 1" in caplog.text
    (folder / "label_stats.json").write_text(json.dumps({name: [1.0] for name in samples}))
    with pytest.raises(DatasetError, match=r"label_stats.json: \S+ has \[1.0\]; expected 2 numbers"):
        open_set(DatasetSection(path=folder), progress=False)
    (folder / "label_stats.json").unlink()
    caplog.clear()
    open_set(DatasetSection(path=folder, product_level="l2a"), progress=False)
    assert "no sample" not in caplog.text


def test_a_folder_of_tasks_names_them(tmp_path):
    build(tmp_path, "m-pv4ger", per_split=1)
    build(tmp_path, "m-eurosat", per_split=1)
    with pytest.raises(DatasetError, match="holds GEO-Bench tasks; name one of them: m-eurosat, m-pv4ger"):
        open_set(DatasetSection(path=tmp_path / CLASSIFICATION))


def test_the_product_level_can_be_told(tmp_path):
    folder, _ = build(tmp_path, "m-eurosat", per_split=1)
    levels = {level: GeoBenchSet(folder, product_level=level).task.product_level for level in ("auto", "l2a", "none")}
    assert levels == {"auto": "l1c", "l2a": "l2a", "none": None}
