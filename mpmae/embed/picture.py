"""The map of a folder of embeddings: its data for the report, and SVG files.

Shapes: N tiles, n of them drawn, D features, K classes.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpmae.embed import parquet
from mpmae.embed.folder import iterate_parts, load_manifest
from mpmae.embed.projection import as_colours, principal_components, umap_positions
from mpmae.errors import EmbeddingError
from mpmae.files import write_whole
from mpmae.report.embedding_charts import embedding_charts, standalone
from mpmae.report.embedding_map import UNKNOWN, EmbeddingMap, Grouping

MAX_DRAWN = 4000
MAX_CLASSES = 16
# Told apart by people with any colour vision, as far as so many can be: Okabe and Ito, "Color universal design", 2008, then
# "muted" of Paul Tol, "Colour schemes", 2021.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"),
    *("#332288", "#117733", "#882255", "#44aa99", "#999933", "#aa4499", "#88ccee", "#ddcc77", "#cc6677"),
)
_OTHER_COLOUR = "#c3c8ce"


def draw_map(folder: Path, method: Literal["pca", "umap"]) -> list[Path]:
    """Write map.json and one SVG for each grouping (split, label, land cover, biome) and for the earth; their paths.

    Of more than MAX_DRAWN tiles that many, evenly spread, are projected and drawn. Raises EmbeddingError as
    `read_embeddings` does or when the files cannot be written, ConfigError as `umap_positions` does.
    """
    manifest = load_manifest(folder)
    num_tiles = sum(manifest["num_tiles"].values())
    drawn = np.linspace(0, num_tiles - 1, min(num_tiles, MAX_DRAWN)).round().astype(np.int64)
    names = ["split", *manifest["classes"]]
    vectors, places, values = [], [], {name: [] for name in names}
    first = 0
    for table, part in iterate_parts(folder):
        rows = drawn[(drawn >= first) & (drawn < first + len(table))] - first
        first += len(table)
        vectors.append(part[rows])
        places += _places(table, rows)
        for name in names:
            values[name] += table.column(name).to_pylist()
    points = np.concatenate(vectors)
    components, percent = principal_components(points, 3)
    data = EmbeddingMap(
        method=method,
        explained_percent=tuple(round(float(p), 2) for p in percent),
        checkpoint=manifest["encoder"]["title"],
        step=manifest["origin"].get("step"),
        source=manifest["source"]["title"],
        num_tiles=num_tiles,
        points=_rounded(components[:, :2] if method == "pca" else umap_positions(points)),
        rgb=tuple(as_colours(components)),
        locations=tuple(places),
        groupings=tuple(_groupings(manifest, values, drawn)),
    )
    return _write(folder, data)


def _write(folder: Path, data: EmbeddingMap) -> list[Path]:
    pictures = (
        {folder / f"{name}.svg": standalone(chart) for name, chart in embedding_charts(data).items()} if data.points else {}
    )
    try:
        for path, text in pictures.items():
            write_whole(path, text)
        for stale in set(folder.glob("*.svg")) - set(pictures):
            stale.unlink()
        data.save(folder)
    except OSError as error:
        raise EmbeddingError(f"{folder}: the map cannot be written ({error.strerror or error}); make room") from error
    return list(pictures)


def _places(table: "parquet.Table", rows: np.ndarray) -> list[tuple[float, float] | None]:
    columns = (table.column(name).to_pylist() for name in ("latitude", "longitude"))
    pairs = list(zip(*columns, strict=True))
    return [None if None in pairs[row] else (round(pairs[row][0], 4), round(pairs[row][1], 4)) for row in rows.tolist()]


def _rounded(points: np.ndarray) -> tuple[tuple[float, float], ...]:
    return tuple((float(f"{x:.5g}"), float(f"{y:.5g}")) for x, y in points.tolist())


def _groupings(manifest: dict[str, Any], values: dict[str, list], drawn: np.ndarray) -> list[Grouping]:
    """The ways to colour; several classes of one tile have no colour."""
    found = []
    for name, facts in manifest["classes"].items():
        if not facts["several"]:
            found.append(_grouping(facts["title"], facts["names"], facts["colours"], values[name], drawn))
    return [*found, _grouping("Split", list(manifest["num_tiles"]), (), values["split"], drawn)]


def _grouping(
    title: str, names: Sequence[str], colours: Sequence[str], values: Sequence[str | None], drawn: np.ndarray
) -> Grouping:
    """Of more than MAX_CLASSES classes that there are, the most frequent ones, and the others together."""
    counts = Counter(values)
    there = [name for name in names if counts[name]]
    kept, colour_of = there, dict(zip(names, colours, strict=False))
    if len(there) > MAX_CLASSES:
        kept = sorted(there, key=lambda name: -counts[name])[: MAX_CLASSES - 1]
    shown = {name: number for number, name in enumerate(kept)}
    shades = [colour_of.get(name, PALETTE[number]) for number, name in enumerate(kept)]
    rest, tallies = [name for name in there if name not in shown], [counts[name] for name in kept]
    if rest:
        shown |= dict.fromkeys(rest, len(kept))
        kept, shades = [*kept, f"{len(rest)} other classes"], [*shades, _OTHER_COLOUR]
        tallies.append(sum(counts[name] for name in rest))
    return Grouping(
        title=title,
        names=tuple(kept),
        colours=tuple(shades),
        counts=tuple(tallies),
        num_unknown=counts[None],
        classes=tuple(shown.get(values[position], UNKNOWN) for position in drawn.tolist()),
    )
