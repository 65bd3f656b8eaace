"""What bounds a loader on this machine, one thread, measured in one process: memory, system calls, inflation."""

import time
from collections.abc import Callable
from pathlib import Path

import cramjam
import numpy as np

from mpmae.loader import ShardReader

NUM_SAMPLES = 256
COPY_BYTES = 256 << 20


def limits(lz4_folder: Path, raw_folder: Path, delivered_bytes: int, batch_size: int) -> dict[str, float]:
    """Tiles/s of each step by itself, and what it moves in GB/s.

    delivered_bytes: of one sample's tensors.
    """
    packed, plain = ShardReader(lz4_folder, "train"), ShardReader(raw_folder, "train")
    ids = np.random.default_rng(0).permutation(len(packed))[:NUM_SAMPLES]
    source, target = np.ones(COPY_BYTES, np.uint8), np.ones(COPY_BYTES, np.uint8)
    copy = COPY_BYTES / _seconds(lambda: np.copyto(target, source))
    found = {"copy GB/s": copy / 1e9, "copy of a sample's tensors, tiles/s": copy / delivered_bytes}
    fresh = _seconds(lambda: np.empty(batch_size * delivered_bytes, np.uint8).fill(1))
    found["write to fresh memory, tiles/s"] = batch_size / fresh
    for name, reader in (("lz4", packed), ("raw", plain)):
        found[f"pread {name}, tiles/s"] = len(ids) / _seconds(lambda reader=reader: [len(s) for s in reader.spans(ids)])
    blocks = lz4_blocks(packed, ids)
    decoded = sum(num_bytes for _, num_bytes in blocks)
    target = np.empty(max(num_bytes for _, num_bytes in blocks), np.uint8)

    def inflate() -> None:
        for block, num_bytes in blocks:
            cramjam.lz4.decompress_block_into(block, target[:num_bytes])

    seconds = _seconds(inflate)
    return found | {"LZ4 inflate GB/s": decoded / seconds / 1e9, "LZ4 inflate, tiles/s": len(ids) / seconds}


def lz4_blocks(reader: ShardReader, sample_ids: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Every LZ4 member of the samples: its bytes and its size inflated."""
    blocks = []
    for sample_id, span in zip(sample_ids, reader.spans(sample_ids), strict=True):
        row = reader.index[sample_id]
        for i, entry in enumerate(reader.manifest.pixels):
            if entry.codec == "lz4":
                start = int(row["offset"][i] - row["offset"][0])
                num_bytes = int(np.prod(entry.shape)) * np.dtype(entry.dtype).itemsize
                blocks.append((span[start : start + int(row["size"][i])], num_bytes))
    return blocks


def _seconds(action: Callable[[], object], repeats: int = 3) -> float:
    action()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return min(taken)
