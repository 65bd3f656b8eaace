"""Arrays out of zipped zarr groups: our reader of format 2 against zarr itself."""

import json
import subprocess
import sys
import zipfile

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.zarr_zip import ZarrZip

COMPRESSORS = [
    None,
    numcodecs.Blosc("zstd", 3, numcodecs.Blosc.BITSHUFFLE),
    numcodecs.Blosc("lz4", 5, numcodecs.Blosc.SHUFFLE),
    numcodecs.Zlib(3),
    numcodecs.Zstd(1),
]


def write(path, values, zarr_format=2, **options) -> np.ndarray:
    with zarr.storage.ZipStore(path, mode="w") as store:
        group = zarr.open_group(store, mode="w", zarr_format=zarr_format)
        array = group.create_array("a", shape=values.shape, dtype=values.dtype, **options)
        array[...] = values
    return values


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_part_of_any_array_equals_what_zarr_wrote(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    options = {
        "chunks": tuple(data.draw(st.integers(1, size + 2)) for size in shape),
        "compressors": data.draw(st.sampled_from(COMPRESSORS)),
        "order": data.draw(st.sampled_from("CF")),
        "filters": data.draw(st.sampled_from([None, [numcodecs.Delta("<i2")]])),
    }
    values = np.random.default_rng(0).integers(-99, 99, shape).astype("<i2")
    path = tmp_path_factory.mktemp("zarr") / "x.zip"
    write(path, values, **options)
    parts = st.one_of(*(st.just(p) for p in (slice(None), slice(1, 4), slice(0, 99), 0)))
    where = tuple(data.draw(parts) for _ in range(data.draw(st.integers(0, len(shape)))))
    where = (*where, ...) if data.draw(st.booleans()) else where
    with ZarrZip(path.read_bytes()) as archive:
        np.testing.assert_array_equal(archive.read("a", where), values[where])
        assert archive.chunks("a") == options["chunks"]


@pytest.mark.parametrize("values", [np.float64(3.5), np.array(["vv", "vh"]), np.arange(3).astype("datetime64[ns]")])
def test_scalars_names_and_dates(tmp_path, values):
    write(tmp_path / "x.zip", np.asarray(values))
    with ZarrZip(tmp_path / "x.zip") as archive:
        np.testing.assert_array_equal(archive.read("a"), values)
        assert "a" in archive
        assert "b" not in archive
        with pytest.raises(UnreadableError, match="no array b"):
            archive.read("b")


@pytest.mark.parametrize(("zarr_format", "fill", "expected"), [(2, 0, None), (2, -9999, -9999), (3, -9999, None)])
def test_fill_values(tmp_path, zarr_format, fill, expected):
    write(tmp_path / "x.zip", np.ones((2, 2), "<i2"), zarr_format, fill_value=fill)
    with ZarrZip(tmp_path / "x.zip") as archive:
        assert archive.fill("a") == expected
    write(tmp_path / "y.zip", np.ones((2, 2), "<i2"), zarr_format, fill_value=fill, attributes={"_FillValue": 7})
    with ZarrZip(tmp_path / "y.zip") as archive:
        assert archive.fill("a") == 7


@pytest.mark.parametrize(
    ("units", "value", "expected"),
    [
        ("days since 2020-05-03 02:07:17", 1, "2020-05-04T02:07:17"),
        ("seconds since 1970-01-01", 86_400, "1970-01-02T00:00:00"),
        ("", 1_588_471_637_000_000_000, "2020-05-03T02:07:17"),
    ],
)
def test_times(tmp_path, units, value, expected):
    write(tmp_path / "x.zip", np.array([value]), attributes={"units": units} if units else {})
    with ZarrZip(tmp_path / "x.zip") as archive:
        assert archive.times_ns("a")[0] == np.datetime64(expected, "ns").astype(np.int64)


def hand_made(path, meta: dict, **members) -> None:
    whole = {"shape": [4], "chunks": [2], "dtype": "<i2", "fill_value": None, "order": "C", "filters": None}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(".zgroup", '{"zarr_format": 2}')
        archive.writestr("a/.zarray", json.dumps(whole | {"compressor": None, "zarr_format": 2} | meta))
        for name, data in members.items():
            archive.writestr(f"a/{name[1:]}", data)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "chunk 1 is missing"),
        ({"filters": [{"id": "pickle"}]}, "runs code of the file"),
        ({"chunks": [0]}, "in chunks of"),
        ({"chunks": [2**40]}, "more than"),
        ({"shape": [4, 4]}, "in chunks of"),
        ({"dtype": "<q9"}, "no usable array a"),
        ({"compressor": {"id": "none such"}}, "no usable array a"),
        ({"chunks": [3]}, "cannot be read"),
    ],
)
def test_arrays_that_are_not_as_they_must_be(tmp_path, meta, message):
    hand_made(tmp_path / "x.zip", meta, _0=b"\1\0\2\0")
    with ZarrZip(tmp_path / "x.zip") as archive, pytest.raises(UnreadableError, match=message):
        archive.read("a")


def test_a_chunk_left_out_because_it_is_all_fill_is_that(tmp_path):
    hand_made(tmp_path / "x.zip", {"fill_value": 7}, _0=b"\1\0\2\0")
    with ZarrZip(tmp_path / "x.zip") as archive:
        assert archive.read("a").tolist() == [1, 2, 7, 7]


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("zarr", "ZarrZip(Path(sys.argv[1]))"),
        ("numcodecs", "ZarrZip(Path(sys.argv[2])).read('a')"),
        ("rasterio", "rasters.read_header(b'II')"),
        ("pyarrow", "major_tom._parquet(Path('x')).__enter__()"),
    ],
)
def test_an_absent_package_is_named(tmp_path, package, call):
    write(tmp_path / "v3.zip", np.ones(3), 3)
    write(tmp_path / "v2.zip", np.ones(3), 2)
    code = f"""
import sys
from pathlib import Path
sys.modules[{package!r}] = None
from mpmae.errors import SourceError
from mpmae.shard_tools.sources import major_tom, rasters
from mpmae.shard_tools.sources.zarr_zip import ZarrZip
try:
    {call}
except SourceError as error:
    assert "{package}" in str(error) and "pip install mpmae[sources]" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "v3.zip"), str(tmp_path / "v2.zip")], check=True, timeout=60)
