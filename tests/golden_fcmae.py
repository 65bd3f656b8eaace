"""Golden cases of MP-MAE: losses, predictions, activations, gradients and a short training run.

Shapes: N samples, C channels, H sites on a side of a stage's grid, K packed sites, L patches, V visible ones.
"""

import math
import re

import numpy as np
import torch

import mpmae
from mpmae.loader.batch import Batch
from mpmae.masking import visible_index
from mpmae.modalities import TARGETS, spec_of
from mpmae.models import MPMAE
from mpmae.models.encoder import SparseEncoder
from mpmae.models.interop import load_reference
from tests.golden_cases import TOLERANCES, Case, Findings, Tolerance, bands_of, fill, size_of
from tests.golden_names import published, published_gradients

BGR = ("B2", "B3", "B4")


def check_fcmae(case: Case, dtype: torch.dtype, trajectory: bool) -> Findings:
    """What the model gives for a case against what the published code gave."""
    tolerance, found = TOLERANCES[dtype], Findings()
    model, batch, visible = build(case, dtype), batch_of(case), visible_of(case)
    seen = _watch(model)
    out = model.train()(batch, visible, return_predictions=True)
    out.loss.backward()

    for modality, expected in case.entry["loss"].items():
        found.relative("loss", f"loss {modality}", out.losses[modality].item(), expected, tolerance.loss)
    found.relative("loss", "total loss", out.loss.item(), case.entry["loss_total"], tolerance.loss)
    for key in [key for key in case.arrays if key.startswith("pred.")]:
        found.array("prediction", key, out.predictions[key[5:]], case.arrays[key], tolerance.prediction)
    grids = {"enc": out.latent, **{key: _grid(model, visible, key, seen) for key in seen}}
    for key in grids.keys() & case.arrays.keys():
        found.activation(key, grids[key], case.arrays[key], tolerance.prediction)
    _check_gradients(case, model, found, tolerance)
    if trajectory and "trajectory" in case.entry:
        _check_trajectory(case, dtype, batch, visible, found, tolerance)
    return found


def build(case: Case, dtype: torch.dtype) -> MPMAE:
    """The case's model, of the size that its parameters show, with its weights."""
    config, shapes = case.entry["config"], {name: shape for name, shape, *_ in case.entry["params"]}
    depths = tuple(_count(shapes, rf"encoder\.stages\.{stage}\.(\d+)\.") for stage in range(4))
    dims = tuple(shapes[f"encoder.stages.{stage}.0.dwconv.bias"][-1] for stage in range(4))
    num_bands = {key[3:]: array.shape[1] for key, array in case.inputs.items() if key.startswith("in.")}
    bands = {name: bands_of(name, count) for name, count in num_bands.items() if spec_of(name).kind == "continuous"}
    if config.get("rgb"):
        bands["sentinel2"] = BGR
    hidden = case.inputs["mask"][0].mean(dtype=np.float64)  # the ratio as it was rounded to whole patches
    model = mpmae.create_model(
        f"mpmae_{size_of(dims, depths)}",
        img_size=config["img"],
        patch_size=config["patch"],
        modalities_out={name: bands.get(name) for name in case.entry["loss_order"]},
        mask_ratio=float(hidden),
        encoder="sparse" if config.get("sparse", True) else "dense",
        stem=case.stem,
        loss_weighting=config["loss"],
        norm_pix_loss=config["norm_pix"],
        decoder_dim=shapes["proj.weight"][0],
        decoder_depth=_count(shapes, r"decoder_dict\.\w+\.(\d+)\."),
        reference_quirks=True,
        bands_available=bands,
    )
    _load(case, model)
    return model.to(dtype)


