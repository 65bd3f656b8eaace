"""Cache tiers: the same bytes at any budget, no reads of what is kept, never more memory than the budget."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mpmae.errors import ConfigError, ShardError
from mpmae.loader import CpuLoader, ShardReader
from mpmae.loader.tiers import BLOCK_BYTES, DeviceTier, HostTier, check_spans, member_positions, num_fitting, span_bytes
from mpmae.modalities import TARGETS
from tests.loader.compare import assert_same_batch


class CountingReader(ShardReader):
    """Remembers which samples were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.was_read: list[int] = []

    def spans(self, sample_ids):
        self.was_read += sample_ids.tolist()
        return super().spans(sample_ids)


@pytest.fixture
def reader(shards_dir):
    return CountingReader(shards_dir, "train")


def total_bytes(reader) -> int:
    return int((-(-span_bytes(reader.index) // BLOCK_BYTES)).sum()) * BLOCK_BYTES


def batches(reader, num_epochs=3, batch_size=7):
    """Random batches, each sample once per epoch, and one with repeats."""
    rng = np.random.default_rng(0)
    for _ in range(num_epochs):
        yield from np.array_split(rng.permutation(len(reader)), len(reader) // batch_size)
    yield np.array([3, 3, 0, 3])


@pytest.mark.parametrize("fraction", [0, 0.003, 0.4, 1, 3])
def test_host_tier(reader, shards_dir, fraction):
    plain = ShardReader(shards_dir, "train")
    budget = int(fraction * total_bytes(reader))
    tier = HostTier(reader, budget)
    assert tier._arena.nbytes == tier.report.kept_bytes <= budget
    for ids in batches(reader):
        for got, expected in zip(tier.spans(ids), plain.spans(ids), strict=True):
            assert np.array_equal(got, expected)
    reads = np.bincount(reader.was_read, minlength=len(reader))
    assert (reads[: tier.report.num_kept] == 1).all()
    assert (reads[tier.report.num_kept :] >= 3).all()
    assert tier.report.num_kept == {0: 0, 1: len(reader), 3: len(reader)}.get(fraction, tier.report.num_kept)
    if fraction == 0.4:
        assert 0.2 * len(reader) < tier.report.num_kept < 0.6 * len(reader)


def test_warm_and_preferred_samples(reader):
    ids = np.array([5, 2, 9, 30])
    tier = HostTier(reader, total_bytes(reader), ids)
    assert (tier.report.num_samples, tier.report.num_kept) == (4, 4)
    tier.warm(batch_size=3)
    assert reader.was_read == ids.tolist()
    tier.spans(ids)
    assert len(reader.was_read) == 4
    few = HostTier(reader, int((-(-span_bytes(reader.index[ids[:2]]) // BLOCK_BYTES)).sum()) * BLOCK_BYTES, ids)
    assert few._slots.kept.tolist() == [5, 2]


def test_the_report_tells_what_does_not_fit(reader):
    report = HostTier(reader, total_bytes(reader) // 2).report
    assert report.kept_bytes <= report.budget_bytes < report.total_bytes
    assert f"keeps {report.num_kept} of {len(reader)} samples" in str(report)
    assert "the rest is read from below" in str(report)
    assert "all of them" in str(HostTier(reader, total_bytes(reader)).report)


def test_a_host_tier_stands_in_for_its_reader(reader, shards_dir):
    tier = HostTier(reader, total_bytes(reader) // 2)
    ids = np.array([4, 11, 30])
    expected = CpuLoader(ShardReader(shards_dir, "train"), TARGETS, 56, seed=1).batch_of(ids)
    for _ in range(2):
        assert_same_batch(CpuLoader(tier, TARGETS, 56, seed=1).batch_of(ids), expected)
    assert len(tier) == len(reader)


def test_many_threads_get_the_right_bytes(reader, shards_dir):
    plain, tier = ShardReader(shards_dir, "train"), HostTier(reader, total_bytes(reader) // 2)
    expected = plain.spans(np.arange(len(plain)))
    orders = [np.random.default_rng(seed).permutation(len(plain)) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for order, spans in zip(orders, pool.map(tier.spans, orders), strict=True):
            assert all(np.array_equal(span, expected[i]) for i, span in zip(order, spans, strict=True))


@pytest.mark.parametrize("fraction", [0, 0.4, 1])
def test_device_tier_packs_the_same_members(reader, shards_dir, fraction):
    plain = ShardReader(shards_dir, "train")
    budget = int(fraction * total_bytes(reader))
    tier = DeviceTier(reader, budget, "cpu")
    assert tier._arena.nbytes == tier.report.kept_bytes <= budget
    for ids in batches(reader):
        staged = tier.stage(ids)
        packed = tier.place(staged)
        assert packed.data.dtype == torch.uint8
        assert packed.data.numel() == staged.num_bytes
        assert (packed.offsets % BLOCK_BYTES == 0).all()
        starts, sizes = member_positions(plain.index[ids]), plain.index["size"][ids]
        for i, span in enumerate(plain.spans(ids)):
            assert staged.scalars[i] == plain.scalars(int(ids[i]))
            for j in range(starts.shape[1]):
                at = packed.offsets[i, j]
                assert packed.sizes[i, j] == sizes[i, j]
                member = packed.data[at : at + sizes[i, j]].numpy()
                assert np.array_equal(member, span[starts[i, j] : starts[i, j] + sizes[i, j]])
    reads = np.bincount(reader.was_read, minlength=len(reader))
    assert (reads[: tier.report.num_kept] == 1).all()
    assert (reads[tier.report.num_kept :] >= 3).all()


def test_what_was_staged_before_it_was_kept(reader):
    """Workers stage ahead of the device: a batch staged before its samples were kept comes out right all the same."""
    tier, ids = DeviceTier(reader, total_bytes(reader), "cpu"), np.array([8, 1, 5])
    expected = reader.spans(ids)
    early, late = tier.stage(ids), tier.stage(ids)
    for staged in (early, late, tier.stage(ids)):
        packed = tier.place(staged)
        for span, start in zip(expected, packed.offsets[:, 0], strict=True):
            assert np.array_equal(packed.data[start : start + len(span)].numpy(), span)
    assert len(tier.stage(ids).fresh) == 0


def test_a_device_tier_on_a_host_tier(reader):
    ids = np.arange(len(reader))
    host = HostTier(reader, total_bytes(reader))
    host.warm()
    tier = DeviceTier(host, total_bytes(reader) // 3, "cpu")
    for _ in range(2):
        tier.place(tier.stage(ids))
    assert len(reader.was_read) == len(reader)


@pytest.mark.parametrize("change", ["order", "size", "grid"])
def test_an_index_that_does_not_fit(reader, change):
    reader.index = reader.index.copy()
    if change == "order":
        reader.index["offset"][4, [1, 2]] = reader.index["offset"][4, [2, 1]]
    elif change == "size":
        reader.index["size"][4, -1] += 1
    else:
        reader.index["offset"][4, 1:] += 1
    with pytest.raises(ShardError, match=r"sample 4 .*members of 1 samples overlap.*mpmae-shards verify"):
        check_spans(reader)


def test_kept_bytes_cannot_be_changed_by_who_reads_them(reader):
    tier = HostTier(reader, total_bytes(reader))
    for _ in range(2):
        (span,) = tier.spans(np.array([3]))
        assert not span.flags.writeable


def fill_host(reader, budget, ids):
    tier = HostTier(reader, budget)
    tier.spans(ids)
    return tier


def fill_device(reader, budget, ids):
    tier = DeviceTier(reader, budget, "cpu")
    tier.place(tier.stage(ids))
    return tier


@pytest.mark.parametrize("fill", [fill_host, fill_device])
def test_shards_that_are_kept_whole_are_not_fetched_again(reader, monkeypatch, fill):
    """Else a remote set larger than its cache on the disk would be downloaded anew in every epoch, for nothing."""
    asked = []
    monkeypatch.setattr(reader, "prefetch", lambda shards: asked.append(list(shards)))
    shards = range(len(reader.manifest.shards("train")))
    assert len(shards) > 2
    first, second = (np.arange(len(reader))[reader.samples_of(shard)] for shard in (0, 1))
    fill(reader, total_bytes(reader), np.concatenate([first, second[1:]])).prefetch(shards)
    fill(reader, total_bytes(reader) // 2, np.arange(len(reader))).prefetch(shards)
    assert asked[0] == list(shards)[1:]
    assert 0 not in asked[1]
    assert asked[1][-1] == shards[-1]


def test_how_many_fit(reader):
    for budget in (0, total_bytes(reader) // 3, 10 * total_bytes(reader)):
        assert num_fitting(reader.index, budget) == HostTier(reader, budget).report.num_kept


def test_more_memory_than_there_is(reader, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}[name])
    with pytest.raises(ConfigError, match=r"host tier: keeps .* but the machine has .* lower data.host_cache_gb"):
        HostTier(reader, total_bytes(reader))

    def no_room(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", no_room)
    with pytest.raises(ConfigError, match=r"device tier: keeps .* lower data.device_cache_gb"):
        DeviceTier(reader, total_bytes(reader), "cpu")
