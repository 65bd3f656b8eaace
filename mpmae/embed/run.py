"""From tiles to a folder of vectors: read and prepared in threads, encoded on the device, written in parts.

Shapes: N tiles, T windows of an image, B bands, S image side in pixels, D features.
"""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpmae.embed import parquet
from mpmae.embed.folder import EmbeddingFolder, claimed
from mpmae.embed.source import Tiles, TileSource, join_tiles, no_tiles
from mpmae.embed.storage import StoredDtype
from mpmae.eval.encoders import ImageEncoder
from mpmae.eval.windows import window_means
from mpmae.in_order import in_order
from mpmae.shard_tools.progress import Meter

TILES_PER_PART = 4096


@dataclass(frozen=True)
class Done:
    """What `embed` did. num_before: tiles whose vectors were there already. redone: parts that had changed since."""

    num_tiles: int
    num_before: int
    num_without_location: int
    num_without_data: int
    redone: tuple[str, ...]


def embed(
    encoder: ImageEncoder,
    source: TileSource,
    folder: str | Path,
    *,
    dtype: StoredDtype = "float16",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    num_workers: int = 2,
    tiles_per_part: int = TILES_PER_PART,
    origin: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Done:
    """Fill `folder` with the vector of every tile of the source, going on where an earlier call ended.

    Neither order nor content depends on batch_size or num_workers, but for rounding. origin: of the encoder, to be noted in
    the manifest. progress: shown on stderr.
    Raises EmbeddingError as `claimed` and `encode` do, ConfigError without pyarrow, ShardError or DatasetError for tiles
    that cannot be read.
    """
    parquet.require_pyarrow()
    encoder = encoder.eval().to(device)
    facts = _facts(encoder, source, dtype, tiles_per_part, origin or {})
    with claimed(Path(folder), facts) as out:
        num_before = sum(len(out.positions(number)) for number in out.parts)
        with Meter("embed", out.num_tiles, num_done=num_before, enabled=progress) as meter:
            _fill(out, encoder, source, dtype, batch_size, torch.device(device), num_workers, meter)
        parts = out.parts.values()
        return Done(
            out.num_tiles,
            num_before,
            sum(part["num_without_location"] for part in parts),
            sum(part["num_without_data"] for part in parts),
            tuple(out.redone),
        )


def _facts(
    encoder: ImageEncoder, source: TileSource, dtype: StoredDtype, tiles_per_part: int, origin: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "mpmae": importlib.metadata.version("mpmae"),
        "encoder": {
            "title": str(origin.get("checkpoint", encoder.label)),
            "fingerprint": encoder.fingerprint(),
            **encoder.facts,
        },
        "origin": dict(origin),
        "source": {"title": source.title, "fingerprint": source.fingerprint},
        "prepared": dict(source.facts),
        "num_tiles": dict(source.num_tiles),
        "dtype": dtype,
        "num_features": encoder.num_features,
        "num_tiles_per_part": tiles_per_part,
        "classes": {
            column.name: {
                "title": column.title,
                "names": list(column.class_names),
                "colours": list(column.colours),
                "several": column.several,
            }
            for column in source.columns
        },
    }


def _fill(
    out: EmbeddingFolder,
    encoder: ImageEncoder,
    source: TileSource,
    dtype: StoredDtype,
    batch_size: int,
    device: torch.device,
    num_workers: int,
    meter: Meter,
) -> None:
    todo = out.todo()
    for number in (n for n in todo if not len(out.positions(n))):
        _write(out, number, [no_tiles(source.columns)], [np.empty((0, encoder.num_features), np.float32)], dtype, source)
    batches = list(_batches(out, todo, batch_size))

    def requested() -> Iterator[np.ndarray]:
        for number, positions in batches:
            if positions[0] == out.positions(number)[0]:
                following = todo[todo.index(number) : todo.index(number) + 2]
                source.prefetch(np.concatenate([np.asarray(out.positions(n)) for n in following]))
            yield positions

    tiles: list[Tiles] = []
    vectors: list[np.ndarray] = []
    for (number, positions), read in zip(batches, in_order(source.read, requested(), max(num_workers, 1)), strict=True):
        vectors.append(window_means(encoder, read.images, device, batch_size).numpy())
        tiles.append(replace(read, images=()))
        if positions[-1] == out.positions(number)[-1]:
            _write(out, number, tiles, vectors, dtype, source)
            tiles, vectors = [], []
        meter.advance(len(positions))


def _batches(out: EmbeddingFolder, todo: Sequence[int], batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(part, positions) with no batch across parts, so that a part does not depend on where a run began."""
    for number in todo:
        positions = np.asarray(out.positions(number), np.int64)
        for first in range(0, len(positions), batch_size):
            yield number, positions[first : first + batch_size]


def _write(
    out: EmbeddingFolder,
    number: int,
    tiles: Sequence[Tiles],
    vectors: Sequence[np.ndarray],
    dtype: StoredDtype,
    source: TileSource,
) -> None:
    whole = join_tiles(tiles)
    data = parquet.part_bytes(whole, np.concatenate(vectors), dtype, source.columns, out.facts)
    counts = {
        "num_tiles": len(whole),
        "num_without_location": int(np.isnan(whole.locations).any(axis=1).sum()),
        "num_without_data": int((whole.valid_fraction == 0).sum()),
    }
    out.write(number, data, counts)
