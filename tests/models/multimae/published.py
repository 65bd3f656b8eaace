"""A small MultiMAE under the published names: those of the golden case, filled by its recipe, with the fixed positions."""

import argparse
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mpmae.models import MultiMAE
from mpmae.models.multimae.positions import sincos_table
from tests import golden_multimae
from tests.golden_cases import Case, fill

DECODERS = ("rgb", "depth", "semseg", "ired", "sired", "ebands", "norm_rgb")
COMMAND_LINE = {"input_size": 32, "num_encoded_tokens": 9, "alphas": 0.5, "decoder_num_heads": 8, "fp32_output_adapters": ""}


@cache
def case() -> Case:
    return Case(Path(golden_multimae.__file__).parent / "golden", "multimae_tiny_p8_56")


def model(seed: int = 0, **options) -> MultiMAE:
    """The golden case's model with other weights."""
    torch.manual_seed(seed)
    found = golden_multimae.build(case(), torch.float32)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_()
    return found


def state(decoders: tuple[str, ...] = DECODERS, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The published state dict, decoders in the order given; without: beginnings of names that are left out."""
    order = sorted(
        case().entry["params"], key=lambda p: decoders.index(p[0].split(".")[1]) if p[0].startswith("output_") else -1
    )
    weights = {name: fill(1, name, shape, 0.0, 0.1) for name, shape, *_ in order}
    owners = {".".join(name.split(".")[:2]): 96 if name.startswith("input_") else 64 for name in weights if "put_a" in name}
    weights |= {f"{owner}.pos_emb": sincos_table(dim, 28) for owner, dim in owners.items()}
    return {name: value for name, value in weights.items() if not name.startswith(without)}


def checkpoint(published: dict[str, Tensor], log_vars: Tensor | None = None, **command_line) -> dict:
    """What the published program saves."""
    balancer = {} if log_vars is None else {"log_vars": log_vars}
    return {
        "model": published,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "scaler": {},
        "args": argparse.Namespace(**COMMAND_LINE | command_line),
        "loss_balancer": balancer,
    }
