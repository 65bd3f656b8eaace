"""The command `mpmae-checkpoint` on a run folder."""

import fcntl
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpmae.checkpoint_format import load_meta
from mpmae.checkpoint_tools.cli import main
from mpmae.checkpoint_tools.readers import open_state
from mpmae.config import validate
from mpmae.engine.files import save_tensors
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.compatibility import checkpoint_meta

CONFIG = validate({"train": {"global_batch_size": 8}}, "test")
WEIGHTS = {"body.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(4), "head.frozen": torch.tensor([7.0])}


def write(folder: Path) -> None:
    """What an engine of two trained weights leaves, by hand."""
    (folder / "engine").mkdir()
    (folder / "engine" / "layout.json").write_text(json.dumps({"engine": "ddp"}))
    moments = {i: {"step": torch.tensor(20.0), "exp_avg": w + 1, "exp_avg_sq": w * 2} for i, w in enumerate(trained())}
    names = ["body.weight", "head.bias"]
    save_tensors(
        {"module": WEIGHTS, "optimizer": {"state": moments}, "parameter_names": names}, folder / "engine" / "ddp.pt"
    )
    save_file(WEIGHTS, folder / "model.safetensors")


def trained() -> list[torch.Tensor]:
    return [WEIGHTS["body.weight"], WEIGHTS["head.bias"]]


@pytest.fixture
def run(tmp_path) -> Path:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 9)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, write, checkpoint_meta(CONFIG, 1, step, "f" * 64, 2, None))
    (checkpoints.folder / "step-00000040" / "model.safetensors").write_bytes(b"cut off")
    (checkpoints.folder / "step-00000050.partial").mkdir()
    (checkpoints.folder / "step-00000060.abandoned").mkdir()
    (tmp_path / "run" / ".lock").touch()
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def test_inspect_says_what_is_whole(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    for words in ("step-00000040", "torn", "model.safetensors has 7 bytes", "unfinished", "abandoned"):
        assert words in text
    assert "30 (epoch 1, next batch 30)" in text
    assert "ddp, 2 ranks, fp32" in text
    assert "mpmae_atto, 11 numbers (body 6, head 5)" in text
    assert "engine/ddp.pt" in text


def test_inspect_for_programs(run, capsys):
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {entry["name"]: entry["kind"] for entry in found["checkpoints"]}
    assert kinds["step-00000030"] == "complete"
    assert kinds["step-00000040"] == "torn"
    assert found["newest"]["step"] == 30
    assert found["newest"]["num_parameters"] == {"body": 6, "head": 5}
    assert main(["inspect", str(run / "checkpoints" / "step-00000010"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 10


def test_convert_to_portable(run, tmp_path, capsys):
    out = tmp_path / "new" / "portable"
    assert main(["convert", str(run), "--to", "portable", "-o", str(out)]) == 0
    assert load_meta(out)["step"] == 30
    state = open_state(out)
    assert state.num_updates == 20
    assert state.shapes == {"body.weight": (2, 3), "head.bias": (4,)}
    assert torch.equal(state.read("body.weight")["exp_avg_sq"], WEIGHTS["body.weight"] * 2)
    assert torch.equal(state.read("head.bias")["weight"], WEIGHTS["head.bias"])
    assert torch.equal(state.constants()["head.frozen"], WEIGHTS["head.frozen"])
    again = tmp_path / "again"  # a portable one is a checkpoint like any other
    assert main(["convert", str(out), "--to", "portable", "-o", str(again)]) == 0
    assert (again / "engine" / "state.safetensors").read_bytes() == (out / "engine" / "state.safetensors").read_bytes()
    assert main(["convert", str(run), "--to", "portable", "-o", str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err


def test_convert_to_weights(run, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["convert", str(run), "--to", "weights", "-o", str(out)]) == 0
    assert all(torch.equal(load_file(out)[name], value) for name, value in WEIGHTS.items())
    assert main(["convert", str(run), "--to", "weights", "-o", str(tmp_path / "folder")]) == 2
    assert "folder.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["absent", "run/checkpoints/step-00000040"])
def test_convert_refuses_what_is_not_whole(run, path, capsys):
    out = run.parent / "out"
    assert main(["convert", str(run.parent / path), "--to", "portable", "-o", str(out)]) == 2
    assert path.split("/")[-1] in capsys.readouterr().err
    assert not out.exists()


def test_prune(run, capsys):
    before = names(run)
    assert main(["prune", str(run), "--keep", "2", "--dry-run"]) == 0
    assert "would remove" in capsys.readouterr().out
    assert names(run) == before
    assert main(["prune", str(run), "--keep", "2"]) == 0
    assert names(run) == ["step-00000020", "step-00000030", "step-00000040", "step-00000060.abandoned"]
    assert main(["prune", str(run), "--keep", "1", "--abandoned"]) == 0
    assert names(run) == ["step-00000030", "step-00000040"], "the torn one is newer than the newest complete one"
    assert main(["prune", str(run), "--keep", "0"]) == 2
    assert main(["prune", str(run.parent), "--keep", "1"]) == 2


def test_prune_leaves_what_a_run_may_be_writing(run, capsys):
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["prune", str(run), "--keep", "1"]) == 0
    assert "is in use by a run" in capsys.readouterr().err
    assert names(run) == ["step-00000030", "step-00000040", "step-00000050.partial", "step-00000060.abandoned"]


def test_prune_never_takes_the_only_complete_one(run):
    for step in (10, 20):
        (run / "checkpoints" / f"step-{step:08d}" / "checkpoint.json").unlink()
    (run / "checkpoints" / "step-00000030" / "checkpoint.json").unlink()
    before = set(names(run)) - {"step-00000050.partial"}
    assert main(["prune", str(run), "--keep", "1"]) == 0
    assert set(names(run)) == before, "with no complete one left, the torn ones may be all there is"
