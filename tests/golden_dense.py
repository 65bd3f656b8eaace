"""Golden cases of the dense models: the classifier (`dense_*`) and the U-Net (`unet_*`).

Shapes: N images, B bands, C channels, H sites on a side.
"""

import math

import torch

import mpmae
from mpmae.models import ConvNeXtV2, UNet
from mpmae.models.dense import REFERENCE_GRN_EPS
from mpmae.models.interop import read_weights, to_mmearth
from mpmae.models.interop.names_in import canonical_name, is_depthwise
from tests.golden_cases import STORED_AS_FLOAT32, TOLERANCES, Case, Findings, bands_of, fill, read_manifest
from tests.golden_names import published, published_gradients


def check_dense(case: Case, dtype: torch.dtype) -> Findings:
    """What the dense model gives, with weights converted from the sparse encoder's, against what the published one gave."""
    tolerance, found = TOLERANCES[dtype], Findings()
    model = build(case)
    _load(case, model)
    _check_conversion(case, published(model, {name: value.detach() for name, value in model.named_parameters()}), found)
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
    grads = published_gradients(model)
    for key, expected in case.entry["grad_norm"].items():
        if expected is None:  # the published U-Net carries a norm that never runs
            found.same(f"{key} among our parameters", key in grads, False)
            continue
        # stored are norms summed up in float32, and so is ours; in another order (it follows the CPU) the sum is off by up
        # to 4e-11 for each of its terms
        allowed = max(tolerance.grad_norm, STORED_AS_FLOAT32 + 1e-10 * grads[key].numel())
        found.relative("grad norm", f"gradient norm of {key}", grads[key].float().norm().item(), expected, allowed)
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


def _load(case: Case, model: ConvNeXtV2 | UNet) -> None:
    prefix = "encoder." if isinstance(model, UNet) else ""
    state = {prefix + name.removeprefix("encoder."): value for name, value in pretrained(case).items()}
    model.load_state_dict(state | own_weights(case, model))


def own_weights(case: Case, model: ConvNeXtV2 | UNet) -> dict[str, torch.Tensor]:
    """What the model has beyond the pretrained encoder, under our names."""
    own = {name: fill(case.entry["own_fill_seed"], name, *rest) for name, *rest in case.entry["params_own_fill"]}
    if isinstance(model, UNet):  # the published one carries a norm that never runs
        own = {name: value for name, value in own.items() if not name.startswith("norm.")}
    return {canonical_name(name, "mmearth-dense", case.stem == "convnext"): value for name, value in own.items()}


def pretrained(case: Case) -> dict[str, torch.Tensor]:
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
    shapes = to_mmearth({name: value.detach() for name, value in sparse.named_parameters() if name.startswith("encoder.")})
    filled = {}
    for name, value in shapes.items():
        loc, scale = listed.get(name) or _recipe(name, value.shape)
        filled[name] = fill(seed, name, tuple(value.shape), loc, scale)
    return read_weights(filled).state


def _listed(case: Case, seed: int) -> dict[str, tuple[float, float]]:
    """Mean and spread of each pretrained parameter, where the set has the MP-MAE case that they are of."""
    for entry in read_manifest(case.folder)["cases"].values():
        if entry.get("config", {}).get("weight_seed") == seed and "loss_order" in entry:
            return {name: (loc, scale) for name, _, loc, scale in entry["params"]}
    return {}


def _recipe(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and spread as all MP-MAE cases list them; the checksums of the converted weights would tell another choice."""
    if ".grn." in name:
        return 0.0, 0.2
    if name.endswith(".bias"):
        return 0.0, 0.05
    if len(shape) == 1:
        return 1.0, 0.1
    if is_depthwise(name.replace(".kernel", ".weight")) or name == "encoder.stem.0.kernel":
        fan_in = shape[0]
    else:
        fan_in = math.prod(shape[:-1]) if name.endswith(".kernel") else shape[1]
    return 0.0, fan_in**-0.5


def _check_conversion(case: Case, weights: dict[str, torch.Tensor], found: Findings) -> None:
    """weights: our parameters under their published names."""
    unused = set(case.entry["not_used_from_checkpoint"])  # belongs to the decoder or the loss
    found.same("converted names", set(case.entry["converted_checksums"]) - unused - set(weights), set())
    for key, expected in case.entry["converted_checksums"].items():
        if key not in weights:
            continue
        value = weights[key]
        flat = value.double().flatten()
        found.same(f"shape of {key}", list(value.shape), expected["shape"])
        found.same(f"first values of {key}", flat[:4].tolist(), expected["first"])
        size = flat.abs().sum().item()
        found.add("conversion", f"sum of {key}", abs(flat.sum().item() - expected["sum"]) / size, STORED_AS_FLOAT32)
        found.relative("conversion", f"norm of {key}", flat.norm().item(), expected["l2"], STORED_AS_FLOAT32)
        if f"converted.{key}" in case.arrays:
            found.array("conversion", f"converted.{key}", value, case.arrays[f"converted.{key}"], 0.0)