def _count(names: dict[str, list[int]], pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def _load(case: Case, model: MPMAE) -> None:
    seed = case.entry["config"]["weight_seed"]
    weights = {name: fill(seed, name, *rest) for name, *rest in case.entry["params"]}
    report = load_reference(model, weights)
    # what stays unused must never have run: the published dense encoder carries a classifier
    left = [name for name in report.unused if case.entry["grad_norm"].get(f"encoder.{name}") is not None]
    if left:
        raise ValueError(f"{case.name}: no parameter of ours for {', '.join(left)}")


def batch_of(case: Case) -> Batch:
    """The case's inputs as a loader would give them."""
    values, valid = {}, {}
    for name in TARGETS:
        raw = case.inputs.get(f"in.{name}")
        if raw is None:
            continue
        spec = spec_of(name)
        if spec.one_hot:
            raw = np.where((raw < 0).all(1), -1, raw.argmax(1))
        if spec.kind == "categorical":
            values[name] = torch.from_numpy(raw.astype(np.int64))
            valid[name] = values[name] >= 0
        else:
            values[name] = torch.from_numpy(raw.astype(np.float32))
            valid[name] = values[name].isfinite()
            values[name] = torch.where(valid[name], values[name], 0)
    num = len(case.inputs["mask"])
    return Batch(values, valid, torch.arange(num), dict.fromkeys(values, num), num)


def visible_of(case: Case) -> torch.Tensor:
    """int64 [N, V]."""
    return visible_index(torch.from_numpy(case.inputs["mask"] == 0))


def _watch(model: MPMAE) -> dict[str, torch.Tensor]:
    """Filled by the next forward pass: outputs of the decoder and, if it is sparse, of the encoder's stem and stages."""
    seen: dict[str, torch.Tensor] = {}

    def keep(key):
        return lambda module, args, output: seen.__setitem__(key, output)

    if isinstance(model.encoder, SparseEncoder):
        model.encoder.stem.register_forward_hook(keep("stem"))
        for stage in range(3):
            model.encoder.stages[stage][-1].register_forward_hook(keep(f"stage{stage}"))
    model.decoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.__setitem__("dec_in", args[0]))
    model.decoder.register_forward_hook(keep("dec_out"))
    return seen


def _grid(model: MPMAE, visible: torch.Tensor, key: str, seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """A watched output as a map [N, C, H, H]."""
    x, side = seen[key], model.num_patches_side
    if key.startswith("dec_"):
        return x.transpose(1, 2).unflatten(2, (side, side))
    tile_side = {"stem": 8, "stage0": 8, "stage1": 4, "stage2": 2}[key]
    grid = x.new_zeros(len(x) * (side * tile_side) ** 2, x.shape[-1])
    grid[model.encoder.site_index(visible, tile_side).flatten()] = x.detach().flatten(0, 1)
    return grid.view(len(x), side * tile_side, side * tile_side, -1).permute(0, 3, 1, 2)


def _check_gradients(case: Case, model: MPMAE, found: Findings, tolerance: Tolerance) -> None:
    grads = published_gradients(model)
    for key, expected in case.entry["grad_norm"].items():
        if expected is None:  # the published dense encoder carries a classifier that never runs
            found.same(f"{key} among our parameters", key in grads, False)
            continue
        norm = grads[key].double().norm().item()
        found.relative("grad norm", f"gradient norm of {key}", norm, expected, tolerance.grad_norm)
    total = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    found.relative("grad norm", "total gradient norm", total, case.entry["grad_norm_total"], tolerance.grad_norm)
    for key in [key for key in case.arrays if key.startswith("grad.")]:
        expected = case.arrays[key]
        scale = float(np.abs(expected).max())
        found.array(
            "grad", key, grads[key[5:]] / scale, expected / scale, max(tolerance.grad_norm, 5e-7)
        )  # stored in float32


def _check_trajectory(
    case: Case, dtype: torch.dtype, batch: Batch, visible: torch.Tensor, found: Findings, tolerance: Tolerance
) -> None:
    expected = case.entry["trajectory"]
    model = build(case, dtype).train()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    exempt = {n for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(".bias")}
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in exempt) == flag], "weight_decay": decay}
        for flag, decay in ((True, 0.0), (False, expected["weight_decay"]))
    ]
    optimizer = torch.optim.AdamW(groups, lr=expected["lr"], betas=tuple(expected["betas"]), eps=expected["eps"])
    for step, loss in enumerate(expected["loss_total"]):
        out = model(batch, visible)
        found.relative("trajectory", f"loss after {step} steps", out.loss.item(), loss, tolerance.trajectory)
        if step < expected["steps"]:
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
    if dtype != torch.float64:
        return
    end = {name: value.detach() for name, value in model.named_parameters()}
    change = {name: value - start[name] for name, value in end.items()}
    for kind, values in (("param_l2_after", end), ("param_change_l2", change)):
        got = published(model, values)
        for name, norm in expected[kind].items():
            found.relative("trajectory", f"{kind} {name}", got[name].norm().item(), norm, tolerance.trajectory)
