"""Points as GeoParquet 1.1 says: well-known binary in a column, and the "geo" metadata of the file.

Sources: GeoParquet 1.1.0 (geoparquet.org/releases/v1.1.0), OGC 06-103r4 (simple features: WKB).

Shapes: N points.
"""

from typing import Any

import numpy as np

GEOMETRY = "geometry"
_WKB_POINT = np.dtype([("little_endian", "u1"), ("type", "<u4"), ("x", "<f8"), ("y", "<f8")])
_POINT_TYPE = 1


def wkb_points(locations: np.ndarray) -> list[bytes | None]:
    """The points of float64 [N, 2], latitude and longitude in degrees, as WKB: x = longitude; None where either is NaN."""
    points = np.zeros(len(locations), _WKB_POINT)
    points["little_endian"], points["type"] = 1, _POINT_TYPE
    points["y"], points["x"] = locations.T
    known = known_locations(locations).tolist()
    return [point.tobytes() if is_known else None for point, is_known in zip(points, known, strict=True)]


def known_locations(locations: np.ndarray) -> np.ndarray:
    """Which of float64 [N, 2] are known: bool [N]."""
    return np.isfinite(locations).all(axis=1)


def geo_metadata(locations: np.ndarray) -> dict[str, Any]:
    """The file's "geo" metadata; longitude and latitude of WGS 84 is what a column without `crs` is in."""
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Point"]}
    known = locations[known_locations(locations)]
    if len(known):
        (south, west), (north, east) = known.min(axis=0).tolist(), known.max(axis=0).tolist()
        column["bbox"] = [west, south, east, north]
    return {"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}
