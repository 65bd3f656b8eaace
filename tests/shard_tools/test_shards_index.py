"""A lost index comes back byte for byte, or the command says why not."""

import json

import h5py
import numpy as np
import pytest

from mpmae.shard_files import load_manifest
from mpmae.shard_format import index_bytes, index_name
from mpmae.shard_tools.index import rebuild_indices
from mpmae.shard_tools.subset import Wanted, subset
from mpmae.shard_tools.verify import verify

LOST = "train-00001.index.npy"


def test_nothing_to_do(own_shards):
    report = rebuild_indices(own_shards)
    assert (report.made, report.problems) == ([], [])


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_lost_indices_come_back(num_lost, with_source, own_shards, source_32):
    paths = [own_shards / index_name(shard.name) for shard in load_manifest(own_shards).shards("train")][:num_lost]
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    (own_shards / "train-00002.idx").unlink()
    (own_shards / "val-00000.idx").write_text("wrong")
    report = rebuild_indices(own_shards, source_32 if with_source else None)
    assert report.problems == []
    assert sorted(report.made) == sorted([*(path.name for path in paths), "train-00002.idx", "val-00000.idx"])
    assert [path.read_bytes() for path in paths] == before
    assert verify(own_shards).ok


def test_a_damaged_index_is_replaced(own_shards):
    before = (own_shards / LOST).read_bytes()
    (own_shards / LOST).write_bytes(before[:-1])
    assert rebuild_indices(own_shards).made == [LOST]
    assert (own_shards / LOST).read_bytes() == before


def test_rows_that_do_not_follow_need_the_source(own_shards, source_32):
    for name in (LOST, "val-00000.index.npy"):
        (own_shards / name).unlink()
    first, second = rebuild_indices(own_shards).problems
    assert LOST in first
    assert "give --source" in first
    assert "val-00000" in second
    assert rebuild_indices(own_shards, source_32).made == [LOST, "val-00000.index.npy"]


def test_a_part_of_a_source_needs_it(built_32, source_32, tmp_path):
    subset(built_32, tmp_path / "part", Wanted(splits=("train",)))
    (tmp_path / "part/train-00000.index.npy").unlink()
    assert "give --source" in rebuild_indices(tmp_path / "part").problems[0]
    assert rebuild_indices(tmp_path / "part", source_32).made == ["train-00000.index.npy"]


def test_another_source(own_shards, own_source):
    (own_shards / LOST).unlink()
    with h5py.File(own_source / "tiny.h5", "r+") as file:
        file["metadata"][...] = file["metadata"][:][::-1]
    (problem,) = rebuild_indices(own_shards, own_source).problems
    assert "made from the tar, it is not the manifest's" in problem
    assert not (own_shards / LOST).exists()


def test_a_tar_that_changed(own_shards):
    (own_shards / LOST).unlink()
    data = bytearray((own_shards / "train-00001.tar").read_bytes())
    data[1000] ^= 1
    (own_shards / "train-00001.tar").write_bytes(data)
    (problem,) = rebuild_indices(own_shards).problems
    assert LOST in problem
    assert "restore the tar first" in problem
    (own_shards / "train-00001.tar").unlink()
    assert "cannot be read" in rebuild_indices(own_shards).problems[0]


def test_what_differs_is_told(own_shards):
    rows = np.load(own_shards / LOST)
    rows["presence"][1] ^= 1
    (own_shards / LOST).write_bytes(index_bytes(rows))
    tree = json.loads((own_shards / "manifest.json").read_text())
    tree["splits"]["train"][1]["index_sha256"] = "0" * 64
    (own_shards / "manifest.json").write_text(json.dumps(tree))
    (problem,) = rebuild_indices(own_shards).problems
    assert "presence differ from the file there, first in sample 1" in problem
