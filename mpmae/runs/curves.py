"""Loss curves of runs over steps, images or hours, raw and smoothed.

Shapes: T metric records of a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpmae.errors import ReportError
from mpmae.files import read_jsonl
from mpmae.probe_record import scores_of
from mpmae.runs.folder import VALIDATION, RunFolder
from mpmae.runs.listing import shown

AXES = {"step": "step", "images": "images seen", "hours": "hours of running"}
TOTAL = "loss"
_SMOOTHED_FRACTION = 1 / 50
_MEDIAN_OF = 9


@dataclass(frozen=True)
class Curve:
    """One loss of one run.

    x, raw, smooth: float64 [T]; NaN where there is no number. points_x, points: the validation losses.
    """

    x: np.ndarray
    raw: np.ndarray
    smooth: np.ndarray
    points_x: np.ndarray
    points: np.ndarray


@dataclass(frozen=True)
class RunCurves:
    """Losses and probes of a run.

    curves: by name, the total first. probes: scores in percent, by method. resumed_at: on the x axis. num_dropped: records
    that a resumed run did again.
    """

    name: str
    curves: dict[str, Curve]
    probes: dict[str, Curve]
    resumed_at: list[float]
    num_dropped: int


def run_curves(runs: Sequence[RunFolder], axis: str, window: int | None = None) -> list[RunCurves]:
    """The curves of runs over one of AXES; window: records in a running mean, None for a fiftieth of the longest run.

    Raises ReportError, naming every run without a metric record or without what the axis needs.
    """
    problems, records = [], []
    for run in runs:
        lines = run.metrics()
        if not any(line["step"] for line in lines):
            problems.append(f"{run.path} has no metric record yet; leave it out")
        elif axis == "hours" and any("running_s" not in line for line in lines if line["step"]):
            problems.append(f"{run.path} has records without running_s, from an older version; take --x step or images")
        records.append(lines)
    if problems:
        raise ReportError(problems)
    window = window or max(1, round(max(map(len, records)) * _SMOOTHED_FRACTION))
    names = short_names([shown(run.path) for run in runs])
    return [_of_run(run, name, lines, axis, window) for run, name, lines in zip(runs, names, records, strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """As many of the last parts of each path as it takes to tell them apart."""
    parts = [path.split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over `window` records around each of the medians of a few, so that a single spike leaves no trace.

    Records without a finite number count nothing, and stay without one.
    """
    present = np.isfinite(values)
    before, after = (window - 1) // 2, window // 2
    calm = np.where(present, _medians(values[present], min(window, _MEDIAN_OF), present), 0.0)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (calm, present))
    index = np.arange(len(values))
    low, high = np.maximum(index - before, 0), np.minimum(index + after + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(present, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _medians(numbers: np.ndarray, window: int, present: np.ndarray) -> np.ndarray:
    """Running medians of the finite `numbers`, put back to the places where `present` says so: float64 [T]."""
    spread = np.zeros(len(present))
    if len(numbers):
        padded = np.pad(numbers, ((window - 1) // 2, window // 2), mode="edge")
        spread[present] = np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
    return spread


def _of_run(run: RunFolder, name: str, lines: list[dict[str, Any]], axis: str, window: int) -> RunCurves:
    probed = [line for line in lines if scores_of(line)]
    lines = [line for line in lines if line["step"]]
    steps = np.array([line["step"] for line in lines], float)
    x = _x_of(run, lines, axis)
    validation = [line for line in read_jsonl(run.path / VALIDATION) if "step" in line]
    points_x = np.interp([line["step"] for line in validation], steps, x)
    modalities = dict.fromkeys(key for line in lines for key in line.get("losses", {}))
    curves = {TOTAL: _curve([line.get("loss") for line in lines], x, window, points_x, [v.get("loss") for v in validation])}
    for key in modalities:
        values, points = ([line.get("losses", {}).get(key) for line in source] for source in (lines, validation))
        curves[key] = _curve(values, x, window, points_x, points)
    resumed_at = np.interp([step for step in run.resumed_at if step > 0], steps, x).tolist()
    probed_x = np.interp([line["step"] for line in probed], [0, *steps], [0, *x])
    probes = {}
    for method in dict.fromkeys(method for line in probed for method in scores_of(line)):
        scores = np.array([100 * _number(scores_of(line).get(method)) for line in probed])
        probes[method] = Curve(probed_x, scores, scores, probed_x, scores)
    return RunCurves(name, curves, probes, resumed_at, len(read_jsonl(run.path / "metrics.dropped.jsonl")))


def _curve(values: Sequence[Any], x: np.ndarray, window: int, points_x: np.ndarray, points: Sequence[Any]) -> Curve:
    raw, points = (np.array([_number(value) for value in found], float) for found in (values, points))
    return Curve(x, raw, smoothed(raw, window), points_x, points)


def _x_of(run: RunFolder, lines: list[dict[str, Any]], axis: str) -> np.ndarray:
    steps = np.array([line["step"] for line in lines], float)
    if axis == "step":
        return steps
    if axis == "images":
        return steps * run.config["train"]["global_batch_size"]
    return hours_of([line["running_s"] for line in lines])


def hours_of(running_s: Sequence[float]) -> np.ndarray:
    """Hours that a run was running at each record, from the seconds since each launch: these start anew with a launch."""
    times = np.array(running_s, float)
    steps = np.diff(times, prepend=0.0)
    return np.cumsum(np.where(steps < 0, times, steps)) / 3600


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
