"""The cases of the loader benchmark: this project's loaders and the peers."""

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_peers import (
    import_streaming,
    open_hdf5,
    open_litdata,
    open_mds,
    open_webdataset,
    write_hdf5,
    write_litdata,
    write_mds,
    write_webdataset,
)
from loader_work import SEED, Batches, Case, Loaded, Views, Work, prepare
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mpmae.loader import CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.modalities import TARGETS
from mpmae.shard_tools.build import build


def write_shards(codec: str) -> Callable[[Work, Path], None]:
    """Our shards."""

    def write(work: Work, folder: Path) -> None:
        build(prepare(HDF5, work), folder, codec=codec, seed=SEED, progress=False)

    return write


def open_ours(work: Work, folder: Path, num_workers: int, views: Views) -> Batches:
    """`CpuLoader` in the order of a training run."""
    reader = ShardReader(folder, "train")
    loader = CpuLoader(reader, TARGETS, work.img_size_px, seed=SEED, num_workers=num_workers)
    return training_batches(loader, reader, work.batch_size)


class InProcesses(IterableDataset):
    """`open_ours` in torch's worker processes instead of threads: each worker makes its share of the batches, alone."""

    def __init__(self, work: Work, folder: Path):
        self._work, self._folder = work, folder

    def __iter__(self) -> Batches:
        worker = get_worker_info()
        return itertools.islice(open_ours(self._work, self._folder, 1, None), worker.id, None, worker.num_workers)


def open_in_processes(work: Work, folder: Path, num_workers: int, views: Views) -> Batches:
    """The same batches as `open_ours`, through shared memory."""
    yield from DataLoader(InProcesses(work, folder), batch_size=None, num_workers=num_workers)


def open_dali(device_id: int | None, device_budget_bytes: int = 0) -> Callable[..., Batches]:
    """`DaliLoader` in the same order; on a GPU with a device tier of `device_budget_bytes`."""

    def open_one(work: Work, folder: Path, num_workers: int, views: Views) -> Batches:
        from mpmae.loader.dali import DaliLoader

        reader = ShardReader(folder, "train")
        options = {"device_id": device_id, "device_budget_bytes": device_budget_bytes}
        loader = DaliLoader(reader, TARGETS, work.img_size_px, seed=SEED, num_workers=num_workers, **options)
        return training_batches(loader, reader, work.batch_size)

    return open_one


def training_batches(loader: Any, reader: ShardReader, batch_size: int) -> Batches:
    """One rank's batches without end; our epochs follow on without a start of their own."""
    order = TrainOrder(ExactOrder(len(reader)), batch_size, SEED)
    rows = torch.from_numpy(reader.index["row"].astype(np.int64))
    for _, batch in loader.training(order, plan_batches(batch_size, None, 1), 0, 0):
        rows = rows.to(batch.sample_ids.device)  # looked up where the ids are: fetching them would wait for the GPU
        yield Loaded(rows[batch.sample_ids], batch.values, batch.valid)


HDF5 = Case("HDF5, read as the reference does", "tiles", write_hdf5, open_hdf5(True))
RAW = Case("mpmae cpu, raw", "shards-raw", write_shards("raw"), open_ours)
LZ4 = Case("mpmae cpu, lz4", "shards-lz4", write_shards("lz4"), open_ours)
CASES = (
    LZ4,
    RAW,
    Case("mpmae cpu, zstd", "shards-zstd", write_shards("zstd"), open_ours),
    Case("mpmae cpu, lz4, processes not threads", "shards-lz4", write_shards("lz4"), open_in_processes),
    Case("mpmae DALI without a GPU, lz4", "shards-lz4", write_shards("lz4"), open_dali(None), ("nvidia.dali",)),
    Case("mpmae DALI without a GPU, raw", "shards-raw", write_shards("raw"), open_dali(None), ("nvidia.dali",)),
    Case("litdata, raw", "litdata", write_litdata(None), open_litdata, ("litdata",)),
    Case("litdata, zstd", "litdata-zstd", write_litdata("zstd"), open_litdata, ("litdata", "zstd")),
    Case("mosaicml-streaming, raw", "mds", write_mds(None), open_mds, ("streaming",)),
    Case("mosaicml-streaming, zstd", "mds-zstd", write_mds("zstd"), open_mds, ("streaming",)),
    Case("webdataset, one member", "webdataset-one", write_webdataset(True), open_webdataset, ("webdataset",)),
    Case("webdataset, npy members", "webdataset", write_webdataset(False), open_webdataset, ("webdataset",)),
    Case("HDF5, plain rows", "tiles", write_hdf5, open_hdf5(False)),
    HDF5,
)
DEVICE_BUDGET_BYTES = 32 << 30
GPU_CASES = tuple(
    Case(
        f"mpmae DALI on the GPU, {codec}{', device tier' if budget else ''}",
        f"shards-{codec}",
        write_shards(codec),
        open_dali(0, budget),
        ("nvidia.dali",),
        warm_epochs=1 if budget else 0,
    )
    for codec in ("lz4", "raw")
    for budget in (0, DEVICE_BUDGET_BYTES)
)
BY_NAME = {case.name: case for case in (*CASES, *GPU_CASES)}


def import_needs(case: Case) -> None:
    """Import the packages that a case needs."""
    for name in case.needs:
        if name == "streaming":
            import_streaming()
        else:
            importlib.import_module(name)
