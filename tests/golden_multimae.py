"""Golden cases of MultiMAE: sampler, positions, losses, predictions, tokens, gradients and a short training run.

Shapes: N samples, K domains, L patches, S image side in pixels.
"""

import numpy as np
import torch

from mpmae.domains import domain_of
from mpmae.loader.batch import Batch
from mpmae.modalities import MODALITIES, spec_of
from mpmae.models import MultiMAE
from mpmae.models.interop.multimae import from_published, to_published
from mpmae.models.multimae.losses import domain_share
from mpmae.models.multimae.positions import sincos_table
from mpmae.models.multimae.sampler import TokenSample, choose_tokens, domain_shares, tokens_per_domain
from mpmae.models.multimae.views import map_of, patches_of, standardise_truncated
from tests.golden_cases import STORED_AS_FLOAT32, TOLERANCES, Case, Findings, Tolerance, fill


def check_multimae(case: Case, dtype: torch.dtype, trajectory: bool) -> Findings:
    """What the model gives for a case against what the published code gave."""
    tolerance, found = TOLERANCES[dtype], Findings()
    model, batch = build(case, dtype), batch_of(case)
    check_sampler(case, found)
    seen = {}
    model.encoder[0].register_forward_pre_hook(lambda module, args: seen.__setitem__("enc_in", args[0]))
    sample = TokenSample(torch.from_numpy(case.arrays["ids_keep"].astype(np.int64)), None)
    out = model.train()(batch, sample, return_predictions=True)
    out.loss.backward()

    for name, expected in case.entry["loss"].items():
        found.relative("loss", f"loss {name}", out.losses[name].item(), expected, tolerance.loss)
    found.relative("loss", "total loss", out.loss.item(), case.entry["loss_total"], tolerance.loss)
    for key in [key for key in case.arrays if key.startswith("pred.")]:
        found.array("prediction", key, out.predictions[key[5:]], case.arrays[key], tolerance.prediction)
    found.activation("enc_in", seen["enc_in"], case.arrays["enc_in"], tolerance.prediction)
    found.activation("enc_out", out.latent, case.arrays["enc_out"], tolerance.prediction)
    depth = torch.from_numpy(case.arrays["in.depth"].astype(np.float64)).to(dtype)
    standardised = standardise_truncated(depth, torch.ones_like(depth, dtype=torch.bool))
    found.activation("depth", standardised, case.arrays["depth_standardized"], tolerance.prediction)
    for key, width in (("pos_emb.rgb_input_28x28", model.table.shape[1]), ("pos_emb.rgb_output_28x28", 64)):
        if key in case.arrays:
            found.array("positions", key, sincos_table(width, 28), case.arrays[key], STORED_AS_FLOAT32)
    _check_everywhere(case, batch, out.predictions, found, tolerance)
    _check_gradients(case, model, found, tolerance)
    if trajectory:
        _check_trajectory(case, dtype, batch, sample, found, tolerance)
    return found


def build(case: Case, dtype: torch.dtype) -> MultiMAE:
    """The case's model with its weights: its width is none of the presets', so it is built from its parts."""
    dim, args = case.entry["config"]["case"]["dim"], case.entry["config"]["args"]
    inputs, outputs = (tuple(map(domain_of, args[key])) for key in ("in_domains", "out_domains"))
    model = MultiMAE(
        dim["dim_tokens"],
        dim["depth"],
        dim["num_heads"],
        img_size=args["input_size"],
        patch_size=args["patch_size"],
        domains_in=inputs,
        domains_out=outputs,
        num_visible=args["num_encoded_tokens"],
        alphas=(args["alphas"],) * len(inputs),
        sample_domains_uniformly=args["sample_tasks_uniformly"],
        extra_norm_rgb=args["extra_norm_pix_loss"],
        loss_weighting="unweighted",
        decoder_dim=args["decoder_dim"],
        decoder_depth=args["decoder_depth"],
        decoder_num_heads=args["decoder_num_heads"],
        bands_available={name: spec.bands for name, spec in MODALITIES.items()},
        reference_quirks=True,
    )
    seed = case.entry["config"]["case"]["weight_seed"]
    weights = {name: fill(seed, name, *rest) for name, *rest in case.entry["params"]}
    model.load_state_dict(from_published(weights, tuple(model.domains_in), tuple(model.targets)))
    return model.to(dtype)


