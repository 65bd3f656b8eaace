"""Verify passes a good set and finds every kind of damage, naming shard and sample."""

import hashlib
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpmae.errors import ShardError, SourceError
from mpmae.files import TEMP_SUFFIX
from mpmae.shard_files import load_manifest
from mpmae.shard_format import index_bytes, index_name
from mpmae.shard_tools import output
from mpmae.shard_tools.build import build
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.subset import Wanted, subset
from mpmae.shard_tools.verify import verify

SHARD = "train-00001.tar"


def refresh_hashes(folder: Path) -> None:
    """Make the manifest agree with damaged files, as a faulty writer would have left it."""
    tree = json.loads((folder / "manifest.json").read_text())
    for shards in tree["splits"].values():
        for shard in shards:
            data = (folder / shard["name"]).read_bytes()
            shard["sha256"], shard["num_bytes"] = hashlib.sha256(data).hexdigest(), len(data)
            shard["index_sha256"] = hashlib.sha256((folder / index_name(shard["name"])).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(tree))


def read_rows(folder: Path, name: str = SHARD) -> np.ndarray:
    return np.load(folder / index_name(name), allow_pickle=False)


def write_rows(folder: Path, rows: np.ndarray, first_ordinal: int = 3, name: str = SHARD) -> None:
    (folder / index_name(name)).write_bytes(index_bytes(rows))
    (folder / name.replace(".tar", ".idx")).write_bytes(output.dali_index(load_manifest(folder), rows, first_ordinal))
    refresh_hashes(folder)


def overwrite_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    overwrite_bytes(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


@pytest.mark.parametrize("codec", ["raw", "lz4"])
def test_a_good_set_passes(codec, source_32, tmp_path):
    build(source_32, tmp_path / "set", codec=codec, max_samples_per_shard=3, progress=False)
    report = verify(tmp_path / "set", source_32)
    assert report.problems == []
    assert (report.num_shards, report.num_samples, report.num_compared) == (5, 10, 10)
    assert report.num_bytes == sum(p.stat().st_size for p in (tmp_path / "set").glob("*.tar"))


def test_a_real_set_passes(real_source, tmp_path):
    build(real_source, tmp_path / "set", progress=False)
    report = verify(tmp_path / "set", real_source)
    assert report.problems == []
    assert report.num_compared == report.num_samples > 80


def test_flipped_byte_of_padding_is_found_by_the_hash(own_shards):
    rows = read_rows(own_shards)
    flip(own_shards / SHARD, int(rows[1]["offset"][0] + rows[1]["size"][0]))
    (problem,) = verify(own_shards).problems
    assert SHARD in problem
    assert "sha256" in problem


def test_flipped_value_is_found_against_the_source(source_32, tmp_path):
    build(source_32, tmp_path / "set", codec="raw", max_samples_per_shard=3, progress=False)
    rows = read_rows(tmp_path / "set")
    flip(tmp_path / "set" / SHARD, int(rows[2]["offset"][1]) + 100)
    refresh_hashes(tmp_path / "set")
    assert verify(tmp_path / "set").ok
    (problem,) = verify(tmp_path / "set", source_32).problems
    assert f"{SHARD}, sample 00000005: sentinel1 not equal to tile synth_{rows[2]['row']:08d}" in problem


def test_corrupt_lz4_names_sample_and_modality(own_shards):
    rows = read_rows(own_shards)
    overwrite_bytes(own_shards / SHARD, int(rows[1]["offset"][2]), b"\xff" * 60)
    refresh_hashes(own_shards)
    (problem,) = verify(own_shards).problems
    assert f"{SHARD}, sample 00000004: aster: corrupt LZ4 block" in problem


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.95])
def test_truncated_tar(kept, own_shards, source_32):
    path = own_shards / SHARD
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    problems = verify(own_shards, source_32).problems
    assert any(f"{SHARD}: {int(len(data) * kept)} bytes, the manifest says {len(data)}" in p for p in problems), problems
    assert any("sample 0000000" in p and "the tar is cut off in" in p and "samples are missing" in p for p in problems)
    assert len(problems) == 2, problems


