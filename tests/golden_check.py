"""Run `python -m tests.golden_check DIR [CASE...]` to compare MP-MAE with the golden numbers of the published code.

DIR holds manifest.json and <case>.safetensors (see the README of the golden set). One line per case; exit status 1 if any
fails. Tolerances: float64 predictions 1e-6 absolute, losses 1e-9, gradient norms and trajectories 1e-7 relative; float32
5e-5, 1e-5, 1e-3, 1e-4.

Shapes: N samples, C channels, H sites on a side of a stage's grid, K packed sites.
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

import mpmae
from mpmae.loader.batch import Batch
from mpmae.masking import visible_index
from mpmae.modalities import MODALITIES, TARGETS, spec_of
from mpmae.models.interop import load_reference, to_mmearth

CASES = ("fcmae_p8_56", "fcmae_p16_112", "fcmae_p8_56_unweighted", "fcmae_p32_128_origstem", "fcmae_p8_56_bgr")


@dataclass(frozen=True)
class Tolerance:
    prediction: float
    loss: float
    grad_norm: float
    trajectory: float


TOLERANCES = {torch.float64: Tolerance(1e-6, 1e-9, 1e-7, 1e-7), torch.float32: Tolerance(5e-5, 1e-5, 1e-3, 1e-4)}


def fill(seed: int, name: str, shape: list[int], loc: float, scale: float) -> np.ndarray:
    """Weights of the recipe: uniform with mean `loc` and standard deviation `scale`, float32."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    uniform = (np.random.Philox(key=key).random_raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (loc + scale * (2 * uniform - 1) * math.sqrt(3)).astype(np.float32).reshape(shape)


@dataclass
class Case:
    """One golden case: its manifest entry, its arrays and the inputs (maybe of another case)."""

    folder: Path
    name: str
    entry: dict = field(init=False)
    arrays: dict[str, np.ndarray] = field(init=False)
    inputs: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self):
        self.entry = json.loads((self.folder / "manifest.json").read_text())["cases"][self.name]
        self.arrays = load_file(self.folder / self.entry["file"])
        source = self.entry.get("inputs_from", self.name)
        self.inputs = self.arrays if source == self.name else load_file(self.folder / f"{source}.safetensors")

    def weights(self) -> dict[str, torch.Tensor]:
        seed = self.entry["config"]["weight_seed"]
        return {name: torch.from_numpy(fill(seed, name, *rest)) for name, *rest in self.entry["params"]}

    def model(self, dtype: torch.dtype) -> torch.nn.Module:
        config = self.entry["config"]
        bands = ("B2", "B3", "B4") if config.get("rgb") else MODALITIES["sentinel2"].model_bands
        model = mpmae.create_model(
            "mpmae_atto",
            img_size=config["img"],
            patch_size=config["patch"],
            modalities_out=tuple(self.entry["loss_order"]),
            mask_ratio=config["ratio"],
            stem="convnext" if config["orig"] else "mmearth",
            loss_weighting=config["loss"],
            norm_pix_loss=config["norm_pix"],
            reference_quirks=True,
            bands_available={"sentinel2": bands},
        )
        load_reference(model, self.weights())
        return model.to(dtype)

    def batch(self) -> Batch:
        values, valid = {}, {}
        for name in TARGETS:
            raw = self.inputs.get(f"in.{name}")
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
        num = self.entry["config"]["B"]
        return Batch(values, valid, torch.arange(num), dict.fromkeys(values, num), num)

    def visible(self) -> torch.Tensor:
        return visible_index(torch.from_numpy(self.inputs["mask"] == 0))


