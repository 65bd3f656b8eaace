"""Golden cases of the dense models: the classifier (`dense_*`) and the U-Net (`unet_*`).

Shapes: N images, B bands, C channels, H sites on a side.
"""

import math

import torch

import mpmae
from mpmae.models import ConvNeXtV2, UNet
from mpmae.models.dense import REFERENCE_GRN_EPS
from mpmae.models.interop import Twin, reference_parameters
from tests.golden_cases import STORED_AS_FLOAT32, TOLERANCES, Case, Findings, bands_of, fill, read_manifest
from tests.golden_names import dense_parameters


def check_dense(case: Case, dtype: torch.dtype) -> Findings:
    """What the dense model gives, with weights converted from the sparse encoder's, against what the published one gave."""
    tolerance, found = TOLERANCES[dtype], Findings()
    model = build(case)
    twins = {twin.name: (name, twin) for name, twin in dense_parameters(model, case.stem).items()}
    _load(case, model, twins)
    _check_conversion(case, model, twins, found)
    model = model.to(dtype).eval()
    image = torch.from_numpy(case.arrays["in.x"]).to(dtype)

    backbone = model.encoder if isinstance(model, UNet) else model
    with torch.no_grad():
        maps = [backbone.forward_stem(image)[-1], *backbone.forward_intermediates(image, intermediates_only=True)]
        got = {"stage3": maps[-1]}
        if isinstance(model, UNet):
            got["decoder_out"] = model.forward_features(image)[:, :, ::2, ::2]
        else:
            got["features"] = model.forward_head(maps[-1], pre_logits=True)
    shapes = dict(zip(("stem", "stage0", "stage1", "stage2", "stage3"), [list(m.shape) for m in maps], strict=True))
    found.same("shapes of the stages", shapes, case.entry["stage_shapes"])
    logits = model(image)
    loss = logits.square().mean()
    loss.backward()

    found.array("prediction", "logits", logits, case.arrays["logits"], tolerance.prediction)
    for key in got.keys() & case.arrays.keys():
        found.activation(key, got[key], case.arrays[key], tolerance.prediction)
    found.relative(
        "loss", "mean square of the logits", loss.item(), case.entry["loss_mean_square_of_logits"], tolerance.loss
    )
    for key, expected in case.entry["grad_norm"].items():
        if expected is None:  # the published U-Net carries a norm that never runs
            found.same(f"{key} among our parameters", key in twins, False)
            continue
        grad = model.get_parameter(twins[key][0]).grad
        # stored are norms summed up in float32, and so is ours; in another order, which follows the CPU, such a sum is off
        # by up to 4e-11 for each of its terms
        allowed = max(tolerance.grad_norm, STORED_AS_FLOAT32 + 1e-10 * grad.numel())
        found.relative("grad norm", f"gradient norm of {key}", grad.float().norm().item(), expected, allowed)
    return found


def build(case: Case) -> ConvNeXtV2 | UNet:
    """The case's model as published: the classifier's stem does not pad, the U-Net's does; GRN eps is 1e-4 in both."""
    entry = case.entry
    options = {
        "patch_size": entry["config"]["patch"],
        "stem": case.stem,
        "in_chans": case.arrays["in.x"].shape[1],
        "num_classes": entry["num_classes"],
        "grn_eps": REFERENCE_GRN_EPS,
    }
    if "_unet_" in entry["model"]:
        return mpmae.create_unet(entry["model"].replace("_unet_", "_"), **options)
    return mpmae.create_encoder(entry["model"], stem_padding="reference", **options)


def _load(case: Case, model: ConvNeXtV2 | UNet, twins: dict[str, tuple[str, Twin]]) -> None:
    prefix = "encoder." if isinstance(model, UNet) else ""
    state = {prefix + name: value for name, value in _pretrained(case).items()}
    for name, *rest in case.entry["params_own_fill"]:
        if name in twins:
            state[twins[name][0]] = fill(case.entry["own_fill_seed"], name, *rest).reshape(twins[name][1].own_shape)
    model.load_state_dict(state)


def _pretrained(case: Case) -> dict[str, torch.Tensor]:
    """The sparse encoder's weights, filled under their published names, under our names."""
    entry, config = case.entry, case.entry["config"]
    seed = entry["pretrain_weight_seed"]
    bands = bands_of("sentinel2", case.arrays["in.x"].shape[1])
    sparse = mpmae.create_model(
        f"mpmae_{entry['model'].rsplit('_', 1)[1]}",
        img_size=config["img"],
        patch_size=config["patch"],
        stem=case.stem,
        modalities_out={"sentinel2": bands},
        bands_available={"sentinel2": bands},
        decoder_dim=8,
        reference_quirks=True,
    )
    listed = _listed(case, seed)
    state = {}
    for name, twin in reference_parameters(sparse).items():
        if name.startswith("encoder."):
            loc, scale = listed.get(twin.name) or _recipe(name, twin.own_shape)
            state[name.removeprefix("encoder.")] = twin.from_reference(fill(seed, twin.name, twin.shape, loc, scale))
    return state


def _listed(case: Case, seed: int) -> dict[str, tuple[float, float]]:
    """Mean and spread of each pretrained parameter, where the set has the MP-MAE case that they are of."""
    for entry in read_manifest(case.folder)["cases"].values():
        if entry.get("config", {}).get("weight_seed") == seed and "loss_order" in entry:
            return {name: (loc, scale) for name, _, loc, scale in entry["params"]}
    return {}


def _recipe(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and spread as all MP-MAE cases list them; the checksums of the converted weights would tell another choice."""
    if ".grn." in name:
        return 0.0, 0.2
    if name.endswith(".bias"):
        return 0.0, 0.05
    return (1.0, 0.1) if len(shape) == 1 else (0.0, math.prod(shape[1:]) ** -0.5)


def _check_conversion(case: Case, model: ConvNeXtV2 | UNet, twins: dict[str, tuple[str, Twin]], found: Findings) -> None:
    unused = set(case.entry["not_used_from_checkpoint"])  # belongs to the decoder or the loss
    found.same("converted names", set(case.entry["converted_checksums"]) - unused - set(twins), set())
    for key, expected in case.entry["converted_checksums"].items():
        if key not in twins:
            continue
        name, twin = twins[key]
        value = twin.to_reference(model.get_parameter(name).detach())
        flat = value.double().flatten()
        found.same(f"shape of {key}", list(value.shape), expected["shape"])
        found.same(f"first values of {key}", flat[:4].tolist(), expected["first"])
        size = flat.abs().sum().item()
        found.add("conversion", f"sum of {key}", abs(flat.sum().item() - expected["sum"]) / size, STORED_AS_FLOAT32)
        found.relative("conversion", f"norm of {key}", flat.norm().item(), expected["l2"], STORED_AS_FLOAT32)
        if f"converted.{key}" in case.arrays:
            found.array("conversion", f"converted.{key}", value, case.arrays[f"converted.{key}"], 0.0)
