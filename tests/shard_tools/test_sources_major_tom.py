"""Major TOM Core: parquet files with a GeoTIFF per band and cell."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpmae.errors import SourceError
from mpmae.shard_tools.sources import open_source
from tests.shard_tools.foreign_sets import geotiff, rows_by_id

SIDE = 36
RATIOS = {"B02": 1, "B05": 2, "B09": 6, "B8A": 2}
CELLS = ["199U_1099R", "0U_199R", "12D_3L", "451U_946L"]


def write_parquet(path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=1)


@pytest.fixture
def core(tmp_path):
    rng = np.random.default_rng(5)
    root, values = tmp_path / "majortom", {}
    for part, cells in (("part_00001", CELLS[:3]), ("part_00002", CELLS[3:])):
        columns: dict[str, list] = {"product_id": [], "grid_cell": list(cells), "timestamp": ["x"] * len(cells)}
        columns |= {band: [] for band in RATIOS} | {"cloud_mask": [b"png"] * len(cells), "thumbnail": [b"png"] * len(cells)}
        for cell in cells:
            columns["product_id"].append("S2A_MSIL2A_20200223T033651_N0214_R061_T48QUE")
            for band, ratio in RATIOS.items():
                plane = rng.integers(1, 9000, (1, SIDE // ratio, SIDE // ratio)).astype(np.uint16)
                plane[0, 0, 0] = 0
                values[cell, band] = plane[0].repeat(ratio, 0).repeat(ratio, 1)
                columns[band].append(geotiff(None, plane, nodata=0, pixel_m=10 * ratio))
        write_parquet(root / "Core-S2L2A" / "images" / f"{part}.parquet", columns)
    write_parquet(root / "Core-S2L2A" / "metadata.parquet", {"grid_cell": CELLS})
    radar: dict[str, list] = {"product_id": [], "grid_cell": [CELLS[2], CELLS[0]], "vv": [], "vh": []}
    for cell, hour in ((CELLS[2], "05"), (CELLS[0], "17")):
        radar["product_id"].append(f"S1A_IW_GRDH_1SDV_20200224T{hour}1230_20200224T{hour}1255_031415_039D3E_rtc")
        for column in ("vv", "vh"):
            plane = rng.uniform(0.001, 1, (1, SIDE, SIDE)).astype(np.float32)
            plane[0, 3, 5] = -32768
            values[cell, column] = plane[0]
            radar[column].append(geotiff(None, plane, nodata=-32768))
    write_parquet(root / "Core-S1RTC" / "images" / "part_00001.parquet", radar)
    dem = [rng.normal(300, 9, (1, SIDE // 3, SIDE // 3)).astype(np.float32) for _ in CELLS]
    values |= {(cell, "DEM"): plane[0].repeat(3, 0).repeat(3, 1) for cell, plane in zip(CELLS, dem, strict=True)}
    table = {"grid_cell": CELLS, "DEM": [geotiff(None, p, pixel_m=30) for p in dem], "compressed": [b"?"] * 4}
    write_parquet(root / "Core-DEM" / "images" / "part_00001.parquet", table)
    return root, values


@pytest.mark.parametrize("side", [12, 10])
def test_cells_are_cut_and_brought_to_one_grid(core, side):
    root, values = core
    with open_source(root, "major_tom", {"tile_size_px": str(side)}) as source:
        assert source.num_tiles == 4 * 9
        assert source.bands["sentinel2"] == ("B2", "B5", "B8A", "B9")
        rows = rows_by_id(source)
        for cell in (CELLS[1], CELLS[3]):
            for i in range(3):
                for j in range(3):
                    tile = source.read_tile(rows[f"{cell}_r{i}c{j}"])
                    window = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
                    for band, ours in zip(("B02", "B05", "B8A", "B09"), tile.values["sentinel2"], strict=True):
                        np.testing.assert_array_equal(ours, values[cell, band][window])
                    np.testing.assert_array_equal(tile.values["dem"][0], values[cell, "DEM"][window])
        assert any("6 px" in note for note in source.notes()) == (side == 10)


def test_radar_in_decibels_by_pass_and_missing_cells(core):
    root, values = core
    with open_source(root, "major_tom", {"tile_size_px": str(SIDE)}) as source:
        rows = rows_by_id(source)
        for cell, filled in ((CELLS[2], slice(2, 4)), (CELLS[0], slice(0, 2))):
            radar = source.read_tile(rows[cell]).values["sentinel1_rtc"]
            for ours, column in zip(radar[filled], ("vv", "vh"), strict=True):
                linear = values[cell, column]
                assert np.isneginf(ours[3, 5])
                valid = linear > 0
                np.testing.assert_allclose(ours[valid], 10 * np.log10(linear[valid]), rtol=1e-5)
            assert np.isneginf(np.delete(radar, filled, axis=0)).all()
        assert np.isneginf(source.read_tile(rows[CELLS[1]]).values["sentinel1_rtc"]).all()
        assert "sentinel1_rtc: 2 cells have none (0U_199R, 451U_946L); their tiles lack it" in source.notes()


def test_place_and_month(core):
    root, _ = core
    with open_source(root, "major_tom", {"tile_size_px": "12"}) as source:
        rows = rows_by_id(source)
        upper, lower = (source.read_tile(rows[f"12D_3L_r{i}c1"], ["lat", "lon", "month"]).values for i in (0, 2))
    lats = [np.degrees(np.arctan2(*values["lat"])) for values in (upper, lower)]
    assert lats[0] - lats[1] == pytest.approx(240 / 111_130, abs=2e-5)
    np.testing.assert_allclose(upper["month"], [np.sin(np.pi / 3), np.cos(np.pi / 3)], atol=1e-6)


def test_tiles_of_a_cell_never_cross_splits(core):
    root, _ = core
    with open_source(root, "major_tom", {"tile_size_px": "12", "val_fraction": "0.5"}) as source:
        cells = [
            {source.read_tile(int(r), ["month"]).tile_id.rpartition(b"_r")[0] for r in rows}
            for rows in source.splits.values()
        ]
    assert [len(found) for found in cells] == [2, 2]
    assert not cells[0] & cells[1]


def test_the_sentinel2_folder_alone_and_repeated_cells(core):
    root, _ = core
    part = root / "Core-S2L2A" / "images" / "part_00001.parquet"
    (part.parent / "part_00003.parquet").write_bytes(part.read_bytes())
    with open_source(root / "Core-S2L2A", "major_tom", {"tile_size_px": "36"}) as source:
        assert source.pixels == ("sentinel2",)
        assert source.num_tiles == 4
        assert "sentinel2: 3 rows of cells that came before; they are left out" in source.notes()


def test_damage_names_tile_and_modality(core):
    root, _ = core
    path = root / "Core-S2L2A/images/part_00002.parquet"
    sound = path.read_bytes()
    path.write_bytes(sound[:-50])
    with pytest.raises(SourceError, match=r"part_00002\.parquet: not a readable parquet file"):
        open_source(root, "major_tom", {"tile_size_px": "12"})
    broken = pq.read_table(root / "Core-DEM/images/part_00001.parquet").to_pydict()
    broken["DEM"][1] = broken["DEM"][1][:300]
    write_parquet(root / "Core-DEM/images/part_00001.parquet", broken)
    path.write_bytes(sound)
    with open_source(root, "major_tom", {"tile_size_px": "36"}) as source:
        row = rows_by_id(source)[CELLS[1]]
        with pytest.raises(SourceError, match=rf"tile {CELLS[1]} \(row {row}\), dem: not a readable GeoTIFF"):
            source.read_tile(row)
        source.read_tile(row, ["sentinel2", "sentinel1_rtc"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "tile_size_px is missing"),
        ({"tile_size_px": "12", "modalities": "sentinel2,ndvi"}, "no layer for 'ndvi'"),
        ({"tile_size_px": "12", "modalities": "dem"}, "lacks sentinel2"),
        ({"tile_size_px": "12", "sentinel2": "l1c", "modalities": "sentinel2"}, "expected Core-S2L1C/images"),
    ],
)
def test_options_are_checked(core, options, expected):
    with pytest.raises(SourceError, match=expected):
        open_source(core[0], "major_tom", options)


def test_many_threads_read_the_same(core):
    with open_source(core[0], "major_tom", {"tile_size_px": "12"}) as source:
        expected = [source.read_tile(row).values for row in range(source.num_tiles)]
        source.close()
        wrong = []

        def work(seed: int) -> None:
            for row in np.random.default_rng(seed).permutation(source.num_tiles):
                values = source.read_tile(int(row)).values
                wrong.extend(n for n, v in values.items() if not np.array_equal(v, expected[row][n]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong
