"""Maps built by the compiled loops equal the plain numpy formula bit for bit: every dtype, codec, view and no-data rule."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpmae.loader.maps import CategoricalMaps, ContinuousMaps, Views
from mpmae.modalities import MODALITIES, NoData, class_lookup
from mpmae.shard_codecs import decode_pixels, decompress_into, encode_pixels
from mpmae.shard_format import pixel_entry

# Those that MMEarth files hold, wider ones, and the two kinds that go through numpy. Each is compiled: about a second.
DTYPES = ("u1", "i1", "<u2", "<i2", "<f4", "<u4", "<f8", "<f2", ">u2")
CLASS_DTYPES = ("u1", "<i2", "<f4", "<u8", ">u2")
LEVELS = 2


def crop(raw: np.ndarray, view: np.ndarray, size: int) -> np.ndarray:
    top, left, hflip, vflip = view.tolist()
    raw = raw[:, top : top + size, left : left + size]
    return raw[:, :: -1 if vflip else 1, :: -1 if hflip else 1]


def normalised(raw: np.ndarray, no_data: NoData, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(raw - mean) / std in float32, 0 where not valid; raw [C, H, H], mean and std [C]."""
    with np.errstate(over="ignore"):
        valid = no_data.valid(raw)
        clean = np.where(valid, raw, 0).astype(np.float32)
        return np.where(valid, (clean - mean[:, None, None]) / std[:, None, None], np.float32(0)), valid


