"""What an epoch's order costs and how well it mixes: classes per batch of each order beside a true permutation's.

python benchmarks/order.py                 (1.2M tiles in 300 shards, no pixels; writes a record)
python benchmarks/order.py --no-record

Shapes: n samples, B batch size, b batches, C classes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import clean_commit, spread, write_record

from mpmae.counter_rng import Stream, random_bits
from mpmae.loader import ExactOrder, TrainOrder, WindowOrder
from mpmae.shard_files import load_manifest
from mpmae.shard_format import MANIFEST_NAME, Manifest, ShardEntry, SourceInfo

NUM_SHARDS, SHARD_SIZE = 300, 4000
BATCH_SIZE = 4096
NUM_CLASSES = 14
WINDOWS = (1, 4, 16)
BUFFERS = (1000, 10_000)
COST_WINDOW = 16


def sorted_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """Class ids in order, of equal shares: int64 [n]. In shards, most hold a single class."""
    return np.arange(num_samples) * num_classes // num_samples


def built_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """The same classes spread over the shards as `mpmae-shards build` spreads a sorted source: int64 [n]."""
    keys = random_bits(0, Stream.SHARD_ORDER, 0, np.arange(num_samples))[:, 0]
    return sorted_labels(num_samples, num_classes)[np.argsort(keys, kind="stable")]


def buffer_shuffle(ids: np.ndarray, size: int, seed: int) -> np.ndarray:
    """What a shuffle buffer of `size` samples makes of a stream: each that leaves is drawn from those that are there."""
    rng = np.random.default_rng(seed)
    buffer, shuffled = ids[:size].tolist(), []
    for slot, incoming in zip(rng.integers(size, size=len(ids) - size).tolist(), ids[size:].tolist(), strict=True):
        shuffled.append(buffer[slot])
        buffer[slot] = incoming
    return np.array([*shuffled, *rng.permutation(buffer)])


def class_mix(ids: np.ndarray, labels: np.ndarray, batch_size: int) -> dict[str, float]:
    """How far the class shares of an epoch's whole batches are from the set's, means over the batches.

    ids, labels: [n]. total_variation: half the summed distance of the shares, 0..1. chi_square: Pearson's statistic by its
    degrees of freedom, corrected for drawing without replacement: 1 for a true permutation. distinct_classes: of C.
    """
    num_samples, num_classes = len(ids), int(labels.max()) + 1
    num_batches = num_samples // batch_size
    batch = np.repeat(np.arange(num_batches), batch_size)
    counts = np.bincount(batch * num_classes + labels[ids[: len(batch)]], minlength=num_batches * num_classes)
    counts = counts.reshape(num_batches, num_classes)
    expected = batch_size * np.bincount(labels, minlength=num_classes) / num_samples
    correction = (num_samples - 1) / (num_samples - batch_size)
    chi_square = ((counts - expected) ** 2 / expected).sum(1) / (num_classes - 1) * correction
    return {
        "total_variation": float(np.abs(counts - expected).sum(1).mean() / (2 * batch_size)),
        "chi_square": float(chi_square.mean()),
        "distinct_classes": float((counts > 0).sum(1).mean()),
    }


def met_again(first: np.ndarray, second: np.ndarray, batch_size: int) -> float:
    """Of the pairs of samples that share a batch of one epoch, the fraction that share one of another epoch too.

    first, second: ids [n] of the epochs. (B - 1) / (n - 1) for true permutations.
    """
    num_batches = len(first) // batch_size
    place = np.full(len(first), num_batches)
    place[second[: num_batches * batch_size]] = np.repeat(np.arange(num_batches), batch_size)
    cell = np.repeat(np.arange(num_batches), batch_size) * (num_batches + 1) + place[first[: num_batches * batch_size]]
    together = np.bincount(cell, minlength=num_batches * (num_batches + 1)).reshape(num_batches, -1)[:, :num_batches]
    return float((together * (together - 1)).sum() / (num_batches * batch_size * (batch_size - 1)))


def epochs(num_shards: int, shard_size: int, epoch: int) -> dict[str, Callable[[], np.ndarray]]:
    """An epoch's ids [n] by order, made on call: true permutation, our orders, and buffers over permuted shards."""
    sizes = (shard_size,) * num_shards
    num_samples = sum(sizes)
    orders = {"exact": ExactOrder(num_samples)}
    orders |= {f"window, {w} shard{'s' * (w > 1)}": WindowOrder(sizes, w) for w in WINDOWS}
    streamed = np.arange(num_samples).reshape(num_shards, shard_size)

    def buffered(size: int) -> np.ndarray:
        return buffer_shuffle(np.random.default_rng(epoch).permutation(streamed).ravel(), size, epoch)

    return {
        "true permutation": lambda: np.random.default_rng(epoch).permutation(num_samples),
        **{name: lambda order=order: order.epoch(0, epoch) for name, order in orders.items()},
        **{f"buffer, {size:,} samples": lambda size=size: buffered(size) for size in BUFFERS},
    }


