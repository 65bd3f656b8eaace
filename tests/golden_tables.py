"""Rates, parameter groups and initial weights against the golden tables.

Each table is a top-level key of the golden set's manifest.json, but for the groups of pretraining, which the cases with a
trajectory list.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpmae
from mpmae.engine import LearningRate
from mpmae.engine.base import set_lr
from mpmae.engine.optim import layer_decay_groups, parameter_groups
from tests.golden_names import published_names

LR_SCHEDULE = "lr_schedule"
FINETUNE_GROUPS = "finetune_param_groups_layer_decay_0.9_wd_0.3"
FCMAE_INIT = "reference_init_statistics_fcmae_atto_p8"
DENSE_INIT = "reference_init_statistics_dense_atto_p8"
PRETRAIN_GROUPS = "pretraining parameter groups"
NUM_SIGMAS = 6  # exceeded by chance once in 5e8 comparisons
CUT = 2.0  # where the published code truncates its normal distributions


def check_tables(folder: Path) -> dict[str, list[str]]:
    """Failures by table of `folder`/manifest.json; a table that the manifest lacks is left out."""
    manifest = json.loads((folder / "manifest.json").read_text())
    checks = {
        LR_SCHEDULE: lr_schedule,
        FINETUNE_GROUPS: finetune_groups,
        FCMAE_INIT: fcmae_init,
        DENSE_INIT: dense_init,
    }
    found = {name: check(manifest[name]) for name, check in checks.items() if name in manifest}
    cases = {name: entry for name, entry in manifest["cases"].items() if name.startswith("fcmae_")}
    cases = {name: entry for name, entry in cases.items() if "decay" in (entry.get("trajectory") or {})}
    return found | ({PRETRAIN_GROUPS: pretrain_groups(cases)} if cases else {})


def lr_schedule(tables: list[dict[str, Any]]) -> list[str]:
    """Every row: the rate at an epoch, and that of a group with lr_scale 0.5."""
    failures = []
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.5}])
    for table in tables:
        args = table["args"]
        schedule = LearningRate(args["lr"], args["min_lr"], args["warmup_epochs"], args["epochs"])
        for epoch, *expected in table["epoch_lr_lrscaled0.5"]:
            set_lr(optimizer, schedule(epoch))
            for group, want in zip(optimizer.param_groups, expected, strict=True):
                if abs(group["lr"] - want) > 1e-9 * want + 1e-18:
                    failures.append(f"{args} epoch {epoch}: {group['lr']}, expected {want}")
    return failures


def finetune_groups(table: list[dict[str, Any]]) -> list[str]:
    """Scale and weight decay of every parameter of the dense atto model, and how they are grouped."""
    model = dense_atto()
    names = _names_by_identity(model)
    groups = layer_decay_groups(model, 0.3, 0.9, reference_quirks=True)
    got = {tuple(sorted(names[id(p)] for p in g["params"])): (g["lr_scale"], g["weight_decay"]) for g in groups}
    want = {tuple(sorted(g["params"])): (g["lr_scale"], g["weight_decay"]) for g in table}
    failures = [f"no group of {', '.join(key)}" for key in want if key not in got]
    failures += [f"a group of {', '.join(key)}" for key in got if key not in want]
    for key in want.keys() & got.keys():
        if abs(got[key][0] - want[key][0]) > 1e-12 or got[key][1] != want[key][1]:
            failures.append(f"{key[0]}, ...: (lr_scale, weight_decay) {got[key]}, expected {want[key]}")
    return failures


def pretrain_groups(cases: dict[str, Any]) -> list[str]:
    """Which parameters of MP-MAE are decayed, in every case."""
    failures = []
    for case, entry in cases.items():
        config = entry["config"]
        model = mpmae.create_model(
            "mpmae_atto",
            img_size=config["img"],
            patch_size=config["patch"],
            modalities_out=tuple(entry["loss_order"]),
            stem="convnext" if config["orig"] else "mmearth",
            loss_weighting=config["loss"],
            bands_available={"sentinel2": ("B2", "B3", "B4")} if config.get("rgb") else None,
        )
        names = _names_by_identity(model)
        for group, kind in zip(parameter_groups(model, 0.05), ("decay", "no_decay"), strict=True):
            got, want = {names[id(p)] for p in group["params"]}, set(entry["trajectory"][kind])
            failures += [f"{case}: {name} is in {kind}" for name in sorted(got - want)]
            failures += [f"{case}: {name} is not in {kind}" for name in sorted(want - got)]
    return failures


def fcmae_init(table: dict[str, Any]) -> list[str]:
    """Initial weights of MP-MAE with init="reference"."""
    torch.manual_seed(0)
    model = mpmae.create_model("mpmae_atto", init="reference")
    return compare_statistics(_by_published_name(model), table)


def dense_init(table: dict[str, Any]) -> list[str]:
    """Initial weights of the dense model."""
    torch.manual_seed(0)
    return compare_statistics(_by_published_name(dense_atto()), table)


def compare_statistics(got: dict[str, torch.Tensor], table: dict[str, Any]) -> list[str]:
    """Mean and standard deviation of two random draws, within NUM_SIGMAS standard errors of their difference; the range.

    For n values of a normal distribution the standard errors are std/sqrt(n) of the mean and std/sqrt(2n) of the standard
    deviation (less where it is truncated), times sqrt(2) for a difference of two draws.
    """
    failures = [f"{name}: not in the table" for name in sorted(got.keys() - table.keys())]
    failures += [f"{name}: in the table only" for name in sorted(table.keys() - got.keys())]
    for name in got.keys() & table.keys():
        value, want = got[name].detach().double(), table[name]
        if value.numel() != torch.Size(want["shape"]).numel():
            failures.append(f"{name}: {value.numel()} values, expected {want['shape']}")
        elif want["std"] == 0:
            if not bool((value == want["mean"]).all()):
                failures.append(f"{name}: not {want['mean']} throughout")
        else:
            failures += [f"{name}: {problem}" for problem in statistics_problems(value.flatten(), want)]
    return failures


def statistics_problems(value: torch.Tensor, want: dict[str, float]) -> list[str]:
    """What is off in one random parameter."""
    num, mean, std = len(value), want["mean"], want["std"]
    if want["absmax"] == CUT and std < 0.1:  # one stray value: trunc_normal_ now and then returns the cut itself, -2
        mean += CUT / num
        std = (std**2 - CUT**2 / num) ** 0.5
    problems = []
    if abs(value.mean().item() - mean) > NUM_SIGMAS * std * (2 / num) ** 0.5:
        problems.append(f"mean {value.mean().item():.3g}, expected {mean:.3g}")
    if abs(value.std().item() - std) > NUM_SIGMAS * std / num**0.5:
        problems.append(f"standard deviation {value.std().item():.4g}, expected {std:.4g}")
    absmax = value.abs().max().item()
    wide = std > 0.5
    if absmax > (CUT if wide else 8 * std) or (wide and num >= 1000 and absmax < 0.9 * CUT):
        problems.append(f"largest absolute value {absmax:.3g}, expected {want['absmax']:.3g} or so")
    return problems


def dense_atto() -> nn.Module:
    """The dense model of the tables: patch 8, twelve bands, ten classes."""
    return mpmae.create_encoder("convnextv2_atto", patch_size=8, num_classes=10)


def _by_published_name(model: nn.Module) -> dict[str, nn.Parameter]:
    names = published_names(model)
    return {names[name]: value for name, value in model.named_parameters()}


def _names_by_identity(model: nn.Module) -> dict[int, str]:
    return {id(value): name for name, value in _by_published_name(model).items()}
