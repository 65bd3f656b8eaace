"""What several inputs of one encoder reach, as a table: a row per input, method and label fraction."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpmae.eval.encoders import RANDOM_INIT
from mpmae.eval.intervals import NUM_DRAWS, by_image, paired_bootstrap
from mpmae.eval.scores import Score
from mpmae.eval.tables import UNKNOWN, Standing, Table, interval, over_seeds, percent, standings, title

_COMMON = ("image statistics", "random convolutions")  # see all stored bands


@dataclass(frozen=True)
class SubsetScores:
    """One input.

    domains: what is read. scores: as its evaluation gave them; () where there is none. remark: why not, or what stands in
    for a band.
    """

    name: str
    domains: tuple[str, ...]
    scores: tuple[Score, ...]
    remark: str = ""

    @property
    def is_random(self) -> bool:
        """Whether no weights were given, so that random ones are what is evaluated."""
        return bool(self.scores) and not any(score.encoder not in (RANDOM_INIT, *_COMMON) for score in self.scores)

    def label(self, score: Score) -> str:
        """What a score is of, among those of all inputs."""
        if score.encoder in _COMMON:
            return score.encoder
        return f"{self.name}, {RANDOM_INIT}" if score.encoder == RANDOM_INIT else self.name


@dataclass(frozen=True)
class Row:
    """A row's numbers. entry: None for a baseline that all inputs share. random: random weights of the same input."""

    entry: SubsetScores | None
    standing: Standing
    random: Standing | None
    gain: tuple[float, float, float] | None

    @property
    def label(self) -> str:
        """The input's name, or the baseline's."""
        return self.standing.summary.encoder if self.entry is None else self.entry.name


def sweep_rows(done: Sequence[SubsetScores]) -> list[Row]:
    """By method, then label fraction, then input; baselines last. gain: over the first input, paired by image."""
    rows: list[Row] = []
    first: SubsetScores | None = next((entry for entry in done if entry.scores), None)
    for entry in done:
        found = standings(entry.scores)
        for standing in found:
            summary = standing.summary
            if summary.encoder in _COMMON:
                rows.append(Row(None, standing, None, None))
            elif entry.is_random or summary.encoder != RANDOM_INIT:
                random = next((s for s in found if s.summary.encoder == RANDOM_INIT and _alike(s, standing)), None)
                is_first = entry is first
                gain = None if is_first or standing.images is None else _gain(entry, first, standing)
                rows.append(Row(entry, standing, None if entry.is_random else random, gain))
    methods = list(dict.fromkeys(row.standing.summary.method for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            methods.index(row.standing.summary.method),
            row.standing.summary.label_fraction,
            row.entry is None,
        ),
    )


def sweep_table(done: Sequence[SubsetScores], pooling: str = "") -> Table:
    """All inputs, in percent; those that could not be evaluated last. Remarks stand below it.

    pooling: how tokens become a vector, in words, where they do.
    """
    rows = sweep_rows(done)
    first = next((entry.name for entry in done if entry.scores), "")
    fractions = {row.standing.summary.label_fraction for row in rows}
    metric = title(rows[0].standing.summary.metric) if rows else "metric"
    per_image = any(row.standing.images for row in rows)
    header = ["input", "domains", "method", *(["labels"] if len(fractions) > 1 else []), "train images", f"{metric} %"]
    header += ["over seeds", *(["over images", f"gain on {first}"] if per_image else []), "random init %"]
    header += ["gain on random init"] if per_image else []
    cells = []
    for row in rows:
        summary, standing = row.standing.summary, row.standing
        line = [row.label, "all stored bands" if row.entry is None else _told(row.entry.domains), summary.method]
        line += [f"{100 * summary.label_fraction:g} %"] if len(fractions) > 1 else []
        line += [str(summary.num_train), percent(summary.mean), over_seeds(standing)]
        if per_image:
            line += [interval(*standing.images[1:]) if standing.images else UNKNOWN, _gained(row.gain)]
        line.append(percent(row.random.summary.mean) if row.random else UNKNOWN)
        line += [_gained(standing.gain if row.random else None)] if per_image else []
        cells.append(tuple(line))
    for entry in done:
        if not entry.scores and entry.remark:
            line = [entry.name, _told(entry.domains), "not possible"]
            cells.append(tuple(line + [UNKNOWN] * (len(header) - len(line))))
    return Table(tuple(header), tuple(cells), _notes(rows, done, per_image, pooling))


def _notes(rows: Sequence[Row], done: Sequence[SubsetScores], per_image: bool, pooling: str) -> tuple[str, ...]:
    num = max((len(row.standing.summary.values) for row in rows), default=0)
    folds = {score.fold for entry in done for score in entry.scores}
    of_folds = f" x {len(folds)} folds" if folds and folds != {None} else ""
    notes = [f"Test split, {num} seed{'s' if num != 1 else ''}{of_folds}. Inputs share splits, folds and seeds."]
    if pooling:
        notes.append(f"An image's vector is the {pooling.removeprefix('the ')}.")
    if num > 1:
        notes.append("Over seeds: 95 % interval of the mean (Student's t); all equal: no seed changes anything there.")
    if per_image:
        notes.append(
            f"Over images: 95 % bootstrap interval of accuracy over test images ({NUM_DRAWS} draws); gains: of the "
            "difference, paired by image."
        )
    notes.append("Random init: random weights of the same architecture and input.")
    common = list(dict.fromkeys(row.standing.summary.encoder for row in rows if row.entry is None))
    if common:
        notes.append(f"Of all stored bands, whatever the input: {', '.join(common)}.")
    notes += [f"{entry.name}{'' if entry.scores else ', not possible'}: {entry.remark}." for entry in done if entry.remark]
    return tuple(notes)


def _gain(entry: SubsetScores, first: SubsetScores, standing: Standing) -> tuple[float, float, float] | None:
    """The difference to the first input, by the same method and fraction."""
    ours = by_image(_like(entry, standing))
    other = by_image(_like(first, standing))
    return paired_bootstrap(ours, other) if ours and other else None


def _like(entry: SubsetScores, standing: Standing) -> list[Score]:
    """The scores of an entry's encoder by the method and fraction of `standing`."""
    summary = standing.summary
    return [
        score
        for score in entry.scores
        if score.encoder not in _COMMON
        and (entry.is_random or score.encoder != RANDOM_INIT)
        and (score.method, score.label_fraction) == (summary.method, summary.label_fraction)
    ]


def _alike(one: Standing, other: Standing) -> bool:
    a, b = one.summary, other.summary
    return (a.method, a.label_fraction) == (b.method, b.label_fraction)


def _gained(gain: tuple[float, float, float] | None) -> str:
    return UNKNOWN if gain is None else f"{percent(gain[0], '+')} {interval(*gain[1:], '+')}"


def _told(domains: Sequence[str]) -> str:
    return ", ".join(domains)
