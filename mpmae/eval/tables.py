"""Results as tables: Markdown for a file, and the same in a terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table as RichTable

from mpmae.eval.encoders import RANDOM_INIT
from mpmae.eval.intervals import NUM_DRAWS, bootstrap, by_image, paired_bootstrap
from mpmae.eval.scores import Score, Summary, summarise

UNKNOWN = "–"
_TITLES = {
    "f1_macro": "F1 macro",
    "f1_micro": "F1 micro",
    "map_macro": "mAP macro",
    "map_micro": "mAP micro",
    "miou": "mIoU",
}


@dataclass(frozen=True)
class Table:
    """Cells as text. notes: what a reader has to know of them."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Standing:
    """A row's summary with what the images say: (mean, low, high), None where nothing is known of single images.

    gain: over random init of the same method and label fraction, paired by image; None for that row itself and without it.
    seeds_agree: whether several seeds reached the same in all metrics and images: then their interval says nothing.
    """

    summary: Summary
    images: tuple[float, float, float] | None
    gain: tuple[float, float, float] | None
    seeds_agree: bool


def standings(scores: Sequence[Score]) -> list[Standing]:
    """One per encoder, method, task, split and label fraction, in the order of first appearance."""
    summaries = summarise(scores)
    groups = [[score for score in scores if _is_of(score, summary)] for summary in summaries]
    images = [by_image(group) for group in groups]
    found = []
    for summary, group, ours in zip(summaries, groups, images, strict=True):
        per_image = bool(ours) and summary.metric == "accuracy"
        random = next(
            (other for row, other in zip(summaries, images, strict=True) if _is_its_random_init(row, summary)), None
        )
        gain = paired_bootstrap(ours, random) if per_image and random and summary.encoder != RANDOM_INIT else None
        found.append(Standing(summary, bootstrap(ours) if per_image else None, gain, _agree(group)))
    return found


def results_table(scores: Sequence[Score]) -> Table:
    """All scores, in percent. Raises no error for a mixture of tasks; each row names its own where there are several."""
    rows = standings(scores)
    if not rows:
        return Table((), (), ("no scores",))
    several = {
        "task": len({row.summary.task for row in rows}) > 1,
        "labels": len({row.summary.label_fraction for row in rows}) > 1,
    }
    metrics = list(dict.fromkeys(row.summary.metric for row in rows))
    others = [name for name in dict.fromkeys(name for s in scores for name in s.metrics) if metrics != [name]]
    means = {name: {_key(row): row.mean for row in summarise(_having(scores, name), name)} for name in others}
    per_image = any(row.images for row in rows)
    header = ["encoder", "method", *(["task"] if several["task"] else []), *(["labels"] if several["labels"] else [])]
    header += ["train images", f"{title(metrics[0]) if len(metrics) == 1 else 'deciding metric'} %", "over seeds"]
    header += [*(["over images", "gain on random init"] if per_image else []), *(f"{title(name)} %" for name in others)]
    cells = []
    for row in rows:
        summary = row.summary
        line = [summary.encoder, summary.method]
        line += [summary.task] if several["task"] else []
        line += [f"{100 * summary.label_fraction:g} %"] if several["labels"] else []
        line += [str(summary.num_train), percent(summary.mean), over_seeds(row)]
        if per_image:
            line.append(interval(*row.images[1:]) if row.images else UNKNOWN)
            line.append(f"{percent(row.gain[0], '+')} {interval(*row.gain[1:], '+')}" if row.gain else UNKNOWN)
        line += [percent(means[name].get(_key(summary), math.nan)) for name in others]
        cells.append(tuple(line))
    return Table(tuple(header), tuple(cells), _notes(scores, rows))


def markdown(table: Table) -> str:
    """The table and below it its notes."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)
    return text + "".join(f"\n{note}\n" for note in table.notes)


def terminal(table: Table) -> RichTable:
    """The same for `rich`."""
    shown = RichTable(caption=escape("\n".join(table.notes)), caption_justify="left")
    for name in table.header:
        shown.add_column(escape(name), overflow="fold")
    for line in table.rows:
        shown.add_row(*(escape(cell) for cell in line))
    return shown


def title(metric: str) -> str:
    """A metric's name for people."""
    return _TITLES.get(metric, metric.replace("_", " "))


def percent(value: float, sign: str = "") -> str:
    """A fraction as a percentage without its sign: "61.3"."""
    return UNKNOWN if math.isnan(value) else f"{round(100 * value, 1) + 0.0:{sign}.1f}"  # + 0.0: never "-0.0"


def interval(low: float, high: float, sign: str = "") -> str:
    """ "[58.0, 64.1]" of fractions."""
    return UNKNOWN if math.isnan(low) else f"[{percent(low, sign)}, {percent(high, sign)}]"


def over_seeds(row: Standing) -> str:
    """The interval over seeds, or why there is none."""
    if len(row.summary.values) == 1:
        return "one seed"
    return "all equal" if row.seeds_agree else interval(row.summary.low, row.summary.high)


def _notes(scores: Sequence[Score], rows: Sequence[Standing]) -> tuple[str, ...]:
    seeds, folds = {score.seed for score in scores}, {score.fold for score in scores}
    runs = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}" + (f" x {len(folds)} folds" if folds != {None} else "")
    notes = [f"Test split, {runs}. Each value is the mean over seeds{' of the mean over folds' if len(folds) > 1 else ''}."]
    if any(len(row.summary.values) > 1 and not row.seeds_agree for row in rows):
        notes.append(
            "Over seeds: 95 % interval of the mean (Student's t), for what a seed changes: weights, order, division."
        )
    if any(row.seeds_agree for row in rows):
        notes.append("All equal: no seed changes anything there, so seeds give no interval; that over images does.")
    if any(len(row.summary.values) == 1 for row in rows):
        notes.append("One seed: what another seed would change is not known.")
    if any(row.images for row in rows):
        notes.append(
            f"Over images: 95 % bootstrap interval of accuracy over test images ({NUM_DRAWS} draws), runs averaged by image;"
            " gain on random init: of the difference, paired by image."
        )
    return tuple(notes)


def _agree(scores: Sequence[Score]) -> bool:
    by_seed: dict[int, list[tuple]] = {}
    for score in scores:
        by_seed.setdefault(score.seed, []).append((score.fold, dict(score.metrics), dict(score.per_sample)))
    first, *others = by_seed.values()
    return bool(others) and all(reached == first for reached in others)


def _is_of(score: Score, summary: Summary) -> bool:
    mine = (score.encoder, score.method, score.task, score.split, score.metric, score.label_fraction)
    return mine == (*_key(summary)[:4], summary.metric, summary.label_fraction)


def _is_its_random_init(row: Summary, summary: Summary) -> bool:
    return row.encoder == RANDOM_INIT and _key(row)[1:] == _key(summary)[1:] and row.metric == summary.metric


def _key(summary: Summary) -> tuple:
    return summary.encoder, summary.method, summary.task, summary.split, summary.label_fraction


def _having(scores: Sequence[Score], metric: str) -> list[Score]:
    return [score for score in scores if metric in score.metrics]
