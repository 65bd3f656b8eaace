"""The scaling model: fitted to this machine, checked on it, and what it predicts for clusters of GPUs.

python benchmarks/scaling.py                     (writes a record; about 5 minutes on two idle cores)
python benchmarks/scaling.py --no-record --quick (a smoke test: figures of no worth)

Links: alpha and beta of gloo's collectives at 2, 3 and 4 ranks. Compute: forward, backward and update of each model and
engine on one rank, at micro batches other than the checked one. Check: whole steps at 1, 2 and 4 ranks, none of which the
fit has seen. Predictions take nothing from these but the loader's rate a core, which is that of the newest loader record:
compute on GPUs is a roofline from datasheets (`scaling_hardware.py`).
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any, NamedTuple

from engine_cases import Case, absent
from ranks import preload, run_ranks
from record import clean_commit, load_records, write_record
from results_scaling import report
from scaling_check import check, compute_summary, fabric_of, link_summary, workload_of
from scaling_hardware import assumptions
from scaling_measure import Sizes, StepsWanted, time_collectives, time_steps, timings
from scaling_predict import predictions

from mpmae.models.presets import list_mpmae

WHAT, LOADER_CASE = "scaling model", "mpmae cpu, lz4"


class Plan(NamedTuple):
    """What is measured: cases (model, engine), fitted at `fit_batches` on one rank, checked at `check_batch` on `ranks`."""

    cases: tuple[tuple[str, str], ...]
    ranks: tuple[int, ...]
    check_batch: int
    fit_batches: tuple[int, ...]
    steps: int
    link_ranks: tuple[int, ...]
    sizes: Sizes


FULL = Plan(
    (("atto", "ddp"), ("tiny", "ddp"), ("tiny", "zero2"), ("tiny", "zero3"), ("tiny", "fsdp")),
    (1, 2, 4),
    2,
    (1, 4),
    7,
    (2, 3, 4),
    Sizes((4096, 65536, 2**20, 4 * 2**20, 32 * 2**20, 128 * 2**20), 5, 0.1),
)
QUICK = Plan((("atto", "ddp"),), (1, 2), 1, (2, 3), 1, (2,), Sizes((4096, 2**20), 1, 0.01))


def measure_links(plan: Plan, num_cores: int) -> dict[str, Any]:
    """The links of gloo on this machine."""
    found = []
    for num_ranks in plan.link_ranks:
        found += timings(run_ranks(time_collectives, num_ranks, plan.sizes))
        print(f"collectives at {num_ranks} ranks timed", flush=True)
    return link_summary(found, num_cores)


def measure_steps(plan: Plan, links: dict[str, Any], num_cores: int) -> dict[str, Any]:
    """Fits on one rank, losses by sharing the machine, checks at every number of ranks, and cases left out."""
    fabric = fabric_of(links, num_cores)
    found: dict[str, Any] = {"compute": {}, "alone_s": {}, "checks": [], "left_out": {}}
    for model, engine in plan.cases:
        case = Case(model, engine, 1, plan.check_batch)
        if reason := absent(case):
            found["left_out"][f"{model}, {engine}"] = reason
            continue
        alone = found["alone_s"].setdefault(model, {})
        for num_ranks in plan.ranks:
            case = replace(case, num_ranks=num_ranks)
            with_alone = engine == "ddp"  # measured once a model
            batches = plan.fit_batches if num_ranks == 1 else ()
            by_rank = run_ranks(
                time_steps, num_ranks, StepsWanted(case, batches, min(2, plan.steps), plan.steps, with_alone)
            )
            if with_alone:
                alone[str(num_ranks)] = statistics.median(map(max, zip(*(r["alone_s"] for r in by_rank), strict=True)))
            if num_ranks == 1:
                found["compute"][f"{model}, {engine}"] = summary = compute_summary(by_rank, plan.fit_batches)
            found["checks"].append(check(case, by_rank, workload_of(case, summary), fabric, alone))
            print(f"steps timed: {case.name}", flush=True)
    return found


def loader_rate() -> dict[str, Any]:
    """Images/s of a core in the newest loader record, at its most workers."""
    record = load_records("loader")[-1]
    by_workers = record["results"]["cases"][LOADER_CASE]["samples_per_s"]
    workers = max(map(int, by_workers))
    rate = by_workers[str(workers)]["median"] / workers
    return {"case": LOADER_CASE, "date": record["date"], "commit": record["commit"], "images_per_core_s": rate}


def main() -> None:
    """Measure, check, predict, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, one step, two ranks; no record")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    with_record = not (options.no_record or options.quick)
    if with_record:
        clean_commit()
    preload(*([] if options.quick else ["deepspeed"]))
    plan, started = QUICK if options.quick else FULL, time.monotonic()
    num_cores = len(os.sched_getaffinity(0))
    links = measure_links(plan, num_cores)
    steps = measure_steps(plan, links, num_cores)
    loader = loader_rate()
    points = predictions(list_mpmae(), loader["images_per_core_s"])
    case = {
        "precision": "fp32 here, bf16 on GPUs", "img_size": 56, "patch_size": 8, "check_batch": plan.check_batch,
        "fit_batches": plan.fit_batches, "steps": plan.steps, "sizes": plan.sizes._asdict(), "num_cores": num_cores,
        "duration_s": time.monotonic() - started,
    }  # fmt: skip
    results = {"links": links, **steps, "loader": loader, "assumptions": assumptions(), "predictions": points}
    print(report({"case": case, "results": results}))
    if with_record:
        print(f"record: {write_record(WHAT, case, results)}")


if __name__ == "__main__":
    main()
