"""Checkpoints as files and folders: every container that is read, and what is refused."""

import argparse
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import mpmae
from mpmae.errors import CheckpointError
from mpmae.models.interop import load_reference, read_weights, to_mmearth
from tests.models import schemes
from tests.train.launches import REPO, launch_ok


def build():
    return mpmae.create_model("mpmae_atto", img_size=64, patch_size=32, decoder_dim=16, init="convnextv2")


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {name: value.detach().clone() for name, value in build().named_parameters()}


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("form", ["bare", "model", "state_dict", "module", "safetensors"])
def test_files(state, tmp_path, form):
    path, published = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth"), to_mmearth(state)
    if form == "safetensors":
        save_file({name: value.clone() for name, value in published.items()}, path)
    else:
        command_line = argparse.Namespace(lr=1, modalities={"sentinel2": "all"})
        torch.save(published if form == "bare" else {form: published, "args": command_line, "epoch": 3}, path)
    assert_same(read_weights(path).state, state)
    assert_same(read_weights(str(path)).state, state)
    if form != "safetensors":
        assert_same(read_weights(torch.load(path, weights_only=False)).state, state)


class Trap:
    """Runs code when a careless reader unpickles it."""

    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [Trap(), {"model": {"a": Trap()}}], ids=["bare", "inside"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_with_advice(tmp_path, content, legacy, capfd):
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"w\.pth holds more than tensors.*print.*If you trust its author"):
        read_weights(path)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404", b"cbuiltins\nprint\n(S'ran'\ntR."])
def test_a_file_that_is_no_checkpoint(tmp_path, content, capfd):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pth is no file of torch.save: it starts with"):
        read_weights(tmp_path / "w.pth")
    assert "ran" not in capfd.readouterr().out


def test_a_plain_pickle_that_torch_did_not_write(tmp_path, capfd):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": Trap()}))
    with pytest.raises(CheckpointError, match=r"w\.pkl"):
        read_weights(tmp_path / "w.pkl")
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 3, 500, *range(501, 540), 0.5, 0.999])
def test_a_truncated_file(state, tmp_path, suffix, kept):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=suffix == ".pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=f"w{suffix}"):
        read_weights(path)


def test_deepspeed_files_of_something_else(state, tmp_path):
    torch.save({"module": state}, tmp_path / "mp_rank_00_model_states.pt")
    for content in ([3], {}, {"optimizer_state_dict": {}}, {"optimizer_state_dict": {"partition_count": 1}}):
        torch.save(content, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        with pytest.raises(CheckpointError, match="the ZeRO partitions do not fit"):
            read_weights(tmp_path)
    torch.save({}, tmp_path / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"of ranks \[0, 2\], expected 0 to 1"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [{"model": 3}, {"model": {}}, {"a": 1}, [1, 2], torch.zeros(3)],
    ids=["number", "empty", "no", "list", "tensor"],
)
def test_a_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"no state dict in it"):
        read_weights(tmp_path / "w.pth")


def test_absent_file_and_folder_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is no checkpoint: expected"):
        read_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        read_weights(tmp_path)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "app.model."])
def test_distributed_checkpoint(state, tmp_path, prefix):
    content = {f"{prefix}{name}": value for name, value in state.items()}
    extra = {"optim.state.step": torch.zeros(3), "step": 7} if prefix else {}
    dcp.save(content | extra, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_same(read_weights(tmp_path / "dcp").state, state)


def test_a_malicious_or_torn_distributed_checkpoint(state, tmp_path, capfd):
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    index = tmp_path / "dcp" / ".metadata"
    good = index.read_bytes()
    index.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="print is not part of a DCP index"):
        read_weights(tmp_path / "dcp")
    assert "ran" not in capfd.readouterr().out
    index.write_bytes(good.replace(b"__0_0.distcp", b"../../e.disc"))
    with pytest.raises(CheckpointError, match="outside of the checkpoint's folder"):
        read_weights(tmp_path / "dcp")
    index.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="not a readable DCP index"):
        read_weights(tmp_path / "dcp")
    index.write_bytes(good)
    for data in (tmp_path / "dcp").glob("*.distcp"):
        data.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "dcp")


RUN = (
    "model.decoder_dim=32",
    "model.img_size=32",
    "train.global_batch_size=4",
    "train.max_steps=2",
    "train.val_samples=2",
    "optim.lr=1e-3",
    "optim.warmup_steps=1",
    "data.num_workers=1",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("model", "stage", "precision"),
    [
        ("mpmae_atto", 2, "bf16"),
        *(pytest.param("mpmae_atto", s, p, marks=pytest.mark.slow) for s in (0, 1, 2, 3) for p in ("fp32", "bf16")),
        *(pytest.param("multimae_tiny", s, p, marks=pytest.mark.slow) for s, p in ((1, "bf16"), (3, "bf16"), (3, "fp32"))),
    ],
)
def test_deepspeed_folder_holds_the_same_float32_weights(model, stage, precision, shards_dir, tmp_path):
    """The ZeRO partitions of two ranks, joined, are bit for bit what the run exported; deepspeed is not imported."""
    run = tmp_path / "run"
    options = ("--ds-config", f"configs/ds/zero{stage}.json", f"train.precision={precision}", f"model.name={model}")
    launch_ok("deepspeed", 2, run, f"data.shards={shards_dir}", *RUN, *options)
    code = f"""
import sys, torch
sys.modules["deepspeed"] = None
from mpmae.models.interop import read_weights
run = read_weights({str(run)!r})
joined = read_weights(run.source + "/engine/deepspeed")
assert run.config["step"] == 2 and run.state.keys() == joined.state.keys()
assert all(torch.equal(joined.state[name].float(), value) for name, value in run.state.items())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
    folder = next(run.glob("checkpoints/step-*/engine/deepspeed"))
    if stage:
        next(folder.glob("*rank_1_*optim_states.pt")).unlink()
        with pytest.raises(CheckpointError, match=r"1 files \*_optim_states.pt, expected 2"):
            read_weights(folder)


def test_our_checkpoint_folder_and_a_torn_one(state, tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    files = {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    (folder / "checkpoint.json").write_text(json.dumps({"format_version": 1, "step": 3, "files": files}))
    for source in (tmp_path, folder.parent, folder, folder / "model.safetensors"):
        assert_same(read_weights(source).state, state)
    assert read_weights(tmp_path).config["step"] == 3
    files["model.safetensors"] += 1
    (folder / "checkpoint.json").write_text(json.dumps({"format_version": 1, "step": 3, "files": files}))
    with pytest.raises(CheckpointError, match="torn"):
        read_weights(folder)


def test_a_published_pickle_end_to_end(tmp_path):
    """As MMEarth-train writes it: weights, optimizer, scaler, epoch and command line."""
    source = schemes.mmearth(variant="S2")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    command_line = argparse.Namespace(patch_size=8, out_modalities={"sentinel2": ["B2"]}, data_dir=Path("data"))
    content = {"model": source, "optimizer": optimizer, "epoch": 199, "scaler": scaler, "args": command_line}
    torch.save(content, tmp_path / "checkpoint-199.pth")
    model = mpmae.create_model("mpmae_atto", modalities_out=("sentinel2",))
    assert len(load_reference(model, tmp_path / "checkpoint-199.pth").loaded) == len(list(model.parameters()))
