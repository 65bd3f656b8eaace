"""Maps of embeddings as inline SVG, each with its legend inside: scatters of the vectors, and the places on the earth.

Tiles are drawn in a fixed shuffled order, so that no class hides another by coming last; those without a class lie below.
"""

import math
import random
import textwrap
from collections.abc import Sequence
from xml.etree import ElementTree

from mpmae.report.charts import Chart, ticks
from mpmae.report.embedding_map import UNKNOWN, EmbeddingMap, Grouping

WIDTH = 480
_UNKNOWN_COLOUR = "#aab2bc"
_PLOT_HEIGHT, _EARTH_HEIGHT, _MARGIN, _LABEL = 330, 236, 8, 18
_LEGEND_ROW, _LEGEND_COLUMNS, _NAME_LENGTH = 17, 2, 26
_NUM_LAYERS = 12
_LINE_LENGTH = 88  # characters of a caption below a picture
_ZOOM_BELOW = 0.4  # of the whole earth's width and height
# Plain rules, for programs that draw SVG know no CSS variables.
_STYLE = """
.picture { font: 12px system-ui, sans-serif; }
.title { font-size: 14px; font-weight: 600; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.panel { fill: #f5f6f8; } .frame { fill: none; stroke: #dde1e6; } .grid { stroke: #dde1e6; }
.name { fill: #1a1f26; } .rim { stroke: #1a1f26; } .tick { fill: #56606c; font-size: 11px; }
@media (prefers-color-scheme: dark) {
  .panel { fill: #1b2128; } .frame { stroke: #323a44; } .grid { stroke: #323a44; }
  .name { fill: #e8ebef; } .rim { stroke: #e8ebef; } .tick { fill: #a3adb9; }
}
"""


def embedding_charts(data: EmbeddingMap) -> dict[str, Chart]:
    """The pictures by a name for files: a scatter for each grouping (without any, one), and the earth if it has places."""
    charts = {}
    for grouping in data.groupings:
        charts[f"map-{_slug(grouping.title)}"] = _scatter(data, grouping)
    if not charts:
        charts["map"] = _scatter(data, None)
    if any(place is not None for place in data.locations):
        charts["earth"] = _earth(data)
    return charts


def standalone(chart: Chart) -> str:
    """The picture as a file of its own, with its title."""
    drawing = ElementTree.fromstring(chart.svg)
    lines = textwrap.wrap(chart.caption, _LINE_LENGTH)
    foot = float(drawing.get("viewBox", "").split()[3]) + 12
    height = foot + 30 + 15 * len(lines)
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"-8 -22 {WIDTH + 16} {height:g}",
            "width": f"{2 * WIDTH}",
            "class": "picture",
            "role": "img",
            "aria-label": drawing.get("aria-label", ""),
        },
    )
    ElementTree.SubElement(root, "style").text = _STYLE
    ElementTree.SubElement(
        root, "rect", {"class": "panel", "x": "-8", "y": "-22", "width": f"{WIDTH + 16}", "height": f"{height:g}"}
    )
    _text(root, 0, -6, chart.title, "name title")
    root.extend(drawing)
    for number, line in enumerate(lines):
        _text(root, 0, foot + 15 * number, line, "tick")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _scatter(data: EmbeddingMap, grouping: Grouping | None) -> Chart:
    title = grouping.title if grouping else "Vectors"
    colours = [_UNKNOWN_COLOUR] * len(data.points) if grouping is None else [_colour(grouping, k) for k in grouping.classes]
    rows = [] if grouping is None else _legend_rows(grouping)
    legend_height = math.ceil(len(rows) / _LEGEND_COLUMNS) * _LEGEND_ROW
    root = _root(_PLOT_HEIGHT + _LABEL + 10 + legend_height)
    box = (_LABEL, 0.0, float(WIDTH), float(_PLOT_HEIGHT))
    _frame(root, box)
    x_range, y_range = (_range([point[axis] for point in data.points]) for axis in (0, 1))
    inside, num_outside = [], 0
    for point, colour in zip(data.points, colours, strict=True):
        x = box[0] + _MARGIN + _position(point[0], x_range) * (box[2] - box[0] - 2 * _MARGIN)
        y = box[3] - _MARGIN - _position(point[1], y_range) * (box[3] - box[1] - 2 * _MARGIN)
        if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
            inside.append((x, y, colour))
        else:
            num_outside += 1
    _dots(root, inside)
    x_label, y_label = _axis_labels(data)
    _text(root, (box[0] + box[2]) / 2, box[3] + 14, x_label, "tick middle")
    _text(root, 0, 0, y_label, "tick middle").set("transform", f"translate(12 {_PLOT_HEIGHT / 2:g}) rotate(-90)")
    for number, row in enumerate(rows):
        column, line = divmod(number, math.ceil(len(rows) / _LEGEND_COLUMNS))
        _legend_row(root, _LABEL + column * (WIDTH - _LABEL) / _LEGEND_COLUMNS, _PLOT_HEIGHT + 38 + line * _LEGEND_ROW, *row)
    caption = _sampled(data)
    if num_outside:
        caption += f" · {num_outside:,} far-off tiles lie outside the frame"
    root.set("aria-label", f"Map of the vectors coloured by {title}: " + "; ".join(f"{row[1]} {row[2]}" for row in rows))
    return Chart(title, ElementTree.tostring(root, encoding="unicode"), caption)


