"""Labelled HDF5 files with the modalities of MMEarth, each as a dataset of its own."""

import logging

import h5py
import numpy as np
import pytest

from mpmae.errors import DatasetError
from mpmae.eval.bands import match_channels
from mpmae.eval.labelled_h5 import LabelledH5
from tests.eval.labelled_files import images, write_h5

LABELS = np.arange(12) % 3


def write_modalities(path, **datasets):
    """A file of labels and the given datasets, without `image`."""
    write_h5(path, images(), LABELS, product_level="l2a")
    with h5py.File(path, "a") as file:
        del file["image"], file.attrs["bands"]
        for name, values in datasets.items():
            file[name] = values
    return path


def mmearth(num=12, side=8):
    """The published layout: sentinel2 [N, 13, ...], sentinel1 [N, 8, ...], aster at its own size, land cover codes."""
    rng = np.random.default_rng(0)
    s1 = rng.normal(-12, 3, (num, 8, side, side)).astype(np.float32)
    s1[:, 2:4] = -np.inf
    aster = rng.integers(0, 900, (num, 2, side // 2, side // 2)).astype(np.int16)
    aster[0, 0, 0, 0] = -32768
    cover = rng.choice([0, 10, 80], (num, 1, side, side)).astype(np.uint8)
    s2 = rng.integers(1, 4000, (num, 13, side, side)).astype(np.uint16)
    s2[1, :, 0, 0] = 0
    return {"sentinel2": s2, "sentinel1": s1, "aster": aster, "esa_worldcover": cover}


def test_every_modality_is_read_with_its_own_codes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    stored = mmearth()
    labelled = LabelledH5(write_modalities(tmp_path / "set.h5", **stored), progress=False)
    names = labelled.task.band_names
    assert names[:4] == ("B1", "B2", "B3", "B4")
    assert names[13:] == (
        *("asc_VV", "asc_VH", "asc_HH", "asc_HV", "desc_VV", "desc_VH", "desc_HH", "desc_HV"),
        *("elevation", "slope", "esa_worldcover"),
    )
    assert {band.modality for band in labelled.task.bands} == set(stored)
    assert "no valid value of asc_HH, asc_HV" in caplog.text
    image = labelled.image(0)
    assert image.shape == (24, 8, 8)
    assert np.isnan(image[21, :2, :2]).all(), "elevation's code, repeated to the size of the others"
    assert np.isfinite(image[21]).sum() == 60
    codes = stored["esa_worldcover"][0, 0].astype(np.float32)
    np.testing.assert_array_equal(image[23], np.where(codes == 0, np.nan, codes))
    assert np.isnan(labelled.image(1)[:13, 0, 0]).all()
    wanted = [("sentinel2", "B4"), ("sentinel1", "desc_VH"), ("aster", "elevation"), ("esa_worldcover", "Map")]
    assert match_channels(labelled.task, wanted).positions == [3, 18, 21, 23]


def test_modalities_beside_an_image(tmp_path):
    path = write_h5(tmp_path / "set.h5", images(), LABELS)
    with h5py.File(path, "a") as file:
        file["aster"] = mmearth()["aster"][:, :1]
        file["aster"].attrs["bands"] = ["elevation"]
    labelled = LabelledH5(path, progress=False)
    assert labelled.task.band_names == ("B2", "B3", "B4", "elevation")
    assert [band.modality for band in labelled.task.bands] == [None, None, None, "aster"]
    assert labelled.image(3).shape == (4, 8, 8)


def test_datasets_that_do_not_fit(tmp_path):
    stored = mmearth()
    path = write_modalities(tmp_path / "set.h5", sentinel1=stored["sentinel1"][:, :3], aster=stored["aster"][:11])
    with pytest.raises(DatasetError) as error:
        LabelledH5(path, progress=False)
    assert "expected 3 names, each once, in the attribute `bands` of sentinel1" in str(error.value)
    assert "sentinel1 12, aster 11 samples; expected as many of each" in str(error.value)
    path = write_modalities(tmp_path / "other.h5", dem=stored["aster"])
    with h5py.File(path, "a") as file:
        file["dem"].attrs["bands"] = ["elevation", "aspect"]
    with pytest.raises(DatasetError, match="dem has no band aspect; expected elevation"):
        LabelledH5(path, progress=False)
