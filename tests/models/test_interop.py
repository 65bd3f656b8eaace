"""Weights of the published code, in and out."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

import mpmae
from mpmae.errors import CheckpointError
from mpmae.models.interop import reference_state_dict


def build(**options):
    return mpmae.create_model("mpmae_atto", img_size=64, patch_size=32, decoder_dim=16, init="convnextv2", **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build()


def assert_same(model, other):
    for (name, value), other_value in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, other_value), name


@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
def test_round_trip(stem):
    model, other = build(stem=stem, decoder_depth=2), build(stem=stem, decoder_depth=2)
    mpmae.load_reference(other, reference_state_dict(model))
    assert_same(model, other)


def test_kernel_axes(model):
    state = reference_state_dict(model)
    kernel, weight = state["encoder.initial_conv.0.kernel"], model.encoder.stem.conv.weight
    assert kernel[2 * 3 + 1, 5, 7] == weight[7, 5, 1, 2]  # column 2, row 1: the row offset is the fastest
    assert state["encoder.stem.0.kernel"][3 * 4 + 1, 7] == model.encoder.stem.pool.weight[7, 0, 1, 3]
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, 40)
    assert state["encoder.stages.0.0.dwconv.bias"].shape == (1, 40)
    patch8 = reference_state_dict(mpmae.create_model("mpmae_atto", stem="convnext"))
    assert patch8["encoder.stem_orig.0.kernel"].shape == (12, 40)


@pytest.mark.parametrize("form", ["bare", "wrapped", "safetensors"])
def test_files(model, tmp_path, form):
    path, state = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth"), reference_state_dict(model)
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state if form == "bare" else {"model": state, "args": argparse.Namespace(lr=1), "epoch": 3}, path)
    other = build()
    mpmae.load_reference(other, path)
    assert_same(model, other)


def test_copies_of_the_shared_decoder(model):
    state, other = reference_state_dict(model), build()
    copies = {key.replace("sentinel2", "era5"): value.clone() for key, value in state.items() if "decoder_dict" in key}
    mpmae.load_reference(other, state | copies)
    assert_same(model, other)
    copies["decoder_dict.era5.0.norm.bias"] += 1
    with pytest.raises(CheckpointError, match=r"decoder_dict\.era5\.0\.norm\.bias differs"):
        mpmae.load_reference(other, state | copies)


def test_every_problem_is_named_and_nothing_changes(model):
    state, other = reference_state_dict(model), build()
    before = [value.clone() for value in other.parameters()]
    del state["proj.weight"]
    state["mask_token"] = torch.zeros(1, 17, 1, 1)
    state["head.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        mpmae.load_reference(other, state)
    text = str(caught.value)
    assert "missing proj.weight [16, 320, 1, 1] (our decoder.proj.weight)" in text
    assert "mask_token has shape [1, 17, 1, 1], expected [1, 16, 1, 1]" in text
    assert "unexpected head.weight" in text
    assert len(caught.value.problems) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


class Trap:
    """Runs code when a careless reader unpickles it."""

    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [Trap(), {"model": 3}, {"a": Trap()}])
def test_a_file_that_is_no_state_dict(model, tmp_path, content, capsys):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        mpmae.load_reference(model, tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


def test_no_file(model, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0")
    for name in ("absent.pth", "torn.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            mpmae.load_reference(model, tmp_path / name)
