"""How each loader of the benchmark gets its tiles on disk and its batches off it: ours and the peers, one class each.

Every peer decodes whole tiles, calls the same `loader_tiles.Transform` per sample and collates in torch's worker processes,
which persist; its files are on the local disk and it shuffles. Ours run threads.

Shapes: B batch size, the rest as in `mpmae.loader.Batch`.
"""

import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import json
import numpy as np
import torch
from loader_tiles import ONE_HOT, PIXELS, VECTORS, Tile, Transform, peer_tile, peer_tiles
from torch.utils.data import DataLoader, Dataset

from mpmae.loader import CpuLoader, ShardReader, TrainOrder, plan_batches
from mpmae.modalities import TARGETS
from mpmae.shard_tools.build import build
from mpmae.shard_tools.source import MMEarthSource

SEED = 0
CHUNK_MB = 64  # size of the peers' files: what litdata and streaming advise


class Loaded(NamedTuple):
    """A batch: rows int64 [B] in the repeated set, values and valid as in `mpmae.loader.Batch`."""

    rows: torch.Tensor
    values: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """Where things are and what is loaded. original: the real tiles. tiles: the repeated set, an MMEarth folder."""

    original: Path
    folder: Path
    repeats: int
    batch_size: int
    img_size_px: int

    @property
    def tiles(self) -> Path:
        """The repeated set."""
        return self.folder / "tiles"


EPOCH_END = None
Batches = Iterator[Loaded | None]
"""Batches epoch after epoch, EPOCH_END between two: a peer starts an epoch anew, which a benchmark's short epochs must not
charge it for."""


@dataclass(frozen=True)
class Case:
    """One loader with its files. write: make them. open: batches with a number of workers and a transform."""

    name: str
    ours: bool
    files: str
    write: Callable[[Work, Path], None]
    open: Callable[[Work, Path, int, Transform], Batches]
    needs: tuple[str, ...] = ()
    note: str = field(default="")

    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def prepare(case: Case, work: Work) -> Path:
    """The folder of the case's files, written unless they are there."""
    folder = work.folder / case.files
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        case.write(work, unfinished)
        unfinished.rename(folder)
    return folder


def write_shards(codec: str) -> Callable[[Work, Path], None]:
    """Our shards."""
    return lambda work, folder: build(work.tiles, folder, codec=codec, seed=SEED, modalities=TARGETS, progress=False)


def open_ours(work: Work, folder: Path, num_workers: int, transform: Transform) -> Batches:
    """`CpuLoader` in the order of a training run; it draws its own views (those of `epoch_zero_views` in epoch 0)."""
    reader = ShardReader(folder, "train")
    loader = CpuLoader(reader, TARGETS, work.img_size_px, seed=SEED, num_workers=num_workers)
    return training_batches(loader, reader, work.batch_size)


def open_dali(device_id: int | None, device_budget_bytes: int = 0) -> Callable[..., Batches]:
    """`DaliLoader` in the same order; on a GPU with a device tier of `device_budget_bytes`."""

    def open_one(work: Work, folder: Path, num_workers: int, transform: Transform) -> Batches:
        from mpmae.loader.dali import DaliLoader

        reader = ShardReader(folder, "train")
        options = {"device_id": device_id, "device_budget_bytes": device_budget_bytes}
        loader = DaliLoader(reader, TARGETS, work.img_size_px, seed=SEED, num_workers=num_workers, **options)
        return training_batches(loader, reader, work.batch_size)

    return open_one


def training_batches(loader: Any, reader: ShardReader, batch_size: int) -> Batches:
    """One rank's batches without end; our epochs follow on without a start of their own."""
    order = TrainOrder(len(reader), batch_size, SEED)
    rows = torch.from_numpy(reader.index["row"].astype(np.int64))
    for _, batch in loader.training(order, plan_batches(batch_size, None, 1), 0, 0):
        yield Loaded(rows[batch.sample_ids.cpu()], batch.values, batch.valid)


def torch_loader(dataset: Iterable, num_workers: int, batch_size: int, kind: type = DataLoader, **options) -> Batches:
    """Batches of torch's DataLoader, or of a `kind` of it."""
    loader = kind(
        dataset, batch_size=batch_size, num_workers=num_workers, persistent_workers=True, drop_last=True, **options
    )
    while True:
        for batch in loader:
            yield Loaded(batch["row"], batch["values"], batch["valid"])
        yield EPOCH_END


class Hdf5Rows(Dataset):
    """An MMEarth HDF5 file row by row through h5py, opened by each worker on its first sample.

    as_reference: read as MMEarth-train's dataset does (`mmearth_dataset.py`, commit 0156ef6): a row of `metadata` for the
    tile's id, its product level from the JSON of tile information, and each modality by row and list of band numbers.
    Without it, metadata is read once and each modality is one plain slice.
    """

    def __init__(self, folder: Path, transform: Transform, as_reference: bool):
        self._folder, self._transform, self._as_reference = folder, transform, as_reference
        with MMEarthSource(folder, TARGETS) as source:
            self._rows = source.splits["train"]
            self._levels = [level.decode() for level in source.product_levels]
        self._info = json.loads((folder / f"{folder.name}_tile_info.json").read_text()) if as_reference else None
        self._file: h5py.File | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._file is None:
            self._file = h5py.File(self._folder / f"{self._folder.name}.h5", "r")
        row = int(self._rows[index])
        tile = self._read_as_reference(row) if self._as_reference else self._read(row)
        return self._transform(tile)

    def _read(self, row: int) -> Tile:
        values = {name: self._file[name][row] for name in TARGETS}
        return peer_tile(values, self._levels[row], row)

    def _read_as_reference(self, row: int) -> Tile:
        tile_id = self._file["metadata"][row][0].decode()
        values = {}
        for name in TARGETS:
            data = self._file[name]
            values[name] = data[row, ...] if name in ONE_HOT else data[row, list(range(data.shape[1])), ...]
        return peer_tile(values, self._info[tile_id]["S2_type"], row)


