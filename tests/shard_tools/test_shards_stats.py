"""Band statistics: exact against two-pass formulas, mergeable, and equal to the real set's own."""

import json

import numpy as np
import pytest

from mpmae.errors import ShardError, SourceError
from mpmae.shard_tools.build import build
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.stats import BandMoments, band_stats


def assert_close(a: dict, b: dict, rtol: float) -> None:
    assert set(a) == set(b)
    for key in a:
        for quantity in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(a[key][quantity], b[key][quantity], rtol=rtol, atol=rtol, err_msg=f"{key} {quantity}")


def test_merge_equals_one_pass_with_large_offsets():
    rng = np.random.default_rng(0)
    values = rng.normal(1e6, 0.5, (3, 40, 40))
    valid = rng.random(values.shape) < 0.7
    parts = [BandMoments.of(values[:, i : i + 8], valid[:, i : i + 8]) for i in range(0, 40, 8)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    for band in range(3):
        x = values[band][valid[band]]
        assert merged.num[band] == x.size
        np.testing.assert_allclose(merged.mean[band], x.mean(), rtol=1e-14)
        np.testing.assert_allclose(merged.describe()["std"][band], x.std(), rtol=1e-9)
        assert (merged.min[band], merged.max[band]) == (x.min(), x.max())


def test_bands_without_values_or_spread():
    values = np.array([[-np.inf, -np.inf], [3.0, 3.0]])
    moments = BandMoments.of(values, np.isfinite(values)).merge(BandMoments.of(values, np.isfinite(values)))
    assert moments.describe() == {"mean": [0, 3], "std": [1, 1], "min": [0, 3], "max": [0, 3]}


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