@dataclass
class Findings:
    """Worst deviation per kind, relative to its tolerance, and what broke a tolerance."""

    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, what: str, error: float, tolerance: float) -> None:
        self.worst[kind] = max(self.worst.get(kind, 0.0), error if math.isfinite(error) else math.inf)
        if not error <= tolerance:
            self.failures.append(f"{what}: {error:.3g} > {tolerance:.3g}")

    def relative(self, kind: str, what: str, got: float, expected: float, tolerance: float) -> None:
        self.add(kind, what, abs(got - expected) / max(abs(expected), 1e-12), tolerance)

    def array(self, kind: str, what: str, got: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
        if tuple(got.shape) != expected.shape:
            self.failures.append(f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}")
            return
        error = (got.detach().double() - torch.from_numpy(expected).double()).abs().max().item()
        self.add(kind, what, error, tolerance)


def check(folder: Path, name: str, dtype: torch.dtype, trajectory: bool = True) -> Findings:
    """What the model gives for a case against what the published code gave."""
    case, tolerance, found = Case(folder, name), TOLERANCES[dtype], Findings()
    model, batch, visible = case.model(dtype), case.batch(), case.visible()
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
        scale = max(1.0, float(np.abs(case.arrays[key]).max()))  # stored in float32
        found.array("activation", key, grids[key] / scale, case.arrays[key] / scale, tolerance.prediction)
    _check_gradients(case, model, found, tolerance)
    if trajectory and "trajectory" in case.entry:
        _check_trajectory(case, dtype, batch, visible, found, tolerance)
    return found


def _watch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Filled by the next forward pass: outputs of the stem, the stages and the decoder."""
    seen: dict[str, torch.Tensor] = {}

    def keep(key):
        return lambda module, args, output: seen.__setitem__(key, output)

    model.encoder.stem.register_forward_hook(keep("stem"))
    for stage in range(3):
        model.encoder.stages[stage][-1].register_forward_hook(keep(f"stage{stage}"))
    model.decoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.__setitem__("dec_in", args[0]))
    model.decoder.register_forward_hook(keep("dec_out"))
    return seen


def _grid(model: torch.nn.Module, visible: torch.Tensor, key: str, seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """A watched output as a map [N, C, H, H]."""
    x, side = seen[key], model.num_patches_side
    if key.startswith("dec_"):
        return x.transpose(1, 2).unflatten(2, (side, side))
    tile_side = {"stem": 8, "stage0": 8, "stage1": 4, "stage2": 2}[key]
    grid = x.new_zeros(len(x) * (side * tile_side) ** 2, x.shape[-1])
    grid[model.encoder.site_index(visible, tile_side).flatten()] = x.detach().flatten(0, 1)
    return grid.view(len(x), side * tile_side, side * tile_side, -1).permute(0, 3, 1, 2)


def _check_gradients(case: Case, model: torch.nn.Module, found: Findings, tolerance: Tolerance) -> None:
    grads = to_mmearth({name: parameter.grad for name, parameter in model.named_parameters()})
    for key, expected in case.entry["grad_norm"].items():
        grad = grads[key]
        found.relative("grad norm", f"gradient norm of {key}", grad.double().norm().item(), expected, tolerance.grad_norm)
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
    model = case.model(dtype).train()
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
    if dtype == torch.float64:
        end = {name: value.detach() for name, value in model.named_parameters()}
        change = {name: value - start[name] for name, value in end.items()}
        for kind, values in (("param_l2_after", end), ("param_change_l2", change)):
            got = to_mmearth(values)
            for name, norm in expected[kind].items():
                found.relative("trajectory", f"{kind} {name}", got[name].norm().item(), norm, tolerance.trajectory)


def main(arguments: list[str]) -> int:
    """Exit status: 0 when every case holds in float64 and float32."""
    if not arguments:
        print(__doc__.split("\n\n", 1)[0], file=sys.stderr)
        return 2
    folder, names = Path(arguments[0]), arguments[1:]
    status = 0
    for name in names or [name for name in CASES if (folder / f"{name}.safetensors").is_file()]:
        for dtype in TOLERANCES:
            start = time.perf_counter()
            found = check(folder, name, dtype)
            verdict = "FAILED" if found.failures else "ok"
            status |= bool(found.failures)
            worst = ", ".join(f"{kind} {error:.1e}" for kind, error in found.worst.items())
            print(f"{name} {str(dtype).removeprefix('torch.')}: {verdict} ({worst}; {time.perf_counter() - start:.0f} s)")
            for failure in found.failures[:8]:
                print(f"    {failure}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
