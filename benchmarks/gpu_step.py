"""Training steps on a GPU: the sparse model against the dense grid with masking after each operator.

python benchmarks/gpu_step.py                                 (one CUDA GPU; writes a record)
python benchmarks/gpu_step.py --only large --seconds 300
python benchmarks/gpu_step.py --device cpu --tiny             (a smoke test, no record)
python benchmarks/gpu_step.py --warm --seconds 60             (compiles what the first steps need, times nothing)

A step is forward, backward and AdamW under bf16 autocast on a synthetic batch of all twelve modalities, mask ratio 0.6. Both
sides have the same weights, which a learning rate of 0 keeps, and must give the same loss; all ways then take turns. Peak
memory is the side's own: weights, gradients, optimizer state and activations of a step that no graph holds. Single blocks,
and the encoder over mask ratios 0 to 0.9, are measured likewise. After `--seconds` nothing new is begun; what was not
reached is listed.
"""

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_timing import Captured, Run, Timer, device_facts
from record import RECORDS, clean_commit, spread, write_record
from step_cases import RATIOS, Way, block_ways, encoder_ways, step_ways

LOSS_TOLERANCE = 0.02
GOALS = {"speedup": 3.0, "memory_ratio": 0.5, "images_per_s": {"atto, 112/16, batch 1024": 50_000}}
GOAL_SIZES = ("atto", "tiny")


class Planned(NamedTuple):
    """A measurement: kind "step", "block" or "encoder", its name, its facts, and the ways to do it, each made on demand."""

    kind: str
    name: str
    facts: dict[str, Any]
    ways: Callable[[], Iterator[Way]]


def planned(device: torch.device, tiny: bool) -> Iterator[Planned]:
    """Everything in order of worth."""
    if tiny:
        yield from (step(device, "atto", (24, 8), 2, tiny), encoder(device, "atto", (24, 8), 2, 0.6, tiny))
        yield block(device, "atto", 3, 2, tiny)
        return
    for size, geometry in itertools.product(GOAL_SIZES, ((112, 16), (56, 8))):
        yield step(device, size, geometry, 1024, tiny)
    for ratio in RATIOS:
        yield encoder(device, "atto", (112, 16), 1024, ratio, tiny)
    for size, geometry in itertools.product(("base", "large"), ((112, 16), (56, 8))):
        yield step(device, size, geometry, 256, tiny)
    for size, stage in itertools.product(("tiny", "atto", "base", "large"), range(4)):
        yield block(device, size, stage, 1024 if size in GOAL_SIZES else 256, tiny)
    for ratio in RATIOS:
        yield encoder(device, "tiny", (112, 16), 1024, ratio, tiny)
    for size, geometry in itertools.product(GOAL_SIZES, ((112, 16), (56, 8))):
        yield step(device, size, geometry, 256, tiny)
    for size, geometry in itertools.product(("base", "large"), ((112, 16), (56, 8))):
        yield step(device, size, geometry, 1024, tiny)


def step(device: torch.device, size: str, geometry: tuple[int, int], batch_size: int, tiny: bool) -> Planned:
    """A whole training step."""
    facts = {"size": size, "img_size": geometry[0], "patch_size": geometry[1], "batch_size": batch_size}
    name = f"{size}, {geometry[0]}/{geometry[1]}, batch {batch_size}"
    return Planned("step", name, facts, partial(step_ways, device, **facts, tiny=tiny))


def encoder(
    device: torch.device, size: str, geometry: tuple[int, int], batch_size: int, ratio: float, tiny: bool
) -> Planned:
    """Forward and backward of the encoder at a mask ratio."""
    facts = {"size": size, "img_size": geometry[0], "patch_size": geometry[1], "batch_size": batch_size}
    facts |= {"mask_ratio": ratio}
    name = f"{size}, {geometry[0]}/{geometry[1]}, batch {batch_size}, mask ratio {ratio:g}"
    return Planned("encoder", name, facts, partial(encoder_ways, device, **facts, tiny=tiny))


def block(device: torch.device, size: str, stage: int, batch_size: int, tiny: bool) -> Planned:
    """Forward and backward of one block."""
    facts = {"size": size, "stage": stage, "batch_size": batch_size}
    return Planned(
        "block", f"{size}, stage {stage}, batch {batch_size}", facts, partial(block_ways, device, **facts, tiny=tiny)
    )


def measure(plan: Planned, timer: Timer, deadline: float) -> dict[str, Any]:
    """The entry of a measurement in the record."""
    runs: dict[str, Run] = {}
    facts: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    missing: dict[str, str] = {}
    expected = None
    pool = torch.cuda.graph_pool_handle() if timer.device.type == "cuda" else None
    ways = plan.ways()
    while (way := next(ways, None)) is not None:
        name = way.name
        if time.monotonic() > deadline and runs:
            missing[name] = "no time left"
            continue
        try:
            started = time.monotonic()
            value, peak_bytes = first_run(way, timer.device)
            expected = value if expected is None else expected
            if not abs(value - expected) <= LOSS_TOLERANCE * abs(expected):
                failed[name] = f"result {value:.5g}, the first way's is {expected:.5g}"
                continue
            facts[name] = {"side": way.side, "setup_s": time.monotonic() - started, "peak_bytes": peak_bytes}
            runs[name] = way.run
            if pool is not None:
                name = f"{way.name}, graph"
                facts[name] = {"side": way.side, "setup_s": 0.0, "peak_bytes": None}
                runs[name] = Captured(way.run, pool)
        except torch.OutOfMemoryError:
            missing[name] = "does not fit in memory"
            clear(timer.device)
        except Exception as error:  # a red way must not take the others with it
            failed[f"{way.name}, graph" if way.name in runs else way.name] = f"{type(error).__name__}: {error}".splitlines()[
                0
            ]
    samples = timer.alternate(runs)
    results = {name: facts[name] | {"ms": spread(values)} for name, values in samples.items()}
    for result in results.values():
        result["images_per_s"] = 1e3 * plan.facts["batch_size"] / result["ms"]["median"]
    entry = {"kind": plan.kind, "name": plan.name, **plan.facts, "ways": results, "missing": missing, "failed": failed}
    return entry | comparison(results)


