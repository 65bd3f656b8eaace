"""Which patches are visible."""

import numpy as np
import pytest
import torch

from mpmae.errors import ConfigError
from mpmae.masking import draw_visible, num_visible, visible_bool, visible_index


@pytest.mark.parametrize(
    ("patches", "ratio", "expected"),
    [(49, 0.6, 19), (16, 0.6, 6), (100, 0.99, 1), (10, 0.9, 1), (49, 0.0, 49), (196, 0.75, 49)],
)
def test_num_visible(patches, ratio, expected):
    assert num_visible(patches, ratio) == expected


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_num_visible_rejects_a_ratio(ratio):
    with pytest.raises(ConfigError, match="mask_ratio"):
        num_visible(49, ratio)


def test_num_visible_needs_one():
    with pytest.raises(ConfigError, match="none of 4 patches"):
        num_visible(4, 0.9)


def test_rows_depend_on_their_sample_alone():
    ids = np.array([5, 900_000, 0, 17])
    drawn = draw_visible(3, 2, ids, 49, 19)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (4, 19)
    assert (drawn.diff(dim=1) > 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < 49
    for row, sample in enumerate(ids):
        torch.testing.assert_close(draw_visible(3, 2, torch.tensor([sample]), 49, 19)[0], drawn[row], rtol=0, atol=0)
    assert not torch.equal(drawn, draw_visible(3, 3, ids, 49, 19))
    assert not torch.equal(drawn, draw_visible(4, 2, ids, 49, 19))


def test_the_draw_is_pinned():
    assert draw_visible(0, 0, [0, 1], 16, 6).tolist() == [[0, 1, 5, 7, 8, 10], [0, 1, 5, 10, 11, 14]]


def test_every_patch_is_as_likely():
    counts = visible_bool(draw_visible(0, 0, np.arange(20_000), 49, 19), 49).sum(0).double()
    expected = 20_000 * 19 / 49
    spread = (20_000 * 19 / 49 * 30 / 49) ** 0.5
    assert ((counts - expected).abs() < 5 * spread).all()


@pytest.mark.parametrize("count", [0, 50])
def test_draw_visible_rejects_a_count(count):
    with pytest.raises(ConfigError, match="num_visible"):
        draw_visible(0, 0, [1], 49, count)


def test_index_and_bool_are_inverse():
    index = draw_visible(1, 1, np.arange(7), 16, 6)
    flags = visible_bool(index, 16)
    assert flags.sum(1).tolist() == [6] * 7
    assert torch.equal(visible_index(flags), index)
    assert torch.equal(visible_index(flags.numpy()), index)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (torch.tensor([[True, False], [True, True]]), "between 1 and 2"),
        (torch.ones(2, 3), "float32"),
        (torch.ones(3).bool(), r"\[3\]"),
    ],
)
def test_visible_index_rejects(flags, message):
    with pytest.raises(ConfigError, match=message):
        visible_index(flags)
