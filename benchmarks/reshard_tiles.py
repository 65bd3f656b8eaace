"""Real tiles, repeated until there are enough: an MMEarth folder whose chunks are copies of those of another."""

import json
from pathlib import Path

import h5py
import numpy as np


def repeat(source: Path, target: Path, num_tiles: int) -> Path:
    """An MMEarth folder of `num_tiles` tiles, the chunks of `source` byte for byte, all of them in the split `train`."""
    target.mkdir(parents=True)
    with h5py.File(source / f"{source.name}.h5") as old, h5py.File(target / f"{target.name}.h5", "w") as new:
        metadata = old["metadata"][:]
        rows = np.arange(num_tiles) % len(metadata)
        repeated = metadata[rows]
        repeated["tile_id"] = [b"%s_%d" % (tile_id, i) for i, tile_id in enumerate(repeated["tile_id"].tolist())]
        new["metadata"] = repeated
        for name, dataset in old.items():
            if name != "metadata":
                _copy_chunks(dataset, new, name, rows.tolist())
    infos = json.loads((source / f"{source.name}_tile_info.json").read_text())
    old_ids, new_ids = (array["tile_id"].tolist() for array in (metadata[rows], repeated))
    tile_info = {new_id.decode(): infos[old_id.decode()] for old_id, new_id in zip(old_ids, new_ids, strict=True)}
    stats = json.loads((source / f"{source.name}_band_stats.json").read_text())
    for kind, content in (("tile_info", tile_info), ("splits", {"train": list(range(num_tiles))}), ("band_stats", stats)):
        (target / f"{target.name}_{kind}.json").write_text(json.dumps(content))
    return target


def _copy_chunks(dataset: h5py.Dataset, file: h5py.File, name: str, rows: list[int]) -> None:
    options = {"chunks": dataset.chunks, "compression": dataset.compression, "shuffle": dataset.shuffle}
    copy = file.create_dataset(
        name, (len(rows), *dataset.shape[1:]), dataset.dtype, compression_opts=dataset.compression_opts, **options
    )
    rest = (0,) * (dataset.ndim - 1)
    chunks = [dataset.id.read_direct_chunk((row, *rest)) for row in range(len(dataset))]
    for i, row in enumerate(rows):
        filter_mask, data = chunks[row]
        copy.id.write_direct_chunk((i, *rest), data, filter_mask)


def stored_chunks(folder: Path) -> dict[str, list[bytes]]:
    """The bytes of every chunk as they lie in the file, per modality."""
    with h5py.File(folder / f"{folder.name}.h5") as file:
        return {
            name: [bytes(dataset.id.read_direct_chunk((row,) + (0,) * (dataset.ndim - 1))[1]) for row in range(len(dataset))]
            for name, dataset in file.items()
            if name != "metadata"
        }
