"""The generator is pinned, uniform, and streams are independent."""

import numpy as np

from mpmae.counter_rng import Stream, random_bits, random_integers


def test_values_never_change():
    """Pinned: another value would change every run's order, crops and masks."""
    assert random_bits(0, Stream.ORDER, 0, np.array([0, 1]), 2).tolist() == PINNED


def test_a_sample_draws_the_same_alone_and_in_company():
    together = random_bits(3, Stream.MASK, 2, np.arange(100), 49)
    assert np.array_equal(together[40:41], random_bits(3, Stream.MASK, 2, np.array([40]), 49))
    assert np.array_equal(together[:, :5], random_bits(3, Stream.MASK, 2, np.arange(100), 5))


def test_bits_are_balanced():
    bits = np.unpackbits(random_bits(1, Stream.CROP, 1, np.arange(20_000)).view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def test_integers_fill_their_range_evenly():
    counts = np.bincount(random_integers(1, Stream.CROP, 1, np.arange(90_000), 9)[:, 0], minlength=9)
    assert len(counts) == 9
    assert np.abs(counts / 10_000 - 1).max() < 0.05


def test_seed_stream_epoch_and_sample_all_matter():
    base = random_bits(0, Stream.CROP, 0, np.arange(1000))
    others = [
        random_bits(1, Stream.CROP, 0, np.arange(1000)),
        random_bits(0, Stream.FLIP, 0, np.arange(1000)),
        random_bits(0, Stream.CROP, 1, np.arange(1000)),
        random_bits(0, Stream.CROP, 0, np.arange(1000) + 1000),
    ]
    for other in others:
        assert not np.isin(other, base).any()


PINNED = [[17407086476691733461, 12238339075568109214], [16542492386722179186, 8991841024813783764]]