def _axis_labels(data: EmbeddingMap) -> tuple[str, str]:
    if data.method == "umap":
        return "UMAP 1", "UMAP 2"
    first, second = (f"principal component {i + 1} ({data.explained_percent[i]:.0f} % of the variance)" for i in (0, 1))
    return first, second


def _earth(data: EmbeddingMap) -> Chart:
    places = [(*place, colour) for place, colour in zip(data.locations, data.rgb, strict=True) if place is not None]
    root = _root(_EARTH_HEIGHT + 20)
    box = (34.0, 0.0, float(WIDTH), float(_EARTH_HEIGHT))
    south, north, west, east = _extent([(lat, lon) for lat, lon, _ in places], (box[2] - box[0]) / (box[3] - box[1]))

    def at(lat: float, lon: float) -> tuple[float, float]:
        x = box[0] + (lon - west) / (east - west) * (box[2] - box[0])
        return x, box[3] - (lat - south) / (north - south) * (box[3] - box[1])

    whole = (south, north, west, east) == (-90, 90, -180, 180)
    for lat in range(-60, 90, 30) if whole else ticks(south, north, log=False):
        y = at(lat, west)[1]
        _line(root, box[0], y, box[2], y)
        _text(root, box[0] - 4, y + 4, _degrees(lat, "NS"), "tick end")
    for lon in range(-120, 180, 60) if whole else ticks(west, east, log=False):
        x = at(south, lon)[0]
        _line(root, x, box[1], x, box[3])
        _text(root, x, box[3] + 14, _degrees(lon, "EW"), "tick middle")
    _frame(root, box)
    _dots(root, [(*at(lat, lon), colour) for lat, lon, colour in places])
    caption = (
        f"{len(places):,} tiles on a plain grid of latitude and longitude. Red, green and blue are the first three "
        "principal components of the vectors: similar colours, similar vectors"
    )
    root.set("aria-label", f"Places of the tiles from {_degrees(south, 'NS')} to {_degrees(north, 'NS')}: {caption}")
    return Chart("Where on the earth", ElementTree.tostring(root, encoding="unicode"), caption)


def _extent(places: Sequence[tuple[float, float]], aspect: float) -> tuple[float, float, float, float]:
    """South, north, west, east: of the earth, or around the places where they cover a small part of it, as wide as seen."""
    lats, lons = zip(*places, strict=True)
    height, width = max(lats) - min(lats), max(lons) - min(lons)
    if height > 180 * _ZOOM_BELOW or width > 360 * _ZOOM_BELOW:
        return -90, 90, -180, 180
    centre_lat, centre_lon = (max(lats) + min(lats)) / 2, (max(lons) + min(lons)) / 2
    shrink = max(math.cos(math.radians(centre_lat)), 0.2)  # a degree of longitude in degrees of latitude
    height = 1.15 * max(height, width * shrink / aspect, 0.1)
    width = height * aspect / shrink
    return centre_lat - height / 2, centre_lat + height / 2, centre_lon - width / 2, centre_lon + width / 2