def test_a_broken_header_does_not_hide_the_next_samples(own_shards):
    rows = read_rows(own_shards)
    header = int(rows[0]["offset"][3]) - 512
    overwrite_bytes(own_shards / SHARD, header + 20, b"\xff")
    overwrite_bytes(own_shards / SHARD, int(rows[2]["offset"][0]), b"\xff" * 60)
    report = verify(own_shards)
    assert any(
        f"sample 00000003: byte {header}: no tar header of '00000003.dynamic_world.lz4'" in p for p in report.problems
    )
    assert any("sample 00000005: sentinel2: " in p for p in report.problems)
    assert len(report.problems) == 3
    assert (report.num_samples, report.num_decoded) == (10, 9)


def test_wrong_member_name(own_shards):
    data = (own_shards / SHARD).read_bytes()
    other = data.replace(b"00000004.aster.lz4", b"00000009.aster.lz4")
    header = other.index(b"00000009.aster.lz4")
    checksum = sum(other[header : header + 148]) + 8 * 32 + sum(other[header + 156 : header + 512])
    other = other[: header + 148] + b"%06o\0 " % checksum + other[header + 156 :]
    (own_shards / SHARD).write_bytes(other)
    refresh_hashes(own_shards)
    (problem,) = verify(own_shards).problems
    assert f"{SHARD}, sample 00000004: byte {header}: " in problem
    assert "tar member '00000009.aster.lz4', expected the file '00000004.aster.lz4'" in problem


def test_wrong_presence(own_shards):
    rows = read_rows(own_shards)
    rows[1]["presence"] ^= 1 << 1
    rows[2]["presence"] |= np.uint64(1 << 63)
    write_rows(own_shards, rows)
    first, second = verify(own_shards).problems
    assert "sample 00000004: the index is wrong about the presence of sentinel1" in first
    assert "sample 00000005: the index sets presence bits of no modality" in second


def test_an_index_that_does_not_match_its_tar(own_shards):
    rows = read_rows(own_shards)
    rows[2]["offset"][4] += 512
    write_rows(own_shards, rows)
    (problem,) = verify(own_shards).problems
    assert "train-00001.index.npy does not fit train-00001.tar: sample 2: canopy_height_eth at byte" in problem
    other = read_rows(own_shards, "train-00000.tar")
    write_rows(own_shards, other)
    (problem,) = verify(own_shards).problems
    assert "train-00001.index.npy does not fit train-00001.tar" in problem


def shift_data(folder: Path, rows: np.ndarray) -> None:
    """Move 512 bytes from one member to the next, in the index alone: adjacent still, but not what the tar's headers say."""
    rows[1]["size"][0] -= 512
    rows[1]["size"][1] += 512
    rows[1]["offset"][1] -= 512
    write_rows(folder, rows)


def test_sizes_that_only_the_headers_contradict(own_shards):
    rows = read_rows(own_shards)
    shift_data(own_shards, rows)
    problems = verify(own_shards).problems
    assert any("sample 00000004: byte" in p and "by its header" in p and "by the index" in p for p in problems)


def test_a_row_twice_and_a_row_missing(own_shards, source_32):
    rows = read_rows(own_shards)
    lost = int(rows[0]["row"])
    rows[0]["row"] = rows[1]["row"]
    write_rows(own_shards, rows)
    assert any(f"row {rows[1]['row']} is in the set twice" in p for p in verify(own_shards).problems)
    assert any(f"row {rows[1]['row']} is in the set twice" in p for p in verify(own_shards, fast=True).problems)
    problems = verify(own_shards, source_32).problems
    assert any(f"split train lacks tile synth_{lost:08d} (row {lost})" in p for p in problems)
    assert any("scalars say tile" in p for p in problems)


def test_tiles_that_the_build_left_out_are_not_missed(built_32, source_32, tmp_path):
    build(source_32, tmp_path / "set", splits=["train"], progress=False)
    subset(tmp_path / "set", tmp_path / "few", Wanted(num_samples=6))
    rows = {t.row for t in ShardSet(tmp_path / "set").tiles(None)} - {t.row for t in ShardSet(tmp_path / "few").tiles(None)}
    assert len([p for p in verify(tmp_path / "few", source_32).problems if "lacks tile" in p]) == 2
    (tmp_path / "few/skipped.json").write_text(json.dumps({"tiles": [{"row": row} for row in rows]}))
    assert not any("lacks tile" in p for p in verify(tmp_path / "few", source_32).problems)
    (tmp_path / "few/skipped.json").write_text("[]")
    assert any("cannot be read as a list of skipped tiles" in p for p in verify(tmp_path / "few", source_32).problems)