def link_hdf5(work: Work, folder: Path) -> None:
    """The repeated set itself."""
    folder.mkdir()
    (folder / "tiles").symlink_to(work.tiles.resolve())


def open_hdf5(as_reference: bool) -> Callable[..., Batches]:
    """`Hdf5Rows` with torch's random sampler."""

    def open_one(work: Work, folder: Path, num_workers: int, transform: Transform) -> Batches:
        dataset = Hdf5Rows(folder / "tiles", transform, as_reference)
        return torch_loader(dataset, num_workers, work.batch_size, shuffle=True)

    return open_one


def write_litdata(compression: str | None) -> Callable[[Work, Path], None]:
    """litdata's chunks by its own `optimize`, arrays as they are."""

    def write(work: Work, folder: Path) -> None:
        import litdata

        tiles = list(peer_tiles(work.original, work.repeats))
        litdata.optimize(
            tiles.__getitem__,
            inputs=list(range(len(tiles))),
            output_dir=str(folder),
            chunk_bytes=f"{CHUNK_MB}MB",
            compression=compression,
            num_workers=1,
            start_method="fork",  # the workers share the decoded tiles
            verbose=False,
        )

    return write


def open_litdata(work: Work, folder: Path, num_workers: int, transform: Transform) -> Batches:
    """litdata's StreamingDataset and StreamingDataLoader, shuffling."""
    import litdata

    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=transform)
    return torch_loader(dataset, num_workers, work.batch_size, litdata.StreamingDataLoader)


def import_streaming() -> Any:
    """mosaicml-streaming, which imports torchvision, whose wheel on PyPI is built for CUDA.

    Beside a CPU build of torch its operators cannot load, yet it registers their output shapes; declared first, it can.
    """
    if not torch.version.cuda and "+cpu" not in metadata.version("torchvision"):
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming

    return streaming


def write_mds(compression: str | None) -> Callable[[Work, Path], None]:
    """mosaicml-streaming's MDS shards, arrays of static dtype and shape."""

    def write(work: Work, folder: Path) -> None:
        streaming = import_streaming()
        tiles = peer_tiles(work.original, work.repeats)
        first = next(tiles)
        columns = {name: f"ndarray:{array.dtype.name}:{','.join(map(str, array.shape))}" for name, array in first.items()}
        with streaming.MDSWriter(
            out=str(folder), columns=columns, compression=compression, size_limit=CHUNK_MB << 20
        ) as writer:
            for tile in itertools.chain([first], tiles):
                writer.write(tile)

    return write


def open_mds(work: Work, folder: Path, num_workers: int, transform: Transform) -> Batches:
    """mosaicml-streaming's StreamingDataset, shuffling; compressed shards are inflated beside themselves on first use."""
    streaming = import_streaming()

    class Transformed(streaming.StreamingDataset):
        def __getitem__(self, at):
            return transform(super().__getitem__(at))

    streaming.base.util.clean_stale_shared_memory()
    dataset = Transformed(local=str(folder), shuffle=True, batch_size=work.batch_size)
    return torch_loader(dataset, num_workers, work.batch_size)


def write_webdataset(work: Work, folder: Path) -> None:
    """Plain tars with one .npy member per array."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "tiles-%05d.tar"), maxsize=CHUNK_MB << 20, verbose=0) as writer:
        for i, tile in enumerate(peer_tiles(work.original, work.repeats)):
            writer.write({"__key__": f"{i:08d}", **{f"{name}.npy": array for name, array in tile.items()}})


def open_webdataset(work: Work, folder: Path, num_workers: int, transform: Transform) -> Batches:
    """webdataset: shards shuffled and split by worker, samples shuffled within a buffer."""
    import webdataset

    names = (*PIXELS, "vectors", "ids")
    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
        .shuffle(4 * work.batch_size)
        .decode()
        .map(lambda sample: transform({name: sample[f"{name}.npy"] for name in names}))
    )
    return torch_loader(dataset, num_workers, work.batch_size)


_CPU = "ours, cpu loader"
CASES = (
    Case(f"{_CPU}, lz4", True, "shards-lz4", write_shards("lz4"), open_ours),
    Case(f"{_CPU}, raw", True, "shards-raw", write_shards("raw"), open_ours),
    Case(f"{_CPU}, zstd", True, "shards-zstd", write_shards("zstd"), open_ours),
    Case("ours, DALI on the CPU, lz4", True, "shards-lz4", write_shards("lz4"), open_dali(None), ("nvidia.dali",)),
    Case("ours, DALI on the CPU, raw", True, "shards-raw", write_shards("raw"), open_dali(None), ("nvidia.dali",)),
    Case("litdata", False, "litdata", write_litdata(None), open_litdata, ("litdata",)),
    Case("litdata, zstd", False, "litdata-zstd", write_litdata("zstd"), open_litdata, ("litdata", "zstd")),
    Case("mosaicml-streaming", False, "mds", write_mds(None), open_mds, ("streaming",)),
    Case("mosaicml-streaming, zstd", False, "mds-zstd", write_mds("zstd"), open_mds, ("streaming",)),
    Case("webdataset", False, "webdataset", write_webdataset, open_webdataset, ("webdataset",)),
    Case("HDF5, plain rows", False, "hdf5", link_hdf5, open_hdf5(False)),
    Case("HDF5, read as the reference does", False, "hdf5", link_hdf5, open_hdf5(True)),
)
BY_NAME = {case.name: case for case in CASES}
