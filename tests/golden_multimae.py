"""Golden cases of MultiMAE: sampler, positions, losses, predictions, tokens, gradients and a short training run.

Shapes: N samples, K domains, L patches, S image side in pixels.
"""

import numpy as np
import torch

from mpmae.domains import domain_of
from mpmae.loader.batch import Batch
from mpmae.modalities import MODALITIES, spec_of
from mpmae.models import MultiMAE
from mpmae.models.interop.multimae import balanced_order, from_published, to_published
from mpmae.models.multimae.losses import domain_share
from mpmae.models.multimae.sampler import TokenSample, choose_tokens, domain_shares, tokens_per_domain
from mpmae.models.multimae.views import map_of, patches_of, standardise_truncated
from tests.golden_cases import STORED_AS_FLOAT32, TOLERANCES, Case, Findings, Tolerance, fill


def check_multimae(case: Case, dtype: torch.dtype, trajectory: bool) -> Findings:
    """What the model gives for a case against what the published code gave."""
    tolerance, found = TOLERANCES[dtype], Findings()
    model, batch = build(case, dtype), batch_of(case)
    if "rng.dirichlet" in case.arrays:
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
    for key, value in (seen | {"enc_out": out.latent}).items():
        if key in case.arrays:
            found.activation(key, value, case.arrays[key], tolerance.prediction)
    if "depth_standardized" in case.arrays:
        depth = torch.from_numpy(case.inputs["in.depth"].astype(np.float64)).to(dtype)
        standardised = standardise_truncated(depth, torch.ones_like(depth, dtype=torch.bool))
        found.activation("depth", standardised, case.arrays["depth_standardized"], tolerance.prediction)
    for key in [key for key in case.arrays if key.startswith("pos_emb.")]:
        table = model.table if "_input_" in key else model.decoders.table
        found.array("positions", key, table.float(), case.arrays[key], STORED_AS_FLOAT32)
    _check_everywhere(case, batch, out.predictions, found, tolerance)
    _check_gradients(case, model, found, tolerance)
    if trajectory and "trajectory" in case.entry:
        _check_trajectory(case, dtype, batch, sample, found, tolerance)
    return found


def build(case: Case, dtype: torch.dtype) -> MultiMAE:
    """The case's model with its weights."""
    model = empty(case)
    seed, balancer = case.entry["config"]["case"]["weight_seed"], _balancer(case)
    weights = {name: fill(seed, name, *rest) for name, *rest in case.entry["params"]}
    log_vars = {"log_vars": weights.pop(balancer).flatten()[_places(case, model)]} if balancer else {}
    model.load_state_dict(from_published(weights, tuple(model.domains_in), tuple(model.targets)) | log_vars)
    return model.to(dtype)


def empty(case: Case) -> MultiMAE:
    """The case's model without weights: its width need not be one of the presets', so it is built from its parts."""
    dim, args = case.entry["config"]["case"]["dim"], case.entry["config"]["args"]
    inputs = tuple(map(domain_of, case.entry["token_order"]))  # that of the published batch, which no argument says
    outputs = tuple(map(domain_of, args["out_domains"]))
    alphas = args["alphas"] if isinstance(args["alphas"], list) else [args["alphas"]] * len(inputs)
    return MultiMAE(
        dim["dim_tokens"],
        dim["depth"],
        dim["num_heads"],
        img_size=args["input_size"],
        patch_size=args["patch_size"],
        domains_in=inputs,
        domains_out=outputs,
        num_visible=args["num_encoded_tokens"],
        alphas=tuple(alphas),
        sample_domains_uniformly=args["sample_tasks_uniformly"],
        extra_norm_rgb=args["extra_norm_pix_loss"],
        loss_weighting="uncertainty" if _balancer(case) else "unweighted",
        decoder_dim=args["decoder_dim"],
        decoder_depth=args["decoder_depth"],
        decoder_num_heads=args["decoder_num_heads"],
        bands_available={name: spec.bands for name, spec in MODALITIES.items()},
        reference_quirks=True,
    )


def _balancer(case: Case) -> str | None:
    """The name of the published log variances, where the case has them."""
    return next((name for name, *_ in case.entry["params"] if name.endswith("log_vars")), None)


def _places(case: Case, model: MultiMAE) -> list[int]:
    """Where each decoder's log variance stands among the published ones."""
    order = balanced_order(tuple(model.targets), case.entry["config"]["args"])
    return [order.index(name) for name in model.targets]


def batch_of(case: Case) -> Batch:
    """The case's inputs as a loader would give them: whole modalities, class ids at full resolution."""
    names = [key.removeprefix("in.") for key in case.inputs if key.startswith("in.")]
    num, size = len(case.inputs[f"in.{names[0]}"]), case.entry["config"]["args"]["input_size"]
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
    log_vars, balancer = own.pop("log_vars", None), _balancer(case)
    grads = to_published(own, tuple(model.domains_in), tuple(model.targets))
    if balancer in case.entry["grad_norm"]:
        grads[balancer] = torch.empty_like(log_vars).index_copy(0, torch.tensor(_places(case, model)), log_vars)
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
        found.array("layout", "map of patches", map_of(pred, domain.num_channels, side), case.arrays[f"{name}.pred"], 0)
    raw = torch.from_numpy(case.arrays["depth_raw"]).to(dtype)
    standardised = standardise_truncated(raw, torch.ones_like(raw, dtype=torch.bool))
    found.activation("depth", standardised, case.arrays["depth_standardized"], tolerance.prediction)
    return found
