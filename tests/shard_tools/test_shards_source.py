"""Every kind of damaged or inconsistent MMEarth folder is refused with the file, the key and the tile named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpmae.errors import SourceError
from mpmae.shard_tools.build import build
from mpmae.shard_tools.source import MMEarthSource

Change = Callable[[Path], None]


def in_json(kind: str, change: Callable[[dict], None]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / f"tiny_{kind}.json"
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return apply


def in_h5(change: Callable[[h5py.File], None]) -> Change:
    def apply(folder: Path) -> None:
        with h5py.File(folder / "tiny.h5", "r+") as file:
            change(file)

    return apply


def replace(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(file: h5py.File) -> None:
        values = file[name][:]
        del file[name]
        file[name] = make(values)

    return in_h5(change)


def cut(folder: Path) -> None:
    path = folder / "tiny.h5"
    path.write_bytes(path.read_bytes()[:-5000])


def no_level_of_row_2(file: h5py.File) -> None:
    records = file["metadata"][:]
    records[2] = (records[2]["tile_id"], b"l3x")
    file["metadata"][:] = records


def set_first(tree: dict, value) -> None:
    tree["train"][0] = value


def group_for_aster(file: h5py.File) -> None:
    del file["aster"]
    file.create_group("aster")


BAD_FOLDERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no folder": (lambda f: shutil.rmtree(f), ("tiny does not exist",)),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], ("not an MMEarth folder", "but nothing")),
    "foreign folder": (
        lambda f: [p.rename(f / f"{i}.tif") for i, p in enumerate(sorted(f.iterdir()))],
        ("not an MMEarth folder", "0.tif"),
    ),
    "h5 missing": (lambda f: (f / "tiny.h5").unlink(), ("lacks tiny.h5",)),
    "several h5": (lambda f: shutil.copy(f / "tiny.h5", f / "other.h5"), ("several HDF5 files", "other.h5, tiny.h5")),
    "h5 truncated": (cut, ("tiny.h5 is not a whole HDF5 file", "truncated")),
    "h5 is not HDF5": (lambda f: (f / "tiny.h5").write_text("hello"), ("tiny.h5 is not a whole HDF5 file",)),
    "splits missing": (lambda f: (f / "tiny_splits.json").unlink(), ("tiny_splits.json cannot be read",)),
    "stats missing": (lambda f: (f / "tiny_band_stats.json").unlink(), ("tiny_band_stats.json", "mpmae-shards stats")),
    "tile_info broken": (lambda f: (f / "tiny_tile_info.json").write_text('{"a": '), ("tiny_tile_info.json is not JSON",)),
    "splits not UTF-8": (lambda f: (f / "tiny_splits.json").write_bytes(b"\xff\xfe\xff"), ("tiny_splits.json is not JSON",)),
    "splits a list": (lambda f: (f / "tiny_splits.json").write_text("[]"), ("tiny_splits.json: expected an object",)),
    "row out of range": (in_json("splits", lambda t: set_first(t, 10)), ("split train: 1 rows are not in 0..9 (10)",)),
    "negative row": (in_json("splits", lambda t: set_first(t, -1)), ("split train", "(-1)")),
    "row not whole": (
        in_json("splits", lambda t: set_first(t, 1.5)),
        ("split train: expected a list of whole row",),
    ),
    "row twice": (in_json("splits", lambda t: t["train"].append(t["train"][0])), ("split train: 1 rows twice",)),
    "row in two splits": (in_json("splits", lambda t: t["val"].append(t["train"][0])), ("in both train and val",)),
    "split name": (in_json("splits", lambda t: t.update({"../x": []})), ("split name '../x'",)),
    "no sentinel2": (in_h5(lambda h: h.pop("sentinel2")), ("no dataset sentinel2",)),
    "no metadata": (in_h5(lambda h: h.pop("metadata")), ("no dataset metadata",)),
    "metadata fields": (
        replace("metadata", lambda v: v.astype([("id", "S100"), ("S2_type", "S10")])),
        ("metadata is", "tile_id and S2_type"),
    ),
    "product level": (in_h5(no_level_of_row_2), ("S2_type is neither l1c nor l2a in 1 rows", "row 2: 'l3x'")),
    "tile without info": (
        in_json("tile_info", lambda t: t.pop("synth_00000003")),
        ("tiny_tile_info", "synth_00000003"),
    ),
    "info without level": (
        in_json("tile_info", lambda t: t["synth_00000004"].pop("S2_type")),
        ("S2_type of 1 tiles differs", "synth_00000004: none"),
    ),
    "wrong ndim": (replace("aster", lambda v: v[:, 0]), ("aster has shape (10, 32, 32), expected 4 dimensions",)),
    "wrong ndim of a vector": (replace("era5", lambda v: v[:, 0]), ("era5 has shape (10,), expected 2 dimensions",)),
    "wrong length": (replace("dynamic_world", lambda v: v[:7]), ("dynamic_world has 7 rows, but metadata has 10",)),
    "wrong bands": (replace("sentinel1", lambda v: v[:, :4]), ("sentinel1 has 4 bands, expected 8 (asc_VV",)),
    "wrong one-hot length": (replace("biome", lambda v: v[:, :13]), ("biome has 13 bands, expected 14",)),
    "other tile size": (
        replace("esa_worldcover", lambda v: v[..., :16, :16]),
        ("different tile sizes", "worldcover 16"),
    ),
    "not square": (replace("aster", lambda v: v[..., :16]), ("aster has tiles of 32 x 16 px",)),
    "float64": (replace("aster", lambda v: v.astype("f8")), ("aster has dtype float64", "at most 4 bytes")),
    "float64 vector": (replace("era5", lambda v: v.astype("f8")), ("era5 has dtype float64",)),
    "int64": (replace("sentinel2", lambda v: v.astype("i8")), ("sentinel2 has dtype int64",)),
    "complex": (replace("sentinel1", lambda v: v.astype("c8")), ("sentinel1 has dtype complex64",)),
    "bool": (replace("sentinel2_scl", lambda v: v > 0), ("sentinel2_scl has dtype bool, expected integers",)),
    "text": (replace("dynamic_world", lambda v: v.astype("S1")), ("dynamic_world has dtype |S1",)),
    "float classes": (replace("esa_worldcover", lambda v: v.astype("f4")), ("esa_worldcover has dtype float32", "integers")),
    "float one-hot": (replace("eco_region", lambda v: v.astype("f4")), ("eco_region has dtype float32, expected integers",)),
    "a group": (in_h5(group_for_aster), ("aster is a group, expected a dataset",)),
    "stats of a modality": (in_json("band_stats", lambda t: t.pop("era5")), ("tiny_band_stats.json: era5: missing",)),
    "stats of a level": (in_json("band_stats", lambda t: t.pop("sentinel2_l1c")), ("sentinel2_l1c: missing",)),
    "stats length": (in_json("band_stats", lambda t: t["aster"]["mean"].pop()), ("aster: mean has 1 values, expected 2",)),
    "stats not finite": (
        in_json("band_stats", lambda t: t["sentinel1"]["mean"].__setitem__(1, float("nan"))),
        ("sentinel1: mean of band asc_VH is nan",),
    ),
    "stats beyond floats": (
        in_json("band_stats", lambda t: t["sentinel1"].update(mean=[0, -(10**400), *[0] * 6])),
        ("sentinel1: mean of band asc_VH is -inf, expected a finite number",),
    ),
    "stats null": (in_json("band_stats", lambda t: t["lat"]["std"].__setitem__(0, None)), ("lat: std of band sin is nan",)),
    "std 0": (
        in_json("band_stats", lambda t: t["canopy_height_eth"]["std"].__setitem__(1, 0)),
        ("canopy_height_eth: std of band height_std is 0, expected a finite number above 0",),
    ),
    "std of B10 at l1c": (
        in_json("band_stats", lambda t: t["sentinel2_l1c"]["std"].__setitem__(10, 0.0)),
        ("sentinel2_l1c: std of band B10 is 0",),
    ),
    "stats text": (in_json("band_stats", lambda t: t["lon"].update(max=["a", "b"])), ("lon: max is not a list of numbers",)),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_refuses_a_bad_folder(case, own_source):
    change, fragments = BAD_FOLDERS[case]
    change(own_source)
    with pytest.raises(SourceError) as caught:
        MMEarthSource(own_source)
    assert len(caught.value.problems) == 1, "one fault, one problem"
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_tells_all_problems_at_once(own_source):
    for case in ("row twice", "wrong bands", "std 0", "tile without info"):
        BAD_FOLDERS[case][0](own_source)
    with pytest.raises(SourceError) as caught:
        MMEarthSource(own_source)
    assert len(caught.value.problems) == 4


def test_a_file_is_not_a_folder(own_source):
    with pytest.raises(SourceError, match=r"tiny\.h5 is a file: give the MMEarth folder"):
        MMEarthSource(own_source / "tiny.h5")


def test_unknown_or_absent_modality(own_source):
    in_h5(lambda h: h.pop("aster"))(own_source)
    with pytest.raises(SourceError) as caught:
        MMEarthSource(own_source, ["aster", "radar"])
    text = str(caught.value)
    assert "'aster' is not in tiny.h5" in text
    assert "'radar' is not in tiny.h5; it has sentinel2, sentinel1" in text
    assert "lack sentinel2" in text


def test_takes_what_is_no_fault(own_source):
    """An absent modality, an unknown dataset, bad statistics of a quality layer, no B10 statistics at level 2A."""
    in_h5(lambda h: h.pop("canopy_height_eth"))(own_source)
    in_h5(lambda h: h.create_dataset("extra", data=[1]))(own_source)

    def spoil(tree: dict) -> None:
        tree["sentinel2_cloudprod"]["std"] = [0.0]
        for quantity in ("mean", "std", "min", "max"):
            tree["sentinel2_l2a"][quantity][10] = float("inf" if quantity == "min" else "nan")

    in_json("band_stats", spoil)(own_source)
    with MMEarthSource(own_source) as source:
        assert "canopy_height_eth" not in source.modalities
        assert source.ignored == ("extra",)
        assert "sentinel2_cloudprod" not in source.band_stats
        b10 = source.band_stats["sentinel2_l2a"]
        assert (b10.mean[10], b10.std[10], b10.min[10], b10.max[10]) == (0, 1, 0, 0)


def test_faults_of_other_modalities_do_not_matter(own_source):
    BAD_FOLDERS["wrong bands"][0](own_source)
    BAD_FOLDERS["stats of a modality"][0](own_source)
    with MMEarthSource(own_source, ["sentinel2", "aster"]) as source:
        assert source.modalities == ("sentinel2", "aster")


def spoil_chunk(folder: Path, name: str, row: int) -> None:
    with h5py.File(folder / "tiny.h5") as file:
        dataset = file[name]
        info = dataset.id.get_chunk_info_by_coord((row,) + (0,) * (dataset.ndim - 1))
    with (folder / "tiny.h5").open("r+b") as file:
        file.seek(info.byte_offset)
        file.write(b"\xff" * min(info.size, 64))


def test_a_corrupt_chunk_names_tile_row_and_modality(own_source, tmp_path):
    spoil_chunk(own_source, "sentinel1", 6)
    with MMEarthSource(own_source) as source:
        source.read_tile(5)
        with pytest.raises(SourceError, match=r"tiny\.h5: tile synth_00000006 \(row 6\), sentinel1: cannot be read"):
            source.read_tile(6)
    with pytest.raises(SourceError, match="synth_00000006"):
        build(own_source, tmp_path / "set", progress=False)
    assert not (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("indices", "value", "found"), [([1, 5], 1, "2 non-zero values"), ([3], 7, "1 non-zero"), ([2, 3], 255, "2 non-zero")]
)
def test_a_row_that_is_not_one_hot_names_the_tile(indices, value, found, own_source, tmp_path):
    def change(file: h5py.File) -> None:
        row = np.zeros(14, np.uint8)
        row[indices] = value
        file["biome"][7] = row

    in_h5(change)(own_source)
    with pytest.raises(SourceError, match=rf"tile synth_00000007 \(row 7\): biome is not one-hot: {found}"):
        build(own_source, tmp_path / "set", progress=False)


def test_fingerprint_follows_the_content(own_source, tmp_path):
    def fingerprint(folder: Path) -> str:
        with MMEarthSource(folder) as source:
            return source.fingerprint

    first = fingerprint(own_source)
    assert first == fingerprint(Path(shutil.copytree(own_source, tmp_path / "elsewhere" / "tiny")))
    in_json("splits", lambda t: t["val"].append(t["train"].pop()))(own_source)
    second = fingerprint(own_source)
    in_h5(lambda h: h.create_dataset("extra", data=np.zeros(3)))(own_source)
    assert len({first, second, fingerprint(own_source)}) == 3


def test_real_folders_open(real_source):
    with MMEarthSource(real_source) as source:
        assert source.num_tiles == sum(len(rows) for rows in source.splits.values())
        assert source.tile_size_px == (128 if "128" in source.name else 64)
        assert source.ignored == ()