def quality(num_shards: int, shard_size: int, num_classes: int, batch_size: int, epoch: int = 0) -> dict[str, Any]:
    """mix: `class_mix` by how the classes lie in the shards and by order. met_again: by order, this epoch and the next."""
    num_samples = num_shards * shard_size
    made, following = (
        {name: make() for name, make in epochs(num_shards, shard_size, e).items()} for e in (epoch, epoch + 1)
    )
    labels = {"as built": built_labels(num_samples, num_classes), "sorted": sorted_labels(num_samples, num_classes)}
    return {
        "mix": {name: {o: class_mix(ids, of, batch_size) for o, ids in made.items()} for name, of in labels.items()},
        "met_again": {name: met_again(ids, following[name], batch_size) for name, ids in made.items()},
    }


def write_manifest(folder: Path, num_shards: int, shard_size: int) -> None:
    """A manifest of shards that are not there."""
    shards = tuple(
        ShardEntry(
            name=f"train-{i:05d}.tar", num_bytes=10**9, num_samples=shard_size, sha256="0" * 64, index_sha256="0" * 64
        )
        for i in range(num_shards)
    )
    manifest = Manifest(
        source=SourceInfo(name="no pixels", fingerprint="0" * 64, num_tiles=num_shards * shard_size),
        tile_size_px=64, codec="raw", seed=0, pixels=(), scalars=(), band_stats={}, splits={"train": shards},
    )  # fmt: skip
    (folder / MANIFEST_NAME).write_text(manifest.dump())


def memory_bytes(field: str) -> int:
    """A field of this process's /proc status, such as VmHWM (the peak) or VmRSS."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def epoch_cost(folder: Path, mode: str) -> dict[str, float]:
    """Seconds and memory from a manifest on disk to an epoch's first global batch, in this fresh process."""
    before = memory_bytes("VmRSS")
    started = time.perf_counter()
    sizes = tuple(shard.num_samples for shard in load_manifest(folder).shards("train"))
    order = ExactOrder(sum(sizes)) if mode == "exact" else WindowOrder(sizes, COST_WINDOW)
    loaded = time.perf_counter()
    TrainOrder(order, BATCH_SIZE, seed=0).global_batch(0)
    ended = time.perf_counter()
    peak = memory_bytes("VmHWM")
    return {
        "manifest_s": loaded - started,
        "order_s": ended - loaded,
        "peak_bytes": peak,
        "added_bytes": peak - before,
    }


def measured(mode: str, folder: str) -> dict[str, float]:
    """`epoch_cost` of a process of its own."""
    command = [sys.executable, __file__, "--measure", mode, folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def costs(num_shards: int, shard_size: int, repeats: int) -> dict[str, Any]:
    """`epoch_cost` by mode: spreads of the seconds, the largest memory; each repeat in a process of its own."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), num_shards, shard_size)
        for mode in ("exact", "window"):
            runs = [measured(mode, folder) for _ in range(repeats)]
            result[mode] = {name: spread([run[name] for run in runs]) for name in ("manifest_s", "order_s")}
            result[mode] |= {name: max(run[name] for run in runs) for name in ("peak_bytes", "added_bytes")}
    return result


def main() -> None:
    """Measure mixing and cost and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        mode, folder = options.measure
        print(json.dumps(epoch_cost(Path(folder), mode)))
        return
    if not options.no_record:
        clean_commit()
    results = {
        **quality(NUM_SHARDS, SHARD_SIZE, NUM_CLASSES, BATCH_SIZE),
        "cost": costs(NUM_SHARDS, SHARD_SIZE, options.repeats),
    }
    print(json.dumps(results, indent=1))
    if not options.no_record:
        case = {"num_shards": NUM_SHARDS, "shard_size": SHARD_SIZE, "num_classes": NUM_CLASSES, "repeats": options.repeats}
        case |= {"batch_size": BATCH_SIZE, "cost_window_shards": COST_WINDOW}
        print(f"record: {write_record('order', case, results)}")


if __name__ == "__main__":
    main()
