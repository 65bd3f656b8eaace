"""Curves as inline SVG: drawn in CSS classes, so that one drawing serves light, dark and print.

A long series is cut into at most `MAX_BUCKETS` stretches of steps; the line is each stretch's mean, the band its lowest to
highest value. Nothing else smooths a curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from mpmae.report.numbers import Series, compact

WIDTH, HEIGHT = 320, 190
MAX_BUCKETS = 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30
_LOG_FROM_RATIO = 20.0


@dataclass(frozen=True)
class Chart:
    """A drawn curve with its caption."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Bucket:
    """A stretch of steps of one series; all four numbers are finite."""

    step: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(x) if self.log else x for x in (self.low, self.high))
        value = math.log10(value) if self.log else value
        fraction = (value - low) / (high - low)
        return round(self.start_px + fraction * (self.end_px - self.start_px), 2)


def buckets(values: Series, max_buckets: int = MAX_BUCKETS) -> list[list[Bucket]]:
    """The series as runs of buckets; a bucket without any finite value ends a run, so the line has a gap there."""
    num = min(max_buckets, len(values))
    runs: list[list[Bucket]] = [[]]
    for i in range(num):
        part = values[i * len(values) // num : (i + 1) * len(values) // num]
        data = [(step, value) for step, value in part if math.isfinite(value)]
        if data:
            numbers = [value for _, value in data]
            steps = [step for step, _ in data]
            runs[-1].append(Bucket(sum(steps) / len(steps), min(numbers), sum(numbers) / len(numbers), max(numbers)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def line_chart(
    title: str,
    train: Series,
    validation: Series = (),
    trivial: Series = (),
    unit: str = "",
    zero_based: bool = False,
    dashed_name: str = "trivial",
) -> Chart:
    """Chart of a logged series with its validation points and a dashed line: the trivial predictor's, or what it is called.

    The y axis is logarithmic where all values are positive and span more than a factor of 20. Steps whose value is not
    finite are crosses at the chart's foot. Without any finite value the chart says so.
    """
    runs = buckets(train)
    points, dashed = (_finite(s) for s in (validation, trivial))
    numbers = [x for run in runs for b in run for x in (b.low, b.high)] + [y for _, y in [*points, *dashed]]
    root = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "class": "chart"})
    if not numbers:
        root.set("aria-label", f"{title}: no finite values")
        _text(root, WIDTH / 2, HEIGHT / 2, "no finite values", "tick middle")
        return Chart(title, _markup(root), "no finite values")
    steps = [step for s in (train, points, dashed) for step, _ in s]
    x = _Axis(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, _LEFT, WIDTH - _RIGHT)
    y = _y_axis(numbers, zero_based)
    _grid(root, x, y)
    for run in runs:
        if any(b.high > b.low for b in run):
            outline = [(b.step, b.high) for b in run] + [(b.step, b.low) for b in reversed(run)]
            ElementTree.SubElement(root, "path", {"class": "band", "d": _path(outline, x, y) + "Z"})
        line = [(b.step, b.mean) for b in run]
        if len(line) == 1:
            _dot(root, x(line[0][0]), y(line[0][1]), "single", 2)
        else:
            ElementTree.SubElement(root, "path", {"class": "line", "d": _path(line, x, y)})
    if dashed:
        line = [(x.low, dashed[0][1]), *dashed, (x.high, dashed[-1][1])]
        ElementTree.SubElement(root, "path", {"class": "trivial", "d": _path(line, x, y)})
    for step, value in points:
        _dot(root, x(step), y(value), "point", 3)
    broken = [step for step, value in train if not math.isfinite(value)]
    for step in broken[:: max(1, len(broken) // 50)]:
        _cross(root, x(step), HEIGHT - _BOTTOM - 5)
    caption = _caption(train, points, dashed, dashed_name, unit)
    if y.log:
        caption += " · log scale"
    if broken:
        caption += f" · {len(broken):,} not finite (✕)"
    root.set("aria-label", f"{title} over steps {min(steps):,} to {max(steps):,}: {caption}")
    return Chart(title, _markup(root), caption)


def ratio_bar(ratio: float, mark: str) -> str:
    """SVG bar of a loss relative to the trivial predictor's (the line at 1); bars beyond 1.5 end in an arrow."""
    width, height, full = 150, 18, 1.5
    root = ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "class": "ratio", "aria-hidden": "true"})
    if math.isfinite(ratio):
        length = min(ratio, full) / full * (width - 12)
        ElementTree.SubElement(
            root, "rect", {"class": f"bar {mark}", "x": "0", "y": "3", "width": f"{length:.1f}", "height": "12", "rx": "2"}
        )
        if ratio > full:
            ElementTree.SubElement(
                root, "path", {"class": f"bar {mark}", "d": f"M{width - 12} 0L{width} 9L{width - 12} 18Z"}
            )
    at = f"{1 / full * (width - 12):.1f}"
    ElementTree.SubElement(root, "line", {"class": "one", "x1": at, "x2": at, "y1": "0", "y2": str(height)})
    return _markup(root)


def legend_swatch(kind: str) -> str:
    """SVG sample of how a chart draws `line`, `band`, `point` or `trivial`."""
    root = ElementTree.Element("svg", {"viewBox": "0 0 28 12", "class": "swatch chart", "aria-hidden": "true"})
    if kind == "point":
        _dot(root, 14, 6, "point", 3)
    elif kind == "band":
        ElementTree.SubElement(root, "path", {"class": "band", "d": "M0 1H28V11H0Z"})
    else:
        ElementTree.SubElement(root, "path", {"class": kind, "d": "M0 6H28"})
    return _markup(root)


def _finite(values: Series) -> Series:
    return [(step, value) for step, value in values if math.isfinite(value)]


def _caption(train: Series, points: Series, dashed: Series, dashed_name: str, unit: str) -> str:
    last = _finite(train)[-1:]
    parts = [f"{what}{compact(values[-1][1])}" for what, values in (("last ", last), ("validation ", points)) if values]
    if dashed:
        parts.append(f"{dashed_name} {compact(dashed[-1][1])}")
    return " · ".join(part + (f" {unit}" if unit else "") for part in parts)


def _y_axis(numbers: Sequence[float], zero_based: bool) -> _Axis:
    low, high = min(numbers), max(numbers)
    bottom, top = HEIGHT - _BOTTOM, _TOP
    if low > 0 and high / low > _LOG_FROM_RATIO and not zero_based:
        return _Axis(low / 1.15, high * 1.15, bottom, top, log=True)
    if zero_based:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or max(abs(high), 1e-12) * 0.1
    return _Axis(low if zero_based and low == 0 else low - margin, high + margin, bottom, top)


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values within low..high: at least three, or powers of ten (with 2 and 5 if few) if `log`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [10.0**p for p in powers if low <= 10.0**p <= high]
        if len(found) < 3:
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
        return found[:: math.ceil(len(found) / 5)]
    scale = 10.0 ** math.floor(math.log10(high - low))
    for spacing in (5 * scale, 2 * scale, scale, scale / 2, scale / 5):
        first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
        if last - first >= 2:
            break
    return [i * spacing for i in range(first, last + 1)]


def _tick_text(value: float) -> str:
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.4g}{letter}".replace("-", "\N{MINUS SIGN}")
    if 0 < size < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _grid(root: ElementTree.Element, x: _Axis, y: _Axis) -> None:
    bottom = HEIGHT - _BOTTOM
    for value in ticks(y.low, y.high, y.log):
        at = str(y(value))
        ElementTree.SubElement(
            root, "line", {"class": "grid", "x1": str(_LEFT), "x2": str(WIDTH - _RIGHT), "y1": at, "y2": at}
        )
        _text(root, _LEFT - 5, y(value) + 4, _tick_text(value), "tick end")
    whole = [value for value in ticks(x.low, x.high, log=False) if value == int(value)]
    for value in whole:
        anchor = "end" if x(value) > WIDTH - _RIGHT - 12 else "middle"
        _text(root, x(value), bottom + 14, _tick_text(value), f"tick {anchor}")
    ElementTree.SubElement(
        root, "line", {"class": "axis", "x1": str(_LEFT), "x2": str(WIDTH - _RIGHT), "y1": str(bottom), "y2": str(bottom)}
    )
    _text(root, (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 3, "step", "tick middle")


def _path(points: Sequence[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    return "M" + "L".join(f"{x(step):g} {y(value):g}" for step, value in points)


def _text(root: ElementTree.Element, x: float, y: float, text: str, css_class: str) -> None:
    ElementTree.SubElement(root, "text", {"x": f"{x:g}", "y": f"{y:g}", "class": css_class}).text = text


def _dot(root: ElementTree.Element, x: float, y: float, css_class: str, radius: float) -> None:
    ElementTree.SubElement(root, "circle", {"class": css_class, "cx": f"{x:g}", "cy": f"{y:g}", "r": f"{radius:g}"})


def _cross(root: ElementTree.Element, x: float, y: float) -> None:
    d = f"M{x - 3:g} {y - 3:g}L{x + 3:g} {y + 3:g}M{x - 3:g} {y + 3:g}L{x + 3:g} {y - 3:g}"
    ElementTree.SubElement(root, "path", {"class": "broken", "d": d})


def _markup(root: ElementTree.Element) -> str:
    return ElementTree.tostring(root, encoding="unicode")
