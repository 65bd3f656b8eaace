"""Costs of collectives by hand, and the fit of their links to timings."""

import math
import random

import pytest


def flat(num_cores: int = 8, latency_s: float = 1.0, bytes_per_s: float = 10.0):
    import scaling_links as links

    return links.SharedCores(dict.fromkeys(links.KINDS, links.Link(latency_s, bytes_per_s)), num_cores)


def nodes():
    """Two figures a link that are easy to follow: 1 s and 80 bytes/s inside, 10 s and 40 bytes/s between nodes of 8."""
    import scaling_links as links

    return links.Nodes(8, links.Link(1.0, 80.0), links.Link(10.0, 40.0), launch_s=0.5)


@pytest.mark.parametrize(
    ("kind", "latency_s", "transfer_s"),
    [("all_reduce", 6.0, 15.0), ("all_gather", 3.0, 7.5), ("reduce_scatter", 3.0, 7.5)],
)
def test_a_ring_of_four_by_hand(kind, latency_s, transfer_s):
    from scaling_links import Group

    # 100 bytes: n - 1 = 3 hops and 3/4 of the bytes to gather or to scatter, twice that for both
    assert flat().cost(kind, 100, Group(4, 4)) == (latency_s, transfer_s)


def test_ranks_past_the_cores_wait_for_them():
    from scaling_links import Group

    assert flat(num_cores=2).cost("all_gather", 100, Group(4, 4)) == (6.0, 15.0)
    assert flat(num_cores=2).cost("all_gather", 100, Group(2, 2)) == (1.0, 5.0)


def test_one_rank_sends_nothing():
    from scaling_links import KINDS, NOTHING, Group

    for fabric in (flat(), nodes()):
        assert all(fabric.cost(kind, 1e9, Group(1, 1)) == NOTHING for kind in KINDS)


def test_a_ring_over_two_nodes_by_hand():
    from scaling_links import Group

    # 15 hops, one of them between the nodes, whose 40 bytes/s are the narrowest; 15/16 of 320 bytes
    assert nodes().cost("all_gather", 320, Group(16, 8)) == (0.5 + 14 + 10, 300 / 40)
    assert nodes().cost("all_gather", 320, Group(8, 8)) == (0.5 + 7, 280 / 80)


def test_groups_of_one_rank_a_node_share_its_network():
    from scaling_links import Group

    # eight groups at once: 5 bytes/s each
    assert nodes().cost("reduce_scatter", 100, Group(2, 1)) == (0.5 + 10, 50 / 5)


def test_an_all_reduce_takes_the_faster_of_ring_and_tree():
    from scaling_links import TREE_BANDWIDTH_FRACTION, Group

    small = nodes().cost("all_reduce", 1, Group(32, 8))
    # up and down: 7 hops inside, log2(4) = 2 between
    assert small == pytest.approx((0.5 + 2 * (7 + 20), 2 / (TREE_BANDWIDTH_FRACTION * 40)))
    large = nodes().cost("all_reduce", 1e6, Group(32, 8))
    assert large == pytest.approx((0.5 + 56 + 6 * 10, 2 * 31 / 32 * 1e6 / 40))


def test_the_fit_finds_latency_and_bandwidth_under_noise():
    from scaling_links import KINDS, Group, Timing, fit_links

    true, random_of, noise = flat(2, 2e-4, 1.5e9), random.Random(0), 0.1
    timings = []
    for kind in KINDS:
        for num_ranks in (2, 3, 4):
            for num_bytes in (2**12, 2**16, 2**20, 2**24, 2**27):
                seconds = true.cost(kind, num_bytes, Group(num_ranks, num_ranks)).total_s
                timings.append(Timing(kind, num_ranks, num_bytes, seconds * random_of.uniform(1 - noise, 1 + noise)))
    for link in fit_links(timings, num_cores=2).links.values():  # no further off than a single timing
        assert link.latency_s == pytest.approx(2e-4, rel=noise)
        assert link.bytes_per_s == pytest.approx(1.5e9, rel=noise)


def test_the_fit_never_goes_below_zero_and_asks_for_enough():
    from scaling_links import fit_two

    assert fit_two([(1, 0, 2.0), (1, 1, 1.0)])[1] == 0.0
    assert fit_two([(1, 10, 1.0), (2, 10, 0.5)])[0] == 0.0
    with pytest.raises(ValueError, match="2 timings do not tell latency and bandwidth apart"):
        fit_two([(1, 10, 1.0), (2, 20, 2.0)])


def test_a_link_without_a_cost_a_byte_is_infinitely_wide():
    from scaling_links import Timing, fit_links

    timings = [Timing("all_gather", 2, size, 1.0 / (1 + size)) for size in (10, 100)]
    assert fit_links(timings, 2).links["all_gather"].bytes_per_s == math.inf
