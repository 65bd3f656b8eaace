"""Readers of other people's sets: each gives the `TileSource` of its format."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mpmae.errors import SourceError
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.sources.geotiff import GeoTiffSource
from mpmae.shard_tools.sources.major_tom import MajorTomSource
from mpmae.shard_tools.sources.options import Options
from mpmae.shard_tools.sources.ssl4eo import open_ssl4eo
from mpmae.shard_tools.sources.terramesh import TerraMeshSource
from mpmae.shard_tools.tile_source import TileSource


def _open_mmearth(path: Path, options: Mapping[str, str]) -> TileSource:
    Options("mmearth", options).check()
    return MMEarthSource(path)


FORMATS: dict[str, Callable[[Path, Mapping[str, str]], TileSource]] = {
    "mmearth": _open_mmearth,
    "terramesh": TerraMeshSource,
    "ssl4eo": open_ssl4eo,
    "geotiff": GeoTiffSource,
    "major_tom": MajorTomSource,
}


def open_source(path: Path, format: str, options: Mapping[str, str] | None = None) -> TileSource:
    """The tiles of the set at `path`, whose format is one of `FORMATS`; docs/new_source.md lists the options of each.

    Raises SourceError for an unknown format or option (naming the known ones) and with every problem of the set.
    """
    if format not in FORMATS:
        raise SourceError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    return FORMATS[format](Path(path), options or {})
