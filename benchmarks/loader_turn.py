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
from loader_cases import BY_NAME, import_needs
from loader_gate import gate_views
from loader_work import EPOCH_END, Batches, Case, Loaded, Views, Work, prepare

Timings = dict[str, Any]
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


def first_batch(case: Case, work: Work, num_workers: int, views: Views, started: float) -> tuple[Loaded, Batches, Timings]:
    """A loader's first batch, the loader, and the seconds it took since the process `started` and since it was opened."""
    folder = prepare(case, work)
    import_needs(case)
    opened = time.monotonic()
    batches = case.open(work, folder, num_workers, views)
    batch = next(batches)
    now = time.monotonic()
    return batch, batches, {"process_to_first_batch_s": now - started, "open_to_first_batch_s": now - opened}


def main() -> None:
    """A batch for the gate, or the first batch's times and then the rate at each number of workers."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    paths = {key: Path(options["work"][key]) for key in ("original", "folder")}
    case, work = BY_NAME[options["case"]], Work(**options["work"] | paths)
    if "gate" in options:
        batch, batches, result = first_batch(case, work, 1, gate_views(work), options["started"])
        torch.save({"rows": batch.rows, "values": batch.values, "valid": batch.valid}, options["gate"])
        batches.close()
    else:
        first, *others = options["num_workers"]
        _, batches, result = first_batch(case, work, first, None, options["started"])
        warm_batches = max(WARM_BATCHES, case.warm_epochs * (work.num_tiles // work.batch_size))
        result["samples_per_s"] = {first: rate(batches, warm_batches, options["seconds"])}
        batches.close()
        for num_workers in others:
            batches = case.open(work, prepare(case, work), num_workers, None)
            result["samples_per_s"][num_workers] = rate(batches, warm_batches, options["seconds"])
            batches.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
