"""Which stored band stands for a wanted one."""

import logging

import pytest

from mpmae.errors import DatasetError
from mpmae.eval.bands import SENTINEL2_UM, match_bands, plain_band, sentinel2_name
from mpmae.eval.dataset import StoredBand, Task
from mpmae.modalities import spec_of


def task_of(*bands: tuple[str, float | None]) -> Task:
    stored = tuple(StoredBand(name, um, 1.0, 1.0) for name, um in bands)
    return Task("mine", "multiclass", ("a", "b"), stored, "accuracy")


def test_wavelengths_of_all_bands():
    assert set(SENTINEL2_UM) == set(spec_of("sentinel2").bands)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("B4", "B4"),
        ("B04", "B4"),
        ("b8a", "B8A"),
        ("B08A", "B8A"),
        ("04 - Red", "B4"),
        ("08A - Vegetation Red Edge", "B8A"),
        ("10 - SWIR - Cirrus", "B10"),
        ("4", None),
        ("B13", None),
        ("B0", None),
        ("B4A", None),
        ("VV", None),
        ("Red", None),
    ],
)
def test_names_of_sentinel2(text, name):
    assert sentinel2_name(text) == name


def test_bands_with_a_name_alone():
    assert [plain_band(text) for text in ("B02", "NIR", "VV")] == [("B2", 0.49), ("NIR", 0.842), ("VV", None)]


def test_same_names_come_first_and_order_is_the_encoders():
    task = task_of(("B8A", 0.865), ("B2", 0.49), ("B4", 0.665))
    match = match_bands(task, ["B4", "B2", "B8A"])
    assert match.positions == [2, 1, 0]
    assert [row.distance_um for row in match.rows] == [0, 0, 0]
    assert not any(row.is_filled for row in match.rows)


def test_ties_go_to_the_shorter_wavelength_then_to_the_first():
    wanted = SENTINEL2_UM["B5"]
    task = task_of(("long", wanted + 0.02), ("short", wanted - 0.02), ("also short", wanted - 0.02))
    (row,) = match_bands(task, ["B5"]).rows
    assert (row.stored, row.position, row.distance_um) == ("short", 1, pytest.approx(0.02))


def test_the_table_is_logged(caplog):
    caplog.set_level(logging.INFO)
    match_bands(task_of(("Red", 0.665), ("VV", None)), ["B4", "B12"])
    assert "B4      Red                         0.000 um" in caplog.text
    assert "B12     Red                         1.525 um" in caplog.text
    assert "show something else: Red for B12" in caplog.text


def test_a_name_without_a_wavelength_still_matches():
    (row,) = match_bands(task_of(("B4", None)), ["B4"]).rows
    assert (row.stored, row.distance_um) == ("B4", None)


def test_sets_without_wavelengths_are_refused():
    with pytest.raises(DatasetError, match=r"can stand for B4, B3: none of VV, VH has a wavelength\. Name the bands"):
        match_bands(task_of(("VV", None), ("VH", None)), ["B4", "B3"])


@pytest.mark.parametrize("wanted", [["B4", "VV"], []])
def test_unknown_bands_are_refused(wanted):
    with pytest.raises(DatasetError, match=r"the encoder wants the bands .*expected names of Sentinel-2: B1, "):
        match_bands(task_of(("B4", 0.665)), wanted)
