"""Points by the letter of the standards: GeoParquet 1.1 and WKB, decoded by hand."""

import json
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest

from mpmae.embed.geoparquet import geo_metadata, wkb_points
from tests.embed.made import MadeTiles, run


def test_a_point_byte_by_byte():
    (point,) = wkb_points(np.array([[51.5, -0.125]]))
    assert point.hex() == "01" + "01000000" + "000000000000c0bf" + "0000000000c04940"
    assert struct.unpack("<BIdd", point) == (1, 1, -0.125, 51.5)


def test_an_unknown_place_has_no_point():
    assert wkb_points(np.array([[np.nan, 1], [1, np.nan], [np.nan, np.nan]])) == [None] * 3


def test_the_metadata_has_what_the_standard_requires():
    geo = geo_metadata(np.array([[10.0, 20.0], [np.nan, np.nan], [-5.0, 30.0]]))
    assert set(geo) == {"version", "primary_column", "columns"}
    assert geo["version"] == "1.1.0"
    column = geo["columns"][geo["primary_column"]]
    assert column == {"encoding": "WKB", "geometry_types": ["Point"], "bbox": [20, -5, 30, 10]}
    assert "bbox" not in geo_metadata(np.full((2, 2), np.nan))["columns"]["geometry"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geo")
    run(folder)
    return sorted(folder.glob("*.parquet"))


def test_the_files_are_geoparquet(files):
    source, first = MadeTiles(), 0
    for file in files:
        geo = json.loads(pq.read_schema(file).metadata[b"geo"])
        table = pq.read_table(file)
        assert str(table.schema.field(geo["primary_column"]).type) == "binary"
        west, south, east, north = geo["columns"]["geometry"]["bbox"]
        for row in table.to_pylist():
            place = source.places[first]
            first += 1
            if np.isnan(place).any():
                assert (row["geometry"], row["latitude"], row["longitude"]) == (None,) * 3
                continue
            assert struct.unpack("<BIdd", row["geometry"]) == (1, 1, place[1], place[0])
            assert (row["latitude"], row["longitude"]) == tuple(place)
            assert west <= place[1] <= east
            assert south <= place[0] <= north
    assert first == len(source)
