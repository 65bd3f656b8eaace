"""Quantised floats: the stated bound holds, absent values survive exactly, and what does not fit is refused."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpmae.errors import ConfigError, ShardError
from mpmae.shard_codecs import decode_pixels, encode_pixels
from mpmae.shard_files import load_manifest
from mpmae.shard_format import Manifest, pixel_entry


def entry_of(values, codec="lz4", step=0.01):
    bands = ("asc_VV",) * len(values)
    return pixel_entry("sentinel1", "continuous", values.dtype, values.shape, bands, codec, quantise_step=step)


def largest_value(step: float) -> float:
    return 32766 * step


@st.composite
def floats_in_range(draw):
    dtype, step = np.dtype(draw(st.sampled_from(["f2", "f4", "f8"]))), draw(st.sampled_from([0.01, 0.5, 1 / 3, 1e-3]))
    limit = float(np.nextafter(dtype.type(min(largest_value(step), np.finfo(dtype).max / 2)), dtype.type(0)))
    finite = st.floats(-limit, limit, width=8 * dtype.itemsize, allow_subnormal=True)
    special = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, limit, -limit, step / 2, -step / 2])
    values = draw(hnp.arrays(dtype, (draw(st.integers(1, 2)), 3, 3), elements=st.one_of(finite, special.map(dtype.type))))
    return values, step


@given(floats_in_range(), st.sampled_from(["raw", "lz4", "zstd"]))
@settings(max_examples=300, deadline=None)
def test_the_error_stays_within_the_stated_bound(drawn, codec):
    values, step = drawn
    assume(largest_value(step) < np.finfo(values.dtype).max)
    entry = entry_of(values, codec, step)
    decoded = decode_pixels(entry, encode_pixels(entry, values))
    assert decoded.dtype == values.dtype
    assert decoded.shape == values.shape
    finite = np.isfinite(values)
    np.testing.assert_array_equal(decoded[~finite], values[~finite])
    bound = Fraction(entry.quantisation.max_error)
    for got, source in zip(decoded[finite].tolist(), values[finite].tolist(), strict=True):
        assert abs(Fraction(got) - Fraction(source)) <= bound


def test_the_bound_of_sentinel1_is_close_to_half_a_step():
    entry = entry_of(np.zeros((1, 2, 2), "f4"))
    assert 0.005 < entry.quantisation.max_error < 0.0052
    assert len(encode_pixels(entry_of(np.zeros((1, 64, 64), "f4"), "raw"), np.zeros((1, 64, 64), "f4"))) == 2 * 64 * 64


@pytest.mark.parametrize("value", [327.67, -327.67, 1e30, -3e38])
def test_values_that_do_not_fit_are_named(value):
    values = np.array([[[1.0, -np.inf], [np.nan, value]]], "f4")
    with pytest.raises(
        ValueError, match=rf"sentinel1: 1 values outside -327.66 to 327.66, such as {re.escape(f'{value:g}')},"
    ):
        encode_pixels(entry_of(values), values)


@pytest.mark.parametrize("step", [0.0, -0.01, float("nan"), float("inf"), 1e300])
def test_steps_that_cannot_be(step):
    with pytest.raises(ConfigError, match="expected a float modality and a step above 0"):
        entry_of(np.zeros((1, 2, 2), "f4"), step=step)


def test_what_cannot_be_quantised():
    with pytest.raises(ConfigError, match="quantisation of int16"):
        entry_of(np.zeros((1, 2, 2), "i2"))
    with pytest.raises(ConfigError, match="sentinel2 cannot be quantised: its no-data value 0 would change"):
        pixel_entry("sentinel2", "continuous", np.dtype("f4"), (1, 2, 2), ("B1",), "lz4", quantise_step=0.01)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dtype": "<i2"}, r"quantisation: of '<i2', expected floats"),
        ({"quantisation": {"step": 0, "max_error": 0.1}}, r"quantisation.step: 0.0, expected a number above 0"),
        ({"quantisation": {"step": 0.01, "max_error": -1}}, r"quantisation.max_error: -1.0, expected a number above 0"),
        ({"no_data": {"codes": [], "non_finite": True, "zero_row": True}}, r"no_data.zero_row: true, expected false"),
    ],
)
def test_manifests_that_make_no_sense(built_32, tmp_path, change, problem):
    manifest = load_manifest(built_32)
    entries = {entry.name: entry.model_dump(mode="json") for entry in manifest.pixels}
    entries["sentinel1"] |= {"quantisation": {"step": 0.01, "max_error": 0.0051}} | change
    tree = manifest.model_dump(mode="json") | {"pixels": list(entries.values())}
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(ShardError, match=problem):
        load_manifest(tmp_path)


def test_a_manifest_keeps_the_quantisation(built_32):
    manifest = load_manifest(built_32)
    entry = entry_of(np.zeros((8, 32, 32), "f4")).model_copy(update={"bands": tuple("ABCDEFGH")})
    pixels = tuple(entry if e.name == "sentinel1" else e for e in manifest.pixels)
    again = Manifest.model_validate_json(manifest.model_copy(update={"pixels": pixels}).dump())
    assert next(e for e in again.pixels if e.name == "sentinel1") == entry