def first_run(way: Way, device: torch.device) -> tuple[float, int | None]:
    """The result of a way's second run, and the peak of its memory over what was there before the side was made."""
    way.run()
    if device.type != "cuda":
        return float(way.run()), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    value = float(way.run())
    return value, torch.cuda.max_memory_allocated() - way.bytes_before


def comparison(results: dict[str, Any]) -> dict[str, Any]:
    """The faster way of each side, how many times faster the sparse one is, and its share of the dense one's memory."""
    best: dict[str, Any] = {}
    for side in ("sparse", "dense"):
        names = [name for name, result in results.items() if result["side"] == side]
        best[side] = min(names, key=lambda name: results[name]["ms"]["median"], default=None)
    summary: dict[str, Any] = {"best": best, "speedup": None, "memory_ratio": None}
    if None not in best.values():
        summary["speedup"] = results[best["dense"]]["ms"]["median"] / results[best["sparse"]]["ms"]["median"]
    peaks = {
        side: min((r["peak_bytes"] for r in results.values() if r["side"] == side and r["peak_bytes"]), default=None)
        for side in best
    }
    if None not in peaks.values():
        summary["memory_ratio"] = peaks["sparse"] / peaks["dense"]
    return summary


def table(entries: list[dict[str, Any]]) -> list[str]:
    """A line for each measurement."""
    lines = [f"{'':<8}{'case':<38}{'sparse ms':>10}{'img/s':>9}{'GiB':>6}  {'dense ms':>9}{'img/s':>8}{'GiB':>6}{'x':>6}"]
    for entry in entries:
        cells = f"{entry['kind']:<8}{entry['name']:<38}"
        for side, width in (("sparse", 10), ("dense", 11)):
            name = entry["best"][side]
            if name is None:
                cells += f"{'-':>{width}}{'':>8}{'':>6}"
                continue
            result = entry["ways"][name]
            peaks = [r["peak_bytes"] for r in entry["ways"].values() if r["side"] == side and r["peak_bytes"]]
            memory = f"{min(peaks) / 2**30:.1f}" if peaks else ""
            cells += f"{result['ms']['median']:>{width}.2f}{result['images_per_s']:>8,.0f}{memory:>6}"
        lines.append(cells + (f"{entry['speedup']:>6.2f}" if entry["speedup"] else ""))
        lines += [f"  RED {way}: {reason}" for way, reason in entry["failed"].items()]
    return lines


def clear(device: torch.device) -> None:
    """Give back the memory of what is no longer in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warm(plans: Iterator[Planned], device: torch.device, deadline: float) -> None:
    """Run each way once, so that its compiled code lies in the caches; nothing that goes wrong here matters."""
    for plan in plans:
        try:
            for way in plan.ways():
                if time.monotonic() > deadline:
                    return
                way.run()
        except Exception as error:
            print(f"{plan.name}: {type(error).__name__}", flush=True)
        clear(device)


def main() -> int:
    """Measure, print, write the record; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="problems of a few sites, nothing compiled, no record")
    parser.add_argument("--only", default="", help="measurements whose kind and name hold this")
    parser.add_argument("--seconds", type=float, default=3600, help="time for everything")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--warm", action="store_true", help="fill the compilers' caches only")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_step.py: no CUDA GPU here; --device cpu --tiny is a smoke test")
    with_record = not (options.tiny or options.no_record or options.warm)
    if with_record:
        clean_commit()
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 256  # one compiled version for each shape
    torch._inductor.config.autotune_local_cache = False  # choices made beside other work must not outlive it
    plans = (plan for plan in planned(device, options.tiny) if options.only in f"{plan.kind} {plan.name}")
    if options.warm:
        warm(plans, device, deadline)
        return 0
    timer = Timer(device, seconds=0.02 if options.tiny else 1.5, min_runs=2 if options.tiny else 7)
    entries, not_reached = [], []
    for plan in plans:
        if time.monotonic() > deadline:
            not_reached.append(f"{plan.kind} {plan.name}")
            continue
        entries.append(measure(plan, timer, deadline))
        print("\n".join(table(entries[-1:])[1:]), flush=True)
        clear(device)
    print("\n=== summary\n" + "\n".join(table(entries)))
    if not_reached:
        print(f"not reached in {options.seconds:.0f} s: {'; '.join(not_reached)}")
    failed = [entry["name"] for entry in entries if entry["failed"]]
    if with_record:
        case = {"precision": "bf16 autocast", "mask_ratio": 0.6, "modalities": 12, "optimizer": "AdamW, fused"}
        results = {"device": device_facts(device), "cases": entries, "not_reached": not_reached, "goals": GOALS}
        print(f"record: {write_record('gpu step', case, results, options.records, failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
