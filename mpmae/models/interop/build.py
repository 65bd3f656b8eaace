"""`build_multimae`: the MultiMAE that a checkpoint holds; `fresh_multimae`: the same model with random weights."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpmae.domains import NORM_HEAD, domain_of
from mpmae.errors import CheckpointError, ConfigError
from mpmae.modalities import MODALITIES
from mpmae.models.interop.describe import describe
from mpmae.models.interop.describe_multimae import MultiMAEArchitecture
from mpmae.models.interop.load import as_weights, load_encoder, load_reference
from mpmae.models.interop.weights import Weights
from mpmae.models.multimae.init import initialise
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.presets import default_budget, size_problems

_LOG = logging.getLogger(__name__)
_GRID = 7  # patches on a side of the images of the published training
_DECODER = (128, 2, 8)  # dim, depth and heads of decoders that start fresh, as published
_DECODER_HEADS = 8


def build_multimae(
    source: Mapping[str, Tensor] | str | Path | Weights,
    *,
    img_size: int | None = None,
    bands_available: Mapping[str, Sequence[str]] | None = None,
) -> MultiMAE:
    """The MultiMAE of a checkpoint with its weights, in evaluation mode on the CPU; float32, of float64 weights float64.

    source: anything that `read_weights` takes. img_size: pixels, a multiple of the patch size; None: that of the training,
    else 7 patches. bands_available: modality -> bands that a batch's tensors hold, in order; default: those of
    `mpmae.modalities`. What the weights do not show (heads of attention, budget, ...) is taken from what stands beside them,
    else from the usual model, which is logged. A checkpoint of an encoder alone gets fresh decoders, which is logged too.
    Raises CheckpointError: no MultiMAE, a domain that we do not know, weights that do not fit; ConfigError for arguments.
    """
    weights, found = _read(source)
    model = _empty(weights, found, img_size, bands_available)
    load = load_reference if found.decoders else load_encoder
    load(model, weights)
    return model.eval()


def fresh_multimae(source: Mapping[str, Tensor] | str | Path | Weights) -> MultiMAE:
    """The model that `build_multimae` gives, with random weights of torch's generator: none is the checkpoint's."""
    return _empty(*_read(source), None, None).eval()


def _read(source: Mapping[str, Tensor] | str | Path | Weights) -> tuple[Weights, MultiMAEArchitecture]:
    weights = as_weights(source)
    found = describe(weights.state, weights.source)
    if not isinstance(found, MultiMAEArchitecture):
        raise CheckpointError(
            f"{weights.source} holds {found}: no MultiMAE; mpmae.create_encoder builds a ConvNeXt V2 of it"
        )
    return weights, found


def _empty(
    weights: Weights, found: MultiMAEArchitecture, img_size: int | None, bands_available: Mapping[str, Sequence[str]] | None
) -> MultiMAE:
    """The model with fresh weights, in the precision of the checkpoint's, at least float32."""
    where, assumed = weights.source, []

    def known(key, usual):
        value = weights.option(key)
        if value is None:
            assumed.append(f"{key} = {usual}")
        return usual if value is None else value

    plain = [name for name in found.decoders if name != NORM_HEAD] if found.decoders else list(found.domains_in)
    problems, domains = [], {}
    for name in dict.fromkeys((*weights.domains_in, *plain)):
        try:
            domains[name] = domain_of(name)
        except ConfigError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    num_heads = weights.recorded("num_heads") or found.num_heads
    if num_heads is None or found.dim % num_heads:
        problems.append(
            f"{where}: nothing says how many heads an encoder of width {found.dim} has; export it where it was "
            "trained: mpmae-export records them"
        )
    if problems:
        raise CheckpointError(problems)
    size = img_size or known("img_size", _GRID * found.patch_size)
    problems = size_problems(size, found.patch_size, tuple(domains.values()))
    if problems:
        raise ConfigError([f"build_multimae: {problem}" for problem in problems])
    inputs, outputs = (tuple(domains[name] for name in names) for names in (weights.domains_in, plain))
    usual = default_budget(len(inputs) * (size // found.patch_size) ** 2)
    alphas = known("alphas", 1.0)
    dim, depth, heads = (found.decoder_dim, found.decoder_depth, _DECODER_HEADS) if found.decoders else _DECODER
    model = MultiMAE(
        found.dim,
        found.depth,
        num_heads,
        img_size=size,
        patch_size=found.patch_size,
        domains_in=inputs,
        domains_out=outputs,
        # a budget is one of the training's image size
        num_visible=known("num_visible_tokens", usual) if size == weights.img_size else usual,
        alphas=tuple(float(alphas.get(d.name, 1.0) if isinstance(alphas, Mapping) else alphas) for d in inputs),
        sample_domains_uniformly=known("sample_domains_uniformly", False),
        extra_norm_rgb=NORM_HEAD in found.decoders,
        loss_weighting="uncertainty" if found.has_log_vars else "unweighted",
        decoder_dim=dim,
        decoder_depth=depth,
        decoder_num_heads=known("decoder_num_heads", heads),
        bands_available={key: spec.bands for key, spec in MODALITIES.items()}
        | {key: tuple(bands) for key, bands in (bands_available or {}).items()},
        reference_quirks=known("reference_quirks", False),
    )
    initialise(model)
    if assumed:
        _LOG.info("%s does not say everything of the model; assumed as usual: %s", where, ", ".join(assumed))
    return model.to(torch.promote_types(weights.state["global_tokens"].dtype, torch.float32))
