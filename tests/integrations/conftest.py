"""The toolkits import torchvision when they are imported, which the test modules do at their top."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mpmae
from mpmae.eval.torchvision_import import let_torchvision_import
from mpmae.modalities import spec_of

let_torchvision_import()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An encoder of 12 recorded bands, with statistics of L2A: mean 1000, 1010, ..., spread 500, 510, ..."""
    folder = tmp_path_factory.mktemp("run") / "step-00000001"
    folder.mkdir()
    torch.manual_seed(3)
    state = mpmae.create_model("mpmae_atto", modalities_out=("sentinel2",), decoder_dim=16).state_dict()
    save_file(state, folder / "model.safetensors")
    tree = {
        "format_version": 1,
        "step": 1,
        "bands_in": spec_of("sentinel2").model_bands,
        "statistics": {
            "sentinel2_l2a": {"mean": [1000.0 + 10 * i for i in range(12)], "std": [500.0 + 10 * i for i in range(12)]}
        },
        "files": {"model.safetensors": (folder / "model.safetensors").stat().st_size},
    }
    (folder / "checkpoint.json").write_text(json.dumps(tree))
    return folder