def classes(raw: np.ndarray, lookup: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = lookup[np.where((raw >= 0) & (raw < 256), raw, 0).astype(np.intp)].astype(np.int64)
    return ids, ids >= 0


@st.composite
def cases(draw, dtypes=DTYPES):
    dtype, side = np.dtype(draw(st.sampled_from(dtypes))), draw(st.integers(1, 12))
    size, num_bands, num = draw(st.integers(1, side)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    common = st.sampled_from([0, 1, 5, 95, 100, 127])
    anything = hnp.from_dtype(dtype.newbyteorder("="))
    raw = draw(hnp.arrays(dtype.newbyteorder("="), (num, num_bands, side, side), elements=st.one_of(common, anything)))
    offset = st.integers(0, side - size)
    views = draw(st.lists(st.tuples(offset, offset, st.booleans(), st.booleans()), min_size=num, max_size=num))
    codes = draw(st.lists(st.sampled_from([0, 1, 5, 127, 255, -32768, 65535, -(2**31)]), max_size=3, unique=True))
    return SimpleNamespace(
        raw=raw.astype(dtype),
        size=size,
        views=np.array(views, np.int64).reshape(num, 4),
        levels=np.array([draw(st.integers(0, LEVELS - 1)) for _ in range(num)]),
        no_data=NoData(tuple(codes), non_finite=draw(st.booleans())),
        codec=draw(st.sampled_from(["raw", "lz4", "zstd"])),
    )


def stored(entry, raw: np.ndarray) -> np.ndarray:
    rows = np.empty((len(raw), entry.stored_bytes), np.uint8)
    for row, values in zip(rows, raw, strict=True):
        decompress_into(entry, encode_pixels(entry, values), row)
    return rows


def entry_of(name: str, case, **options):
    """Foreign byte orders are no dtype that the tools write, but one that a manifest may hold."""
    shape = case.raw.shape[1:]
    entry = pixel_entry(name, MODALITIES[name].kind, case.raw.dtype, shape, ("A",) * shape[0], case.codec, **options)
    return entry.model_copy(update={"dtype": case.raw.dtype.str})


def room(case, dtype) -> tuple[np.ndarray, np.ndarray]:
    shape = (*case.raw.shape[:2], case.size, case.size)
    return np.full(shape, 77, dtype), np.zeros(shape, bool)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, but for the payload of a NaN."""
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def statistics(num_bands: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(num_bands)
    return random.normal(0, 50, (LEVELS, num_bands)).astype("f4"), random.uniform(0.1, 90, (LEVELS, num_bands)).astype("f4")


@given(cases())
@settings(max_examples=400, deadline=None)
def test_continuous_maps_are_the_formula(case):
    entry = entry_of("sentinel1", case)
    mean, std = statistics(entry.shape[0])
    values, valid = room(case, np.float32)
    ContinuousMaps(entry, case.no_data, mean, std).fill(stored(entry, case.raw), case.views, case.levels, values, valid)
    for i, level in enumerate(case.levels):
        expected = normalised(crop(case.raw[i], case.views[i], case.size), case.no_data, mean[level], std[level])
        np.testing.assert_array_equal(valid[i], expected[1])
        assert_same(values[i][valid[i]], expected[0][valid[i]])
        assert not values[i][~valid[i]].view(np.uint32).any()


@given(cases(CLASS_DTYPES), st.booleans())
@settings(max_examples=300, deadline=None)
def test_class_maps_are_the_lookup(case, quirks):
    name = "esa_worldcover"
    entry, lookup = entry_of(name, case), class_lookup(MODALITIES[name], quirks)
    values, valid = room(case, np.int64)
    CategoricalMaps(entry, lookup).fill(stored(entry, case.raw), case.views, case.levels, values, valid)
    for i in range(len(values)):
        with np.errstate(invalid="ignore"):
            expected = classes(crop(case.raw[i], case.views[i], case.size), lookup)
        assert_same(values[i], expected[0])
        np.testing.assert_array_equal(valid[i], expected[1])


@given(cases(), st.sampled_from(["<f2", "<f4"]))
@settings(max_examples=200, deadline=None)
def test_quantised_maps_are_those_of_the_decoded_values(case, dtype):
    with np.errstate(all="ignore"):
        case.raw = np.clip(np.nan_to_num(case.raw.astype("f8"), nan=3.0), -300, 300).astype(dtype)
    special = np.array([-np.inf, np.nan, np.inf, 0], dtype)
    case.raw.reshape(-1)[:4] = special[: case.raw.size]
    entry = entry_of("sentinel1", case, quantise_step=0.01)
    mean, std = statistics(entry.shape[0])
    values, valid = room(case, np.float32)
    ContinuousMaps(entry, case.no_data, mean, std).fill(stored(entry, case.raw), case.views, case.levels, values, valid)
    for i, level in enumerate(case.levels):
        decoded = decode_pixels(entry, encode_pixels(entry, case.raw[i]))
        expected = normalised(crop(decoded, case.views[i], case.size), case.no_data, mean[level], std[level])
        np.testing.assert_array_equal(valid[i], expected[1])
        assert_same(values[i][valid[i]], expected[0][valid[i]])


def test_views_as_a_table():
    views = Views(np.array([1, 2]), np.array([3, 4]), np.array([True, False]), np.array([False, False]))
    assert views.table().tolist() == [[1, 3, 1, 0], [2, 4, 0, 0]]


PLAIN_PYTHON = """
import sys
import numpy as np
from mpmae.loader.maps import CategoricalMaps, ContinuousMaps
from mpmae.modalities import NoData
from mpmae.shard_codecs import decode_pixels, decompress_into, encode_pixels
from mpmae.shard_format import pixel_entry

np.seterr(over="ignore")
random, results = np.random.default_rng(0), []
views = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [2, 1, 1, 1]])
levels, mean, std = np.array([0, 1, 0]), random.normal(0, 9, (2, 2)).astype("f4"), np.full((2, 2), 3, "f4")
for dtype, step in (("<u2", None), ("<i2", None), ("<f4", None), ("u1", None), ("<f4", 0.01)):
    for codec in ("raw", "lz4"):
        raw = random.integers(-300 if dtype[1] == "f" else 0, 255, (3, 2, 5, 5)).astype(dtype)
        entry = pixel_entry("sentinel1", "continuous", np.dtype(dtype), (2, 5, 5), "AB", codec, quantise_step=step)
        rows = np.empty((3, entry.stored_bytes), np.uint8)
        for row, values in zip(rows, raw):
            data = encode_pixels(entry, values)
            decompress_into(entry, data, row)
            results += [np.frombuffer(data, np.uint8), decode_pixels(entry, data)]
        for maps, form in ((ContinuousMaps(entry, NoData((5,), True), mean, std), "f4"),
                           (CategoricalMaps(entry, random.integers(-1, 9, 256).astype("i1")), "i8")):
            values, valid = np.empty((3, 2, 3, 3), form), np.empty((3, 2, 3, 3), bool)
            maps.fill(rows, views, levels, values, valid)
            results += [values, valid]
np.savez(sys.argv[1], *results)
"""


def test_the_loops_mean_the_same_uncompiled(tmp_path):
    found = []
    for disabled in ("0", "1"):
        path = tmp_path / f"{disabled}.npz"
        environment = os.environ | {"NUMBA_DISABLE_JIT": disabled}
        subprocess.run([sys.executable, "-c", PLAIN_PYTHON, str(path)], check=True, timeout=120, env=environment)
        found.append(np.load(path))
    assert len(found[0].files) == len(found[1].files) > 90
    for name in found[0].files:
        np.testing.assert_array_equal(found[0][name], found[1][name])


NO_CACHE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as where neither the package nor the user's folder can be written
import numpy as np
from mpmae import pixel_loops
values = np.arange(8, dtype=np.uint16).reshape(2, 4)
planes = pixel_loops.delta_planes(values)
assert np.array_equal(pixel_loops.undo_delta_planes(planes.reshape(-1), 2, 4), values.reshape(-1))
"""


def test_without_a_folder_for_compiled_code():
    subprocess.run([sys.executable, "-c", NO_CACHE], check=True, timeout=120)
