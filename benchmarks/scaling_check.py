"""The scaling model on this machine: what is fitted to one rank and to collectives, and how far it is off whole steps."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from engine_cases import Case
from record import spread
from scaling_hardware import meta_model, num_units
from scaling_links import Group, Link, SharedCores, Timing, fit_links, fit_two
from scaling_model import Compute, Machine, Workload, predict

FP32_BYTES = 4
FIT_RANKS_HELD_OUT = 4


def link_errors(fabric: SharedCores, timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """By kind: how far the fitted cost is off each timing, in percent: median and largest."""
    errors: dict[str, list[float]] = {}
    for t in timings:
        cost = fabric.cost(t.kind, t.num_bytes, Group(t.num_ranks, t.num_ranks))
        errors.setdefault(t.kind, []).append(abs(100 * (cost.total_s / t.seconds - 1)))
    return {kind: {"median_percent": statistics.median(e), "max_percent": max(e)} for kind, e in errors.items()}


def link_summary(timings: Sequence[Timing], num_cores: int) -> dict[str, Any]:
    """The fitted links with their errors; `held_out`: errors at 4 ranks of a fit to 2 and 3."""
    fabric = fit_links(timings, num_cores)
    seen = [t for t in timings if t.num_ranks != FIT_RANKS_HELD_OUT]
    unseen = [t for t in timings if t.num_ranks == FIT_RANKS_HELD_OUT]
    held_out = link_errors(fit_links(seen, num_cores), unseen) if seen and unseen else {}
    return {
        "timings": [t._asdict() for t in timings],
        "links": {kind: asdict(link) for kind, link in fabric.links.items()},
        "errors": link_errors(fabric, timings),
        "held_out": held_out,
    }


def fabric_of(summary: dict[str, Any], num_cores: int) -> SharedCores:
    """The fitted fabric of a `link_summary`."""
    return SharedCores({kind: Link(**link) for kind, link in summary["links"].items()}, num_cores)


def slowest(by_rank: Sequence[dict[str, Any]], micro_batch: int) -> list[list[float]]:
    """Forward, backward and update seconds of each step: those of the rank that took longest for the step."""
    steps = zip(*(rank["steps"][str(micro_batch)] for rank in by_rank), strict=True)
    return [max(ranks, key=sum) for ranks in steps]


def compute_summary(one_rank: Sequence[dict[str, Any]], batches: Sequence[int]) -> dict[str, Any]:
    """Seconds of one rank, from the medians at `batches`: forward and backward as fixed + per sample, and the update."""
    medians = {n: [statistics.median(part) for part in zip(*slowest(one_rank, n), strict=True)] for n in batches}
    summary: dict[str, Any] = {"update_s": statistics.median(times[2] for times in medians.values())}
    for index, phase in enumerate(("forward", "backward")):
        fixed, per_sample = fit_two((1.0, float(n), times[index]) for n, times in medians.items())
        summary[phase] = {"fixed_s": fixed, "per_sample_s": per_sample}
    return summary


def workload_of(case: Case, summary: dict[str, Any]) -> Workload:
    """The measured workload of a case's model and engine, float32."""
    model = meta_model(f"mpmae_{case.model}")

    def compute(micro_batch: int) -> Compute:
        phases = (summary[phase] for phase in ("forward", "backward"))
        both = ({"compute": phase["fixed_s"] + micro_batch * phase["per_sample_s"]} for phase in phases)
        return Compute(*both, {"compute": summary["update_s"]})

    return Workload(case.model, sum(p.numel() for p in model.parameters()), num_units(model), FP32_BYTES, compute)


def predicted(case: Case, work: Workload, fabric: SharedCores, slowdown: Callable[[int], float]) -> dict[str, float]:
    """Seconds of a step, and those of its collectives; nothing overlaps, as gloo works on the cores that compute."""
    machine = Machine("here", fabric, case.num_ranks, 0.0, slowdown)
    step = predict(work, case.engine, machine, case.num_ranks, case.micro_batch)
    return {"step_s": step.seconds, "collectives_s": step.seconds - step.terms_s["compute"]}


def check(
    case: Case, by_rank: Sequence[dict[str, Any]], work: Workload, fabric: SharedCores, alone: dict[str, float]
) -> dict[str, Any]:
    """A case's measured steps beside two predictions, errors in percent of the measured median.

    "cores": what a rank needs alone, times the ranks a core. "copies": times what forward and backward of ranks that do
    not talk to each other were measured to lose by sharing the machine (`alone`, seconds by number of ranks).
    """
    measured = spread([sum(step) for step in slowest(by_rank, case.micro_batch)])
    ways: dict[str, Callable[[int], float]] = {"cores": fabric.slowdown}
    if str(case.num_ranks) in alone and "1" in alone:
        ways["copies"] = lambda ranks: alone[str(ranks)] / alone["1"]
    entry: dict[str, Any] = {**asdict(case), "name": case.name, "measured_s": measured, "predicted": {}}
    for name, slowdown in ways.items():
        found = predicted(case, work, fabric, slowdown)
        entry["predicted"][name] = found | {"error_percent": 100 * (found["step_s"] / measured["median"] - 1)}
    return entry
