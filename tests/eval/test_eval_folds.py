"""Folds and label fractions: stratified, nested, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmae.errors import DatasetError
from mpmae.eval.folds import folds, fraction

EUROSAT = np.repeat(np.arange(10), 27)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=60), st.integers(2, 6), st.integers(0, 99))
def test_every_sample_is_tested_once(labels, num_folds, seed):
    labels = np.array(labels)
    found = folds(labels, num_folds, seed)
    assert sorted(np.concatenate([fold["test"] for fold in found]).tolist()) == list(range(len(labels)))
    for fold in found:
        whole = np.concatenate([fold["train"], fold["val"], fold["test"]])
        assert sorted(whole.tolist()) == list(range(len(labels)))
        for name in np.unique(labels):
            share = (labels == name).sum() / num_folds
            assert abs((labels[fold["test"]] == name).sum() - share) < 1


def test_classes_are_spread_evenly():
    found = folds(EUROSAT, 5, 0)
    for fold in found:
        assert len(fold["test"]) == 54
        assert len(fold["val"]) in (43, 44)
        for split, low, high in (("test", 5, 6), ("val", 4, 5), ("train", 16, 18)):
            counts = np.bincount(EUROSAT[fold[split]], minlength=10)
            assert low <= counts.min() <= counts.max() <= high


def test_folds_follow_the_seed():
    again, other = folds(EUROSAT, 5, 3), folds(EUROSAT, 5, 4)
    for one, two in zip(folds(EUROSAT, 5, 3), again, strict=True):
        assert all(np.array_equal(one[split], two[split]) for split in one)
    assert not np.array_equal(again[0]["test"], other[0]["test"])


def test_folds_of_several_labels_spread_the_rare_ones():
    labels = np.zeros((40, 3), bool)
    labels[:, 0] = True
    labels[:5, 1] = True
    labels[35:, 2] = True
    for fold in folds(labels, 5, 0):
        assert labels[fold["test"]].sum(0).tolist() == [8, 1, 1]


def test_folds_that_cannot_be(caplog):
    for num in (1, 4):
        with pytest.raises(DatasetError, match=f"num_folds = {num}; expected 2 to 3"):
            folds(np.arange(3), num, 0)
    folds(np.array([0, 0, 0, 0, 1]), 3, 0)
    assert "absent from some test splits: classes 1 (1)" in caplog.text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=5, max_size=200), st.integers(0, 99))
def test_fractions_are_nested_and_keep_every_class(labels, seed):
    labels = np.array(labels)
    indices = np.arange(0, len(labels), 2)
    smaller = None
    for share in (0.01, 0.05, 0.1, 0.5, 1.0):
        part = fraction(labels, indices, share, seed)
        assert (np.diff(part) > 0).all()
        assert set(part) <= set(indices.tolist())
        assert set(labels[part]) == set(labels[indices])
        for name in set(labels[indices].tolist()):
            num = (labels[indices] == name).sum()
            assert (labels[part] == name).sum() == max(1, round(share * num))
        assert smaller is None or set(smaller) <= set(part)
        smaller = part
    assert part.tolist() == indices.tolist()


def test_fractions_follow_the_seed():
    one, two = fraction(EUROSAT, range(270), 0.1, 0), fraction(EUROSAT, range(270), 0.1, 1)
    assert len(one) == len(two) == 30
    assert not np.array_equal(one, two)
    assert np.array_equal(one, fraction(EUROSAT, range(270), 0.1, 0))


def test_a_fraction_of_one_class_does_not_change_with_the_others():
    part = fraction(EUROSAT, range(27), 0.2, 0)
    assert np.array_equal(part, [i for i in fraction(EUROSAT, range(270), 0.2, 0) if i < 27])


def test_fractions_of_several_labels_keep_every_class():
    """Class 2 is nowhere the rarest of a sample, and is in half of each stratum."""
    labels = np.zeros((8, 3), bool)
    labels[:4, 0] = labels[4:, 1] = labels[[0, 1, 4, 5], 2] = True
    for seed in range(20):
        smaller = fraction(labels, range(8), 0.01, seed)
        assert labels[smaller].any(0).all()
        assert set(smaller) <= set(fraction(labels, range(8), 0.5, seed)) <= set(range(8))
        assert fraction(labels, range(8), 1.0, seed).tolist() == list(range(8))


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_fractions_that_cannot_be(share):
    with pytest.raises(DatasetError, match="expected more than 0 and at most 1"):
        fraction(EUROSAT, range(270), share, 0)
