"""What the logs say: series for the curves, validation beside the trivial predictor, the headline numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any, Literal, get_args

from mpmae.domains import DOMAINS, NORM_HEAD, loss_order, noun_of, title_of
from mpmae.modalities import MODALITIES
from mpmae.probe_record import LINEAR, percent, scores_of
from mpmae.report.data import ReportData

EQUAL_WITHIN_PERCENT = 2.0
Mark = Literal["better", "equal", "worse", "unknown", "absent"]
Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Comparison:
    """One target's latest validation loss beside the trivial predictor's; `ratio` = loss / trivial, NaN if unknown.

    The mark is `absent` where the log says None: no validation tile has the target's modality.
    """

    name: str
    title: str
    loss_kind: str
    loss: float
    trivial: float
    ratio: float
    mark: Mark


@dataclass(frozen=True)
class Headline:
    """One of the numbers at the head of the page."""

    label: str
    value: str
    detail: str = ""


def number(value: Any) -> float:
    """The value as a float; NaN for None and whatever is not a number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def series(objects: Sequence[Mapping[str, Any]], *keys: str) -> Series:
    """(step, value) by step for the objects that have the key path `keys`; a value may be NaN.

    None is no value: no tile of that batch had the modality.
    A run resumed from an earlier step logs some steps again: the later object counts.
    """
    found: dict[int, float] = {}
    for item in objects:
        value: Any = item
        for key in keys:
            value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is not _MISSING and value is not None:
            found[item["step"]] = number(value)
    return sorted(found.items())


def targets_of(data: ReportData, *kinds: str) -> list[str]:
    """Every modality, domain or `norm_rgb` with an entry under `kinds` (none: `losses`) anywhere in the logs, in order."""
    objects = [item for log in (data.history, data.validation) for item in log]
    return loss_order({name for item in objects for kind in kinds or ("losses",) for name in item.get(kind) or {}})


def noun(data: ReportData) -> str:
    """What the page calls what is reconstructed: modalities or targets."""
    return noun_of(targets_of(data))


def loss_kind(name: str) -> str:
    """The kind of a target's loss in words; empty for an unknown one."""
    if name in MODALITIES:
        return {"continuous": "mean squared error", "categorical": "cross entropy"}[MODALITIES[name].kind]
    if name == NORM_HEAD:
        return "mean squared error"
    kinds = {"squared": "mean squared error", "absolute": "mean absolute error", "classes": "cross entropy"}
    return kinds[DOMAINS[name].loss] if name in DOMAINS else ""


def comparisons(data: ReportData) -> list[Comparison]:
    """The last validation beside the trivial predictor, one row per target; empty without a validation."""
    if not data.validation:
        return []
    last = max(data.validation, key=lambda item: item["step"])
    rows = []
    for name in targets_of(data):
        losses = last.get("losses") or {}
        loss, trivial = number(losses.get(name)), number((last.get("trivial") or {}).get(name))
        ratio = loss / trivial if trivial > 0 and math.isfinite(loss) else math.nan
        mark = "absent" if name in losses and losses[name] is None else mark_of(ratio)
        rows.append(Comparison(name, title_of(name), loss_kind(name), loss, trivial, ratio, mark))
    return rows


def mark_of(ratio: float) -> Mark:
    """Whether a loss that is `ratio` times the trivial predictor's is better, equal (within 2 %) or worse."""
    if not math.isfinite(ratio):
        return "unknown"
    if abs(ratio - 1.0) * 100 <= EQUAL_WITHIN_PERCENT:
        return "equal"
    return "better" if ratio < 1.0 else "worse"


def verdict(data: ReportData) -> str:
    """The answer to "did it learn?" in a sentence or two, from the last validation alone."""
    rows = comparisons(data)
    judged = [row for row in rows if row.mark not in ("unknown", "absent")]
    if not judged:
        reason = "no validation was recorded" if not data.validation else "the validation holds no comparable losses"
        return f"This page cannot say: {reason}, and a falling training loss alone does not show it."
    groups = {mark: [row.title for row in rows if row.mark == mark] for mark in get_args(Mark)}
    won, total, what = len(groups["better"]), len(rows) - len(groups["absent"]), noun(data)
    if won == total:
        text = f"Yes: on all {total} {what} it beats a predictor that sees no image."
    elif won:
        text = f"In part: it beats a predictor that sees no image on {won} of {total} {what}."
    else:
        text = f"No: it beats a predictor that sees no image on none of {total} {what}."
    phrases = {
        "equal": "No better than that predictor",
        "worse": "Worse",
        "unknown": "Not judged",
        "absent": "In no validation tile",
    }
    for mark, phrase in phrases.items():
        if groups[mark]:
            text += f" {phrase}: {', '.join(groups[mark])}."
    return text


def warnings(data: ReportData) -> list[str]:
    """What a reader must not overlook: non-finite losses in the logs."""
    found = []
    totals = series(data.history, "loss")
    broken = [step for step, loss in totals if not math.isfinite(loss)]
    if broken:
        found.append(
            f"The total loss is not finite in {len(broken):,} of {len(totals):,} logged steps, first at step {broken[0]:,}."
        )
    for objects, what in ((data.history, "training"), (data.validation, "validation")):
        for name in targets_of(data):
            values = series(objects, "losses", name)
            broken = [step for step, loss in values if not math.isfinite(loss)]
            if broken:
                share = f"{len(broken):,} of {len(values):,} entries, first at step {broken[0]:,}"
                found.append(f"{title_of(name)}: no finite {what} loss in {share}.")
    return found