def _degrees(value: float, letters: str) -> str:
    letter = letters[int(value < 0)] if value else ""
    return f"{abs(value):.4g}°{letter}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What the frame shows: all values, but for a few that are far from the others."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
    margin = 0.25 * (high - low)
    low, high = max(ordered[0], low - margin), min(ordered[-1], high + margin)
    return (low, high) if high > low else (low - 1, high + 1)


def _position(value: float, limits: tuple[float, float]) -> float:
    return (value - limits[0]) / (limits[1] - limits[0])


def _colour(grouping: Grouping, class_id: int) -> str:
    return _UNKNOWN_COLOUR if class_id == UNKNOWN else grouping.colours[class_id]


def _legend_rows(grouping: Grouping) -> list[tuple[str, str, str]]:
    """(colour, name, number of tiles) of the classes that tiles have."""
    rows = zip(grouping.colours, grouping.names, grouping.counts, strict=True)
    found = [(colour, name, f"{count:,}") for colour, name, count in rows if count]
    return found + ([(_UNKNOWN_COLOUR, "unknown", f"{grouping.num_unknown:,}")] if grouping.num_unknown else [])


def _sampled(data: EmbeddingMap) -> str:
    num = len(data.points)
    return f"all {num:,} tiles" if num == data.num_tiles else f"{num:,} of {data.num_tiles:,} tiles, evenly spread"


def _slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.split(",")[0].lower()).split()) or "classes"


def _root(height: float) -> ElementTree.Element:
    return ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "class": "chart"})


def _frame(root: ElementTree.Element, box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    ElementTree.SubElement(
        root,
        "rect",
        {
            "class": "frame",
            "x": f"{left:g}",
            "y": f"{top:g}",
            "width": f"{right - left:g}",
            "height": f"{bottom - top:g}",
        },
    )


def _line(root: ElementTree.Element, x1: float, y1: float, x2: float, y2: float) -> None:
    ElementTree.SubElement(
        root, "line", {"class": "grid", "x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    )


def _dots(root: ElementTree.Element, points: Sequence[tuple[float, float, str]]) -> None:
    """Round dots with a thin rim, which keeps pale colours visible: a path for each colour of each layer."""
    order = list(range(len(points)))
    random.Random(0).shuffle(order)
    order.sort(key=lambda i: points[i][2] != _UNKNOWN_COLOUR)
    width = 7.0 if len(points) <= 500 else 5.0 if len(points) <= 1500 else 3.6
    per_layer = math.ceil(len(order) / _NUM_LAYERS)
    for first in range(0, len(order), per_layer or 1):
        by_colour: dict[str, list[str]] = {}
        for i in order[first : first + per_layer]:
            x, y, colour = points[i]
            by_colour.setdefault(colour, []).append(f"M{x:.1f} {y:.1f}h0")
        group = ElementTree.SubElement(root, "g", {"class": "dots", "stroke-linecap": "round", "fill": "none"})
        every = "".join(move for moves in by_colour.values() for move in moves)
        ElementTree.SubElement(group, "path", {"class": "rim", "d": every, "stroke-width": f"{width + 0.9:g}"})
        for colour, moves in by_colour.items():
            ElementTree.SubElement(group, "path", {"d": "".join(moves), "stroke": colour, "stroke-width": f"{width:g}"})


def _legend_row(root: ElementTree.Element, x: float, y: float, colour: str, name: str, number: str) -> None:
    dot = {"cx": f"{x + 5:g}", "cy": f"{y - 4:g}", "r": "5", "fill": colour, "class": "rim", "stroke-width": "0.5"}
    ElementTree.SubElement(root, "circle", dot)
    shown = name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
    text = _text(root, x + 16, y, f"{shown} ", "name")
    if shown != name:
        ElementTree.SubElement(text, "title").text = name
    span = ElementTree.SubElement(text, "tspan", {"class": "tick"})
    span.text = number


def _text(root: ElementTree.Element, x: float, y: float, text: str, css_class: str) -> ElementTree.Element:
    element = ElementTree.SubElement(root, "text", {"x": f"{x:g}", "y": f"{y:g}", "class": css_class})
    element.text = text
    return element
