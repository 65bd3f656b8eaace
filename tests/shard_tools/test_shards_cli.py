"""The command line: what it prints, where, and its exit codes; the summary and the contact sheet."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from mpmae.errors import ShardError
from mpmae.shard_tools.build import build
from mpmae.shard_tools.cli import main
from mpmae.shard_tools.contact_sheet import contact_sheet
from mpmae.shard_tools.histograms import histograms
from mpmae.shard_tools.inspect import summarise


def test_synth_build_verify_stats_inspect(tmp_path, capsys):
    source, shards = str(tmp_path / "synth"), str(tmp_path / "shards")
    assert main(["synth", source, "--num-tiles", "10", "--tile-size-px", "16"]) == 0
    assert f"10 tiles of 16 px: {source}" in capsys.readouterr().out
    assert main(["build", source, shards, "--codec", "raw", "--seed", "3", "--shard-size-mb", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("train: 8 samples in 1 shards")
    assert out[-1] == f"shard set of synth (15 modalities, raw): {shards}"
    assert main(["verify", shards, "--source", source]) == 0
    assert capsys.readouterr().out.startswith("ok: 10 samples in 3 shards")
    assert main(["stats", shards, "--split", "all"]) == 0
    assert "sentinel2_l2a" in json.loads(capsys.readouterr().out)
    assert main(["stats", source, "--output", str(tmp_path / "stats.json")]) == 0
    assert json.loads((tmp_path / "stats.json").read_text()) == json.loads(
        (tmp_path / "synth/synth_band_stats.json").read_text()
    )
    capsys.readouterr()
    assert main(["inspect", shards, "--png", str(tmp_path / "sheet.png"), "--num-tiles", "2", "--split", "val"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"contact sheet: {tmp_path / 'sheet.png'}"


def test_errors_are_one_clean_message(tmp_path, capsys):
    assert main(["build", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path / 'nowhere'} does not exist\n"
    assert main(["inspect", str(tmp_path)]) == 2
    assert "mpmae-shards build SOURCE OUTPUT" in capsys.readouterr().err


def test_verify_problems_exit_with_1(own_shards, capsys):
    (own_shards / "val-00000.idx").unlink()
    assert main(["verify", str(own_shards)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("problem: ")
    assert captured.err.count("\n") == 1
    assert captured.out.startswith("1 problems: 10 samples")


def test_statistics_can_be_made_for_a_folder_without(own_source, capsys):
    (own_source / "tiny_band_stats.json").unlink()
    assert main(["build", str(own_source), str(own_source.parent / "set")]) == 2
    assert "mpmae-shards stats" in capsys.readouterr().err
    assert main(["stats", str(own_source), "--output", str(own_source / "tiny_band_stats.json")]) == 0
    assert main(["build", str(own_source), str(own_source.parent / "set")]) == 0


def test_runs_as_a_module_without_torch(built_32):
    code = (
        "import sys; from mpmae.shard_tools.cli import main; "
        f"code = main(['verify', {str(built_32)!r}]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "no progress bar when stderr is no terminal"
    result = subprocess.run(
        [sys.executable, "-m", "mpmae.shard_tools", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "{" not in result.stdout
    assert "synth" in result.stdout


def test_summary_counts(source_64, tmp_path):
    build(source_64, tmp_path / "set", max_samples_per_shard=10, progress=False)
    summary = summarise(tmp_path / "set")
    members = {m.name: m for m in summary.members}
    with h5py.File(source_64 / "synth64.h5") as file:
        present = np.isfinite(file["sentinel1"][:]).any(axis=(1, 2, 3)).mean()
    assert members["sentinel1"].present_fraction == pytest.approx(present)
    assert members["sentinel2"].raw_bytes == 13 * 64 * 64 * 2
    assert 0.2 < members["sentinel2"].member_bytes / members["sentinel2"].raw_bytes < 0.9
    assert [(s.name, s.num_shards, s.num_samples) for s in summary.splits] == [
        ("train", 4, 38),
        ("val", 1, 5),
        ("test", 1, 5),
    ]


def test_contact_sheet_shows_absent_modalities_as_grey_cells(source_64, tmp_path):
    build(source_64, tmp_path / "set", modalities=["sentinel2", "sentinel1", "aster"], progress=False)
    png = contact_sheet(tmp_path / "set", tmp_path / "sheet.png", num_tiles=4)
    image = np.asarray(Image.open(png).convert("RGB"))
    assert image.shape[0] > 500
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1000
    with pytest.raises(ShardError, match="no split 'x'"):
        contact_sheet(tmp_path / "set", tmp_path / "sheet.png", split="x")
    with pytest.raises(ShardError, match="cannot write"):
        contact_sheet(tmp_path / "set", tmp_path / "nowhere" / "sheet.png")


def test_contact_sheet_of_real_tiles(real_source, tmp_path):
    build(real_source, tmp_path / "set", splits=["val"], progress=False)
    assert contact_sheet(tmp_path / "set", tmp_path / "sheet.png", num_tiles=3).stat().st_size > 20_000


def test_fast_verify_says_so(own_shards, capsys):
    assert main(["verify", str(own_shards), "--fast", "--workers", "2"]) == 0
    assert "hashes only" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["verify", str(own_shards), "--fast", "--source", "x"])
    assert "not allowed with" in capsys.readouterr().err


def test_subset_merge_index(built_32, tmp_path, capsys):
    ids = tmp_path / "ids.txt"
    ids.write_text("synth_00000000\n\nsynth_00000003\n")
    first, second, merged = (str(tmp_path / name) for name in ("first", "second", "merged"))
    assert main(["subset", str(built_32), first, "--tile-ids", str(ids), "--rename", "train=few,val=few,test=few"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("few: 2 samples in 1 shards")
    assert main(["subset", str(built_32), second, "--splits", "train", "--fraction", "0.5"]) == 0
    capsys.readouterr()
    code = main(["merge", merged, first, second, "--keep-first", "--seed", "4"])
    assert code == 0, capsys.readouterr().err
    assert capsys.readouterr().out.splitlines()[-1].startswith("shard set of subset of tiny + subset of tiny (15 modalities")
    (tmp_path / "merged" / "few-00000.idx").unlink()
    assert main(["index", merged]) == 0
    assert capsys.readouterr().out.startswith("made few-00000.idx; 0 problems")
    (tmp_path / "merged" / "few-00000.index.npy").unlink()
    assert main(["index", merged]) == 1
    assert "give --source" in capsys.readouterr().err
    assert main(["subset", first, second]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["subset", first, str(tmp_path / "x"), "--tile-ids", str(tmp_path / "nowhere")]) == 2
    assert "cannot be read as a list of tile ids" in capsys.readouterr().err


def test_histograms(source_64, tmp_path, capsys):
    names = ["sentinel2", "aster", "dynamic_world", "biome"]
    build(source_64, tmp_path / "set", modalities=names, progress=False)
    png = tmp_path / "values.png"
    assert main(["inspect", str(tmp_path / "set"), "--histograms", str(png), "--split", "train"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"histograms: {png}"
    image = np.asarray(Image.open(png).convert("RGB"))
    assert image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    before = png.read_bytes()
    histograms(tmp_path / "set", png, "train")
    assert png.read_bytes() == before, "the sample is drawn by the seed of the set"
    for wrong in ({"split": "x"}, {"num_tiles": 0}):
        with pytest.raises(ShardError):
            histograms(tmp_path / "set", png, **wrong)