def test_a_sample_in_the_wrong_split(own_shards, own_source):
    splits = json.loads((own_source / "tiny_splits.json").read_text())
    splits["val"], splits["test"] = splits["test"], splits["val"]
    (own_source / "tiny_splits.json").write_text(json.dumps(splits))
    problems = verify(own_shards, own_source).problems
    assert any("its fingerprint differs" in p for p in problems)
    assert any("val-00000.tar, sample 00000000: row" in p and "is not in split val" in p for p in problems)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SHARD, "cannot be read"),
        ("train-00001.index.npy", "index.npy is missing"),
        ("train-00001.idx", "idx is missing"),
    ],
)
def test_missing_files(name, expected, own_shards, source_32):
    (own_shards / name).unlink()
    (problem,) = verify(own_shards, source_32).problems
    assert name in problem
    assert expected in problem


@pytest.mark.parametrize(("name", "expected"), [("train-00001.index.npy", "sha256"), ("train-00001.idx", "does not list")])
def test_changed_indices(name, expected, own_shards):
    flip(own_shards / name, -3 % (own_shards / name).stat().st_size)
    (problem,) = verify(own_shards).problems
    assert name in problem
    assert expected in problem


def test_files_that_do_not_belong(own_shards):
    (own_shards / "train-00007.tar").write_bytes(b"")
    (own_shards / f"val-00000.tar{TEMP_SUFFIX}").write_bytes(b"")
    problems = verify(own_shards).problems
    assert len(problems) == 2
    assert all("does not belong to the set" in p for p in problems)


def test_trailing_bytes(own_shards):
    with (own_shards / SHARD).open("ab") as file:
        file.write(b"\0" * 512)
    refresh_hashes(own_shards)
    index, tar = verify(own_shards).problems
    assert "train-00001.index.npy does not fit" in index
    assert f"{SHARD}: byte" in tar
    assert "does not end after its 3 samples" in tar


def test_a_class_id_out_of_range(own_shards):
    manifest, rows = load_manifest(own_shards), read_rows(own_shards)
    offset = manifest.scalars_dtype.fields["biome"][1]
    overwrite_bytes(own_shards / SHARD, int(rows[0]["offset"][-1]) + offset, np.int16(14).tobytes())
    refresh_hashes(own_shards)
    (problem,) = verify(own_shards).problems
    assert "sample 00000003: biome: class id 14, expected -2 to 13" in problem


def test_changed_source_values(own_shards, own_source):
    with h5py.File(own_source / "tiny.h5", "r+") as file:
        file["lat"][4, 1] += 1
    problems = verify(own_shards, own_source).problems
    assert any("lat not equal to tile synth_00000004 (row 4)" in p for p in problems)


def test_unusable_inputs(own_shards, tmp_path):
    with pytest.raises(SourceError, match="nowhere does not exist"):
        verify(own_shards, tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        verify(tmp_path)


def test_numpy_reads_the_index_without_the_package(built_32):
    rows = np.load(io.BytesIO((built_32 / "train-00000.index.npy").read_bytes()))
    assert rows.dtype.names == ("row", "presence", "offset", "size")


@pytest.mark.parametrize("name", [SHARD, "train-00001.index.npy", "train-00001.idx"])
def test_fast_finds_every_changed_byte_without_decoding(name, own_shards):
    report = verify(own_shards, fast=True)
    assert (report.ok, report.num_samples, report.num_decoded, report.num_shards) == (True, 10, 0, 5)
    assert report.num_bytes == sum(p.stat().st_size for p in own_shards.glob("*.tar"))
    flip(own_shards / name, (own_shards / name).stat().st_size - 5)
    (problem,) = verify(own_shards, fast=True).problems
    assert name in problem


def test_fast_or_with_the_source(built_32, source_32):
    with pytest.raises(ShardError, match="compares no values"):
        verify(built_32, source_32, fast=True)


def test_problems_do_not_depend_on_the_threads(own_shards):
    rows = read_rows(own_shards)
    overwrite_bytes(own_shards / SHARD, int(rows[1]["offset"][2]), b"\xff" * 60)
    (own_shards / "val-00000.tar").unlink()
    (own_shards / "test-00000.index.npy").unlink()
    one = verify(own_shards, workers=1)
    assert len(one.problems) == 4
    assert verify(own_shards, workers=4) == one
    with pytest.raises(ShardError, match="workers 0; expected at least 1"):
        verify(own_shards, workers=0)
