"""A training step of a MultiMAE as the published code takes it, against ours in several precisions, in one run.

python benchmarks/multimae_step.py                       (a CPU, base, 56 px, patch 8; about 7 minutes; writes a record)
python benchmarks/multimae_step.py --rounds 1 --no-record
python benchmarks/multimae_step.py --device cuda --seconds 60
python benchmarks/multimae_step.py --tiny                (a smoke test, no record)

A step is forward, backward, the gradient's norm and AdamW on a synthetic batch that lacks nothing; multimae_cases.py says
what each way does. All have the same weights, which a rate of 0 keeps, and must give the same loss, the published code's and
ours in float32 to its rounding, before anything is timed. Then they take turns, each round after products of the encoder's
shape in each precision: the rate of the machine in that round. A speed-up is the ratio within a round, of the time
by the clock, and of the process's own. On a GPU ours is timed as a CUDA graph too.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Captured, Timer, device_facts
from multimae_cases import DTYPES, GOAL_WAY, REFERENCE, Way, all_ways
from record import RECORDS, clean_commit, spread, write_record
from synthetic import synthetic_batch

from mpmae.cost import model_cost
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.presets import create_model

WHAT = {"cpu": "multimae step", "cuda": "multimae step on a GPU"}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
GOAL = 2.0
SIZES = {"model": "multimae_base", "img_size": 56, "patch_size": 8}
TINY = {"model": "multimae_tiny", "img_size": 24, "patch_size": 8, "decoder_dim": 16}


def made(settings: dict[str, Any], device: torch.device) -> MultiMAE:
    """The model with random weights."""
    torch.manual_seed(0)
    options = {key: value for key, value in settings.items() if key != "model"}
    return create_model(settings["model"], **options).to(device)


def first_steps(ways: list[Way]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Loss and seconds of each way's first step, compilation included, and what is wrong with those that are wrong."""
    facts, failed, expected = {}, {}, None
    for way in ways:
        started = time.perf_counter()
        loss = float(way.run())
        facts[way.name] = {"precision": way.precision, "loss": loss, "first_step_s": time.perf_counter() - started}
        expected = loss if expected is None else expected
        tolerance = LOSS_TOLERANCE[way.precision]
        if not abs(loss - expected) <= tolerance * abs(expected):
            failed[way.name] = f"loss {loss:.7g}, ours in float32 is {expected:.7g}, expected within {tolerance:g} of it"
    return facts, failed


def product_rate(num_rows: int, dim: int, dtype: torch.dtype) -> float:
    """Operations a second of the forward product of an encoder's first MLP layer, the fastest of three."""
    x, weight, bias = (torch.ones(*shape, dtype=dtype) for shape in ((num_rows, dim), (4 * dim, dim), (4 * dim,)))
    fastest_s = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight, bias)
        fastest_s = min(fastest_s, time.perf_counter() - started)
    return 8 * num_rows * dim**2 / fastest_s