def headlines(data: ReportData) -> list[Headline]:
    """The numbers at the head of the page; what is unknown is left out."""
    run, found = data.run, []
    rows = comparisons(data)
    if rows:
        last = max(data.validation, key=lambda item: item["step"])
        samples = f" on {last['num_samples']:,} samples" if isinstance(last.get("num_samples"), int) else ""
        won = sum(row.mark == "better" for row in rows)
        present = sum(row.mark != "absent" for row in rows)
        detail = f"{noun(data)}, at step {last['step']:,}{samples}"
        found.append(Headline("Beats the trivial predictor", f"{won} of {present}", detail))
    totals = [loss for _, loss in series(data.history, "loss") if math.isfinite(loss)]
    if totals:
        length = max(1, min(100, len(totals) // 20))
        first, final = (sum(part) / len(part) for part in (totals[:length], totals[-length:]))
        detail = "training, first to last step" if length == 1 else f"training, means of the first and last {length} steps"
        found.append(Headline("Total loss", f"{compact(first)} → {compact(final)}", detail))
    if probe := _probe_headline(data):
        found.append(probe)
    num_steps = run.num_steps or max((item["step"] for item in data.history), default=None)
    if num_steps is not None:
        seen = f"{run.num_samples_seen:,} samples seen" if run.num_samples_seen else ""
        epochs = number(data.history[-1].get("epoch")) if data.history else math.nan
        parts = [seen, f"epoch {epochs:.4g}" if math.isfinite(epochs) else ""]
        found.append(Headline("Optimizer steps", f"{num_steps:,}", ", ".join(p for p in parts if p)))
    rates, waits = (_finite(data, key) for key in ("images_per_s", "data_wait_percent"))
    rate = run.images_per_s if run.images_per_s is not None else (median(rates) if rates else None)
    if rate is not None:
        wait = f"the median step waited {median(waits):.1f} % of its time for data" if waits else ""
        found.append(Headline("Images per second", f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}", wait))
    if run.wall_time_s is not None:
        found.append(
            Headline("Wall time", duration_text(run.wall_time_s), f"finished {run.finished}" if run.finished else "")
        )
    return found


def at_start(scores: Series) -> Series:
    """Of a probe's scores the one before the first step; none where the log begins later."""
    return [(step, score) for step, score in scores if step == 0]


def probe_note(data: ReportData) -> str:
    """What the probe's charts show, and how far chance moves a point; empty without a probe."""
    last = _last_probe(data)
    if last is None:
        return ""
    probe = last["probe"]
    metric, num_train, num_val = (probe.get(key) for key in ("metric", "num_train", "num_val"))
    dataset = (data.run.config.get("probe") or {}).get("dataset")
    where = f" of {PurePath(str(dataset)).name}" if dataset else ""
    text = (
        f"What the encoder's features were good for during the run: {num_train} labelled images{where} train kNN and a "
        f"linear probe, {num_val} others judge them, in {str(metric).replace('_', ' ')}; the test split is not read."
    )
    score = number(probe.get(LINEAR))
    if metric == "accuracy" and num_val and math.isfinite(score):
        fraction = (num_val * score + 2) / (num_val + 4)  # Agresti and Coull, 1998: never an error of 0
        error_percent = 100 * math.sqrt(fraction * (1 - fraction) / (num_val + 4))
        text += f" With {num_val} images a point has a standard error of about {error_percent:.1f} %."
    return text


def _probe_headline(data: ReportData) -> Headline | None:
    last = _last_probe(data)
    if last is None:
        return None
    scores = series(data.history, "probe", LINEAR)
    first = "".join(f"{percent(score)} → " for _, score in at_start(scores) if last["step"] > 0)
    detail = (
        f"of {last['probe'].get('num_val')} images, {'before the first step and ' if first else ''}at step {last['step']:,}"
    )
    return Headline("Linear probe", f"{first}{percent(last['probe'].get(LINEAR))}", detail)


def _last_probe(data: ReportData) -> Mapping[str, Any] | None:
    return max((item for item in data.history if scores_of(item)), key=lambda item: item["step"], default=None)


def duration_text(seconds: float) -> str:
    """A duration for people: `42 s`, `5 min 10 s`, `3 h 5 min`, `2 d 4 h`."""
    seconds = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for i, (unit, size) in enumerate(units):
        if seconds >= size:
            text = f"{seconds // size} {unit}"
            rest = seconds % size // units[i + 1][1] if i + 1 < len(units) else 0
            return f"{text} {rest} {units[i + 1][0]}" if rest else text
    return "0 s"


def compact(value: float) -> str:
    """A number in about three digits: `0.412`, `12.3`, `1,234`, `1.2e-05`; `not finite` for NaN and infinities."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        text = f"{value:.2e}"
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}"
    return text.replace("-", "\N{MINUS SIGN}") if value < 0 and "e" not in text else text


def _finite(data: ReportData, key: str) -> list[float]:
    return [value for _, value in series(data.history, key) if math.isfinite(value)]


_MISSING = object()