def batch_of(case: Case) -> Batch:
    """The case's inputs as a loader would give them: whole modalities, class ids at full resolution."""
    names = case.entry["token_order"]
    num, size = len(case.inputs["in.rgb"]), case.inputs["in.rgb"].shape[-1]
    values = {}
    for domain in map(domain_of, names):
        raw = torch.from_numpy(case.inputs[f"in.{domain.name}"].astype(np.float32))
        if domain.num_classes:
            stride = domain.stride
            ids = raw.long()[:, None].repeat_interleave(stride, 2).repeat_interleave(stride, 3)
            values[domain.modality] = ids
            continue
        bands = spec_of(domain.modality).bands
        whole = values.setdefault(domain.modality, torch.zeros(num, len(bands), size, size))
        whole[:, [bands.index(band) for band in domain.bands]] = raw
    valid = {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
    return Batch(values, valid, torch.arange(num), dict.fromkeys(values, num), num)


def check_sampler(case: Case, found: Findings) -> None:
    """The tokens that follow from the case's random numbers."""
    arrays, names = case.arrays, case.entry["token_order"]
    shares = torch.from_numpy(arrays["rng.dirichlet"])
    everywhere = torch.ones_like(shares, dtype=torch.bool)
    found.array("sampler", "shares", domain_shares(shares.log(), everywhere), arrays["rng.dirichlet"], 1e-6)
    budget = arrays["ids_keep"].shape[1]
    counts = tokens_per_domain(shares, budget)
    found.same("tokens per domain", counts.tolist(), arrays["rng.samples_per_task"].tolist())
    noise = torch.stack([torch.from_numpy(arrays[f"rng.noise.{name}"]) for name in names], dim=1)
    # the published code compares with the permutation that sorts the noise, where a rank would be its inverse
    priority = noise.argsort(2).float()
    refill = torch.from_numpy(arrays["rng.final_noise"]).view_as(noise)
    available = torch.ones_like(noise, dtype=torch.bool)
    sample = choose_tokens(counts, everywhere, priority, refill, available, budget)
    found.same("visible tokens", sample.index.tolist(), np.sort(arrays["ids_keep"], axis=1).tolist())
    hidden = torch.ones(len(shares), noise[0].numel(), dtype=torch.uint8).scatter(1, sample.index, 0)
    for name, part in zip(names, hidden.chunk(len(names), 1), strict=True):
        found.same(f"mask of {name}", part.tolist(), arrays[f"mask.{name}"].tolist())


def _check_everywhere(
    case: Case, batch: Batch, predictions: dict[str, torch.Tensor], found: Findings, tolerance: Tolerance
) -> None:
    """The losses over all tokens, the visible ones too."""
    model = build(case, next(iter(predictions.values())).dtype)
    for name, expected in case.entry["loss_if_on_all_tokens"].items():
        domain = model.targets[name]
        values = model._view(batch, domain).values
        pred = patches_of(predictions[name].detach(), model.num_patches_side)
        loss = _share(name, domain, pred, values, torch.ones(len(pred), model.num_patches), model.num_patches_side)
        found.relative("loss", f"loss {name} on all tokens", loss.item(), expected, tolerance.loss)


def _share(name: str, domain, pred: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor, side: int) -> torch.Tensor:
    target = patches_of(target if target.ndim == 4 else target[:, None], side)
    counts = {"num_present": len(pred), "global_batch_size": len(pred)}
    everything = torch.ones_like(target, dtype=torch.bool), hidden.bool(), torch.ones(len(pred), dtype=torch.bool)
    return domain_share(domain, pred, target, *everything, **counts, norm_pix=name == "norm_rgb", quirks=True)


def _check_gradients(case: Case, model: MultiMAE, found: Findings, tolerance: Tolerance) -> None:
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = to_published(own, tuple(model.domains_in), tuple(model.targets))
    found.same("parameters", sorted(grads), sorted(case.entry["grad_norm"]))
    for key, expected in case.entry["grad_norm"].items():
        norm = grads[key].double().norm().item()
        found.relative("grad norm", f"gradient norm of {key}", norm, expected, tolerance.grad_norm)
    for key in [key for key in case.arrays if key.startswith("grad.")]:
        scale = float(np.abs(case.arrays[key]).max())
        bound = max(tolerance.grad_norm, 5e-7)  # stored in float32
        found.array("grad", key, grads[key[5:]] / scale, case.arrays[key] / scale, bound)


def _check_trajectory(
    case: Case, dtype: torch.dtype, batch: Batch, sample: TokenSample, found: Findings, tolerance: Tolerance
) -> None:
    expected = case.entry["trajectory"]
    model = build(case, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=expected["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for step, (total, losses) in enumerate(expected["loss"]):
        out = model(batch, sample)
        found.relative("trajectory", f"loss after {step} steps", out.loss.item(), total, tolerance.trajectory)
        for name, loss in losses.items():
            found.relative("trajectory", f"{name} after {step} steps", out.losses[name].item(), loss, tolerance.trajectory)
        if step < expected["steps"]:
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()


def check_multimae_losses(case: Case, dtype: torch.dtype) -> Findings:
    """The loss functions alone, with a sample whose domain is fully visible."""
    tolerance, found = TOLERANCES[dtype], Findings()
    hidden = torch.from_numpy(case.arrays["mask"])
    side = int(hidden.shape[1] ** 0.5)
    for name, expected in case.entry["loss"].items():
        domain = domain_of("rgb" if name == "norm_rgb" else name)
        pred = patches_of(torch.from_numpy(case.arrays[f"{name}.pred"]).to(dtype), side)
        target = torch.from_numpy(case.arrays[f"{name}.target"])
        target = target.long() if domain.num_classes else target.to(dtype)
        for kind, where in (("masked", hidden), ("unmasked_mean", torch.ones_like(hidden))):
            loss = _share(name, domain, pred, target, where, side)
            found.relative("loss", f"{name} {kind}", loss.item(), expected[kind], tolerance.loss)
    raw = torch.from_numpy(case.arrays["depth_raw"]).to(dtype)
    standardised = standardise_truncated(raw, torch.ones_like(raw, dtype=torch.bool))
    found.activation("depth", standardised, case.arrays["depth_standardized"], tolerance.prediction)
    logits = torch.from_numpy(case.arrays["semseg.pred"])
    found.array("layout", "map of patches", map_of(patches_of(logits, side), 12, side), case.arrays["semseg.pred"], 0)
    return found