def on_a_cpu(model: MultiMAE, ways: list[Way], batch_size: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Milliseconds by part and images/s of each way; rates of products by precision."""
    samples: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    rates: dict[str, list[float]] = {precision: [] for precision in ("fp32", "bf16")}
    num_rows, dim = batch_size * (model.num_visible + 1), model.global_tokens.shape[2]
    for number in range(rounds):
        for precision, values in rates.items():
            values.append(product_rate(num_rows, dim, DTYPES[precision] or torch.float32))
        for way in ways:
            samples[way.name].append(way.timed())
        print(
            f"round {number + 1}/{rounds}: "
            + ", ".join(f"{n} {s[-1]['step']:.0f} ({s[-1]['cpu']:.0f}) ms" for n, s in samples.items()),
            flush=True,
        )
    results = {
        name: {
            "ms": {part: spread([step[part] for step in steps]) for part in steps[0]},
            "images_per_s": spread([1e3 * batch_size / step["step"] for step in steps]),
        }
        for name, steps in samples.items()
    }
    for name, steps in samples.items():
        for key, part in (("speedup", "step"), ("cpu_speedup", "cpu")):
            ratios = [base[part] / step[part] for base, step in zip(samples[REFERENCE], steps, strict=True)]
            results[name][key] = spread(ratios)
    return results, {name: spread(values) for name, values in rates.items()}


def on_a_gpu(ways: list[Way], batch_size: int, seconds: float) -> dict[str, Any]:
    """Milliseconds and images/s of each way, ours also as graphs."""
    timer = Timer(torch.device("cuda"), seconds=seconds, min_runs=5)
    runs = {way.name: way.run for way in ways}
    pool = torch.cuda.graph_pool_handle()
    runs |= {f"{way.name}, graph": Captured(way.run, pool) for way in ways if way.name != REFERENCE}
    samples = timer.alternate(runs)
    base = statistics.median(samples[REFERENCE])
    return {
        name: {
            "ms": {"step": spread(values)},
            "images_per_s": spread([1e3 * batch_size / value for value in values]),
            "speedup": spread([base / value for value in values]),
        }
        for name, values in samples.items()
    }


def table(results: dict[str, Any]) -> list[str]:
    """A line for each way."""
    lines = [f"{'way':<34}{'ms':>9}{'images/s':>10}{'x':>7}"]
    for name, result in results["ways"].items():
        step, rate, speedup = result["ms"]["step"]["median"], result["images_per_s"]["median"], result["speedup"]["median"]
        lines.append(f"{name:<34}{step:>9.1f}{rate:>10.2f}{speedup:>7.2f}")
    return lines + [f"  RED {name}: {reason}" for name, reason in results["failed"].items()]


def main() -> int:
    """Measure, print, write the record; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(WHAT), default="cpu")
    parser.add_argument("--batch", type=int, help="images; 64, on a GPU 256")
    parser.add_argument("--rounds", type=int, default=3, help="on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seconds", type=float, default=60, help="on a GPU, for the turns")
    parser.add_argument("--tiny", action="store_true", help="a few patches, nothing compiled, no record")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("multimae_step.py: no CUDA GPU here; without --device it measures on the CPU")
    with_record = not (options.tiny or options.no_record)
    if with_record:
        clean_commit()
    torch.set_num_threads(options.threads)
    settings = TINY if options.tiny else SIZES
    batch_size = options.batch or (2 if options.tiny else 256 if device.type == "cuda" else 64)
    model = made(settings, device)
    batch = synthetic_batch(model, batch_size, device)
    tokens = model.draw(0, 0, batch.sample_ids).to(device)
    ways = list(all_ways(model, batch, tokens, tiny=options.tiny))
    facts, failed = first_steps(ways)
    if REFERENCE in failed:
        raise SystemExit(f"multimae_step.py: nothing is timed, {REFERENCE}: {failed[REFERENCE]}")
    sound = [way for way in ways if way.name not in failed]
    rates = None
    if device.type == "cuda":
        measured = on_a_gpu(sound, batch_size, options.seconds)
    else:
        measured, rates = on_a_cpu(model, sound, batch_size, options.rounds)
    cost = model_cost(model, "bf16")
    results = {
        "device": device_facts(device),
        "ways": {name: facts.get(name, {}) | result for name, result in measured.items()},
        "failed": failed,
        "product_flops_per_s": rates,
        "flops_per_image": {name: part.forward.flops + part.backward.flops for name, part in cost.parts.items()},
        "num_parameters": cost.num_parameters,
        "goal": {"way": GOAL_WAY, "least": GOAL},
    }
    print("\n=== summary\n" + "\n".join(table(results)))
    if with_record:
        case = settings | {"batch_size": batch_size, "rounds": options.rounds, "threads": options.threads}
        path = write_record(WHAT[device.type], case, results, options.records, sorted(failed))
        print(f"record: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
