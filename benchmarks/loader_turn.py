"""One turn of one case of the loader benchmark, in a process of its own: `loader.py` starts it and reads its last line.

python benchmarks/loader_turn.py '{"case": "mpmae cpu, lz4", "work": {...}, "num_workers": [2, 1], "seconds": 2, ...}'
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from loader_cases import BY_NAME
from loader_tiles import epoch_zero_views
from loader_work import EPOCH_END, SEED, Batches, Case, Work, prepare

from mpmae.loader import ShardReader

WARM_BATCHES = 8  # more than any loader here has ready before it is asked


def rate(batches: Batches, warm_batches: int, seconds: float) -> float:
    """Samples/s after `warm_batches`, over `seconds` or, for a loader that starts its epochs anew, the rest of the epoch."""
    for _ in range(warm_batches):
        next(batches)
    _wait_for_device()
    num, started = 0, time.perf_counter()
    for batch in itertools.takewhile(lambda batch: batch is not EPOCH_END, batches):
        num += len(batch.rows)
        if time.perf_counter() - started > seconds:
            break
    _wait_for_device()
    return num / (time.perf_counter() - started)


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def main() -> None:
    """First batch from the start of the process, a batch for the gate if asked for, then the rate at each worker count."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    paths = {key: Path(options["work"][key]) for key in ("original", "folder")}
    case, work = BY_NAME[options["case"]], Work(**options["work"] | paths)
    folder, most = prepare(case, work), options["num_workers"][0]
    opened = time.monotonic()
    batches = case.open(work, folder, most, None)
    next(batches)
    now = time.monotonic()
    result: dict[str, Any] = {"process_to_first_batch_s": now - options["started"], "open_to_first_batch_s": now - opened}
    if options["gate"]:
        batches.close()
        save_batch(case, work, folder, Path(options["gate"]))
        batches = case.open(work, folder, most, None)
    result["samples_per_s"] = {}
    for num_workers in options["num_workers"]:
        if num_workers != most:
            batches = case.open(work, folder, num_workers, None)
        warm_batches = max(WARM_BATCHES, case.warm_epochs * (work.num_tiles // work.batch_size))
        result["samples_per_s"][num_workers] = rate(batches, warm_batches, options["seconds"])
        batches.close()
    print(json.dumps(result))


def save_batch(case: Case, work: Work, folder: Path, path: Path) -> None:
    """A first batch with the views that our loaders give in epoch 0."""
    reader = ShardReader(work.folder / "shards-raw", "train")
    views = epoch_zero_views(SEED, len(reader), reader.manifest.tile_size_px, work.img_size_px)
    by_row = views.copy()
    by_row[reader.index["row"].astype(int)] = views
    batches = case.open(work, folder, 1, by_row)
    batch = next(batches)
    batches.close()
    torch.save({"rows": batch.rows, "values": batch.values, "valid": batch.valid}, path)


if __name__ == "__main__":
    main()
