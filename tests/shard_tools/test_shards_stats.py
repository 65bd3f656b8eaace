"""Band statistics: exact against two-pass formulas, mergeable, and equal to the real set's own."""

import json
from fractions import Fraction

import numpy as np
import pytest

from mpmae.errors import ShardError, SourceError
from mpmae.shard_tools.build import build
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.stats import BandMoments, IntegerSums, band_stats


def assert_close(a: dict, b: dict, rtol: float) -> None:
    assert set(a) == set(b)
    for key in a:
        for quantity in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(a[key][quantity], b[key][quantity], rtol=rtol, atol=rtol, err_msg=f"{key} {quantity}")


def moments_of(values: np.ndarray, valid: np.ndarray, kind=BandMoments):
    moments = kind(len(values))
    moments.add(values, valid)
    return moments


def test_merge_equals_one_pass_with_large_offsets():
    rng = np.random.default_rng(0)
    values = rng.normal(1e6, 0.5, (3, 40, 40))
    valid = rng.random(values.shape) < 0.7
    parts = [moments_of(values[:, i : i + 8], valid[:, i : i + 8]) for i in range(0, 40, 8)]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    found = merged.describe()
    for band in range(3):
        x = values[band][valid[band]]
        assert merged.num[band] == x.size
        np.testing.assert_allclose(merged.mean[band], x.mean(), rtol=1e-14)
        np.testing.assert_allclose(found["std"][band], x.std(), rtol=1e-9)
        assert (found["min"][band], found["max"][band]) == (x.min(), x.max())


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", "<i2"])
def test_integers_are_exact_in_any_order_and_cut(dtype):
    """Against fractions of Python integers, at the ends of the dtype's range, where float64 would round."""
    rng, limits = np.random.default_rng(1), np.iinfo(dtype)
    values = rng.integers(limits.min, limits.max, (2, 64, 64), dtype, endpoint=True)
    values[1] = limits.max
    valid = rng.random(values.shape) < 0.8
    parts = [moments_of(values[:, i : i + 16], valid[:, i : i + 16], IntegerSums) for i in range(0, 64, 16)]
    merged = IntegerSums(2)
    for part in (parts[2], parts[0], parts[3], parts[1]):
        merged.merge(part)
    assert merged.describe() == moments_of(values, valid, IntegerSums).describe()
    exact = [Fraction(int(x)) for x in values[0][valid[0]]]
    mean = sum(exact) / len(exact)
    variance = sum((x - mean) ** 2 for x in exact) / len(exact)
    found = merged.describe()
    assert found["mean"] == [float(mean), float(limits.max)]
    assert found["std"][0] == pytest.approx(float(variance) ** 0.5, rel=1e-15)
    assert found["std"][1] == 1


@pytest.mark.parametrize("kind", [BandMoments, IntegerSums])
def test_bands_without_values_or_spread(kind):
    values = np.array([[-9, -9], [3, 3]], np.float32 if kind is BandMoments else np.int16)
    moments = moments_of(values, values != -9, kind)
    moments.merge(moments_of(values, values != -9, kind))
    assert moments.describe() == {"mean": [0, 3], "std": [1, 1], "min": [0, 3], "max": [0, 3]}


def test_no_number_of_threads_and_no_cut_of_shards_changes_a_digit(source_64, tmp_path):
    for num in (5, 100):
        build(source_64, tmp_path / str(num), max_samples_per_shard=num, progress=False)
    one, two = (ShardSet(tmp_path / str(num)) for num in (5, 100))
    assert band_stats(one, None, workers=1) == band_stats(two, None, workers=3)


def test_real_statistics_are_reproduced(real_source):
    """The real folders' statistics are over all their tiles, with the standard deviation of the population."""
    own = json.loads((real_source / f"{real_source.name}_band_stats.json").read_text())
    own.pop("sentinel2_cloudmask", None)  # a categorical layer
    with MMEarthSource(real_source, need_band_stats=False) as source:
        assert_close(band_stats(source, None), own, rtol=1e-9)


def test_synthetic_statistics_are_those_of_train(source_64):
    own = json.loads((source_64 / f"{source_64.name}_band_stats.json").read_text())
    with MMEarthSource(source_64) as source:
        assert band_stats(source) == own


def test_shards_and_source_agree(source_64, tmp_path):
    build(source_64, tmp_path / "set", progress=False)
    with MMEarthSource(source_64) as source:
        for split in ("train", "val", None):
            assert_close(band_stats(ShardSet(tmp_path / "set"), split), band_stats(source, split), rtol=1e-11)


def test_unknown_split(source_32, built_32):
    with MMEarthSource(source_32) as source, pytest.raises(SourceError, match="no split 'dev'; it has train, val, test"):
        band_stats(source, "dev")
    with pytest.raises(ShardError, match="no split 'dev'"):
        band_stats(ShardSet(built_32), "dev")
