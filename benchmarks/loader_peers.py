"""How other projects' loaders get their tiles on disk and their batches off it.

Each decodes whole tiles, calls the same `loader_tiles.Transform` per sample and collates in torch's worker processes, which
persist; its files are on the local disk and it shuffles. Options are their defaults unless a comment says what was gained.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
from loader_tiles import ONE_HOT, Tile, Transform, peer_tile, peer_tiles, replicate
from loader_work import EPOCH_END, Batches, Loaded, Views, Work
from torch.utils.data import DataLoader, Dataset

from mpmae.eval.torchvision_import import let_torchvision_import
from mpmae.modalities import TARGETS

CHUNK_MB = 64  # size of their files: what litdata and streaming advise


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
        self._path, self._transform, self._as_reference = folder / "tiles.h5", transform, as_reference
        self._rows = json.loads((folder / "tiles_splits.json").read_text())["train"]
        if as_reference:
            self._info = json.loads((folder / "tiles_tile_info.json").read_text())
        else:
            with h5py.File(self._path) as file:
                self._levels = [level.decode() for level in file["metadata"]["S2_type"]]
        self._file: h5py.File | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._file is None:
            self._file = h5py.File(self._path, "r")
        row = self._rows[index]
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


def write_hdf5(work: Work, folder: Path) -> None:
    """The repeated set itself."""
    replicate(work.original, folder, work.repeats)


def open_hdf5(as_reference: bool) -> Callable[..., Batches]:
    """`Hdf5Rows` with torch's random sampler."""

    def open_one(work: Work, folder: Path, num_workers: int, views: Views) -> Batches:
        dataset = Hdf5Rows(folder, work.transform(views), as_reference)
        return torch_loader(dataset, num_workers, work.batch_size, shuffle=True)

    return open_one


def write_litdata(compression: str | None) -> Callable[[Work, Path], None]:
    """litdata's chunks by its own `optimize`, arrays as they are.

    Compressed by sample: whole frames of samples, its default, inflate a frame per sample when the order is random (2,300
    instead of 4,500 tiles/s on one core).
    """

    def write(work: Work, folder: Path) -> None:
        import litdata

        tiles = list(peer_tiles(work.original, work.repeats))
        litdata.optimize(
            tiles.__getitem__,
            inputs=list(range(len(tiles))),
            output_dir=str(folder),
            chunk_bytes=f"{CHUNK_MB}MB",
            compression=compression,
            compression_level="sample" if compression else None,
            num_workers=1,
            start_method="fork",  # its worker shares the decoded tiles
            verbose=False,
        )

    return write


def open_litdata(work: Work, folder: Path, num_workers: int, views: Views) -> Batches:
    """litdata's StreamingDataset and StreamingDataLoader, shuffling.

    batch_decode=1: its default takes a dict of arrays for small nested samples and decodes 256 of them at a time, most of
    them in vain when the order is random (240 instead of 15,000 tiles/s on one core).
    """
    import litdata

    dataset = litdata.StreamingDataset(
        str(folder), shuffle=True, drop_last=True, transform=work.transform(views), batch_decode=1
    )
    return torch_loader(dataset, num_workers, work.batch_size, litdata.StreamingDataLoader)


def import_streaming() -> Any:
    """mosaicml-streaming, which imports torchvision: PyPI's does not import beside a CPU build of torch unaided."""
    let_torchvision_import()
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


def open_mds(work: Work, folder: Path, num_workers: int, views: Views) -> Batches:
    """mosaicml-streaming's StreamingDataset, shuffling; compressed shards are inflated beside themselves on first use."""
    streaming, transform = import_streaming(), work.transform(views)

    class Transformed(streaming.StreamingDataset):
        def __getitem__(self, at):
            return transform(super().__getitem__(at))

    streaming.base.util.clean_stale_shared_memory()
    dataset = Transformed(local=str(folder), shuffle=True, batch_size=work.batch_size)
    return torch_loader(dataset, num_workers, work.batch_size)


def write_webdataset(one_member: bool) -> Callable[[Work, Path], None]:
    """Plain tars: one .npy member per array, or one pickled dict of arrays per tile."""

    def write(work: Work, folder: Path) -> None:
        import webdataset

        folder.mkdir()
        with webdataset.ShardWriter(str(folder / "tiles-%05d.tar"), maxsize=CHUNK_MB << 20, verbose=0) as writer:
            for i, tile in enumerate(peer_tiles(work.original, work.repeats)):
                members = {"pyd": tile} if one_member else {f"{name}.npy": array for name, array in tile.items()}
                writer.write({"__key__": f"{i:08d}", **members})

    return write


def open_webdataset(work: Work, folder: Path, num_workers: int, views: Views) -> Batches:
    """webdataset: shards shuffled and split by worker, samples shuffled within a buffer."""
    import webdataset

    def tile(sample: dict[str, Any]) -> Tile:
        return sample["pyd"] if "pyd" in sample else {n[:-4]: a for n, a in sample.items() if n.endswith(".npy")}

    shards, transform = sorted(map(str, folder.glob("*.tar"))), work.transform(views)
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
    dataset = dataset.shuffle(4 * work.batch_size).decode().map(lambda sample: transform(tile(sample)))
    return torch_loader(dataset, num_workers, work.batch_size)
