"""Weights into a model: everything fits, or nothing is changed and every difference is named."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mpmae.errors import CheckpointError
from mpmae.models.interop.describe import describe
from mpmae.models.interop.multimae_names import decoders_of, domains_of, multimae_scheme
from mpmae.models.interop.names_in import canonical_name
from mpmae.models.interop.read import read_weights
from mpmae.models.interop.weights import Weights

_LOG = logging.getLogger(__name__)
_MAX_LISTED = 10
_REST = ("decoders.", "log_vars")  # of a MultiMAE, all but its encoder
_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class LoadReport:
    """What became of every weight.

    loaded: our names. unused: names of the source that this model has no place for. fresh: parameters of the model that
    the source does not have and that keep their initial values. reshaped: see `Weights`. cast: "name: from -> to" dtypes.
    other_geometry: where the model computes otherwise than what the weights were trained in (see `Weights.stem_padding`).
    """

    source: str
    scheme: str
    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    fresh: tuple[str, ...]
    reshaped: tuple[str, ...]
    cast: tuple[str, ...]
    other_geometry: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.source} ({self.scheme}): {len(self.loaded)} weights loaded"]
        parts += [f"not used: {_short(self.unused)}"] if self.unused else []
        parts += [f"not in the checkpoint, initial values kept: {_short(self.fresh)}"] if self.fresh else []
        parts += [f"{len(self.reshaped)} reshaped"] if self.reshaped else []
        parts += [f"trained with {', '.join(self.other_geometry)}: features will differ"] if self.other_geometry else []
        parts += [f"cast: {len(self.cast)} from {self.cast[0].split()[1]}"] if self.cast else []
        return "; ".join(parts)


def load_reference(model: nn.Module, source: Mapping[str, Tensor] | str | Path | Weights) -> LoadReport:
    """Loads a whole pretraining checkpoint into an MP-MAE or a MultiMAE, in place, and says what became of every weight.

    source: anything that `read_weights` takes: a state dict, a file or a folder in the layout of MMEarth-train or of the
    published MultiMAE, of a DeepSpeed, DCP or safetensors checkpoint, or of an export. Every parameter must be in it. What
    else it holds must be the unused classifier (`norm`, `head`) of a dense encoder; of a MultiMAE, nothing. Logs a warning
    when something stays unused.
    Raises CheckpointError with every missing, unexpected, misshapen or unsuitable weight; the model is then unchanged.
    """
    weights = as_weights(source)
    trained, bands = weights.bands_in, getattr(model, "bands_in", None)
    if trained and bands and trained != tuple(bands) and len(trained) == len(bands):
        raise CheckpointError(
            f"{weights.source} was trained on {', '.join(trained)}, in this order; the model reads {', '.join(bands)}"
        )
    if weights.family == "multimae":  # what its decoders are cannot be said without every name of them
        weights = replace(weights, state=weights.state | dict.fromkeys(weights.unknown, _NOTHING), unknown=())
    return _load(model, weights, may_be_unused=("norm.", "head."), may_be_fresh=())


def load_encoder(encoder: nn.Module, source: Mapping[str, Tensor] | str | Path | Weights) -> LoadReport:
    """Loads the encoder of any known checkpoint into an encoder, sparse or dense, or a U-Net, or a MultiMAE, in place.

    Decoder, heads and log variances of the source stay unused; what the model has beyond the encoder keeps its initial
    values if the source has nothing of its shape (another number of classes). Of a MultiMAE the adapters of the input
    domains that both have are loaded, and its decoders keep their initial values. All is reported and logged as a warning.
    Raises CheckpointError as `load_reference`.
    """
    weights = as_weights(source)
    if weights.family == "multimae":
        return _load(encoder, *_encoder_part(encoder, weights))
    unused = ("decoder.", "heads.", "log_vars", "norm.", "head.", "upsamples.")
    return _load(encoder, weights, may_be_unused=unused, may_be_fresh=("norm.", "head.", "upsamples."))


def _encoder_part(model: nn.Module, weights: Weights) -> tuple[Weights, tuple[str, ...], tuple[str, ...]]:
    """A MultiMAE's weights without decoders, and what of the weights and of the model may have no counterpart.

    Decoders of another model may have the same shapes as these and yet be of other domains.
    """
    own, found = domains_of(dict(model.named_parameters())), domains_of(weights.state)
    if own and not set(own) & set(found):
        raise CheckpointError(f"{weights.source} reads {', '.join(found)}, the model {', '.join(own)}: no domain in common")
    others = tuple(name for name in weights.state if name.startswith(_REST))
    state = {name: value for name, value in weights.state.items() if name not in others}
    unused, fresh = (tuple(f"input_adapters.{d}." for d in a if d not in b) for a, b in ((found, own), (own, found)))
    return replace(weights, state=state, unknown=weights.unknown + others), unused, (*_REST, *fresh)


def as_weights(source: Mapping[str, Tensor] | str | Path | Weights) -> Weights:
    """`source` if it has been read already, else what `read_weights` makes of it."""
    return source if isinstance(source, Weights) else read_weights(source)


def _load(model: nn.Module, weights: Weights, may_be_unused: tuple[str, ...], may_be_fresh: tuple[str, ...]) -> LoadReport:
    own = {canonical_name(name, "mpmae", False): value for name, value in model.named_parameters()}
    _check_family(own, weights)
    state, where = dict(weights.state), weights.source
    problems, values, fresh, cast, unused = [], {}, [], [], list(weights.unknown)
    for name, parameter in own.items():
        value = state.pop(name, None)
        shape = list(parameter.shape)
        optional = name.startswith(may_be_fresh)
        if parameter.is_meta:
            problems.append(f"{name} of the model is on the meta device; give it memory first (model.to_empty)")
        elif value is None or (optional and value.shape != parameter.shape):
            unused += [name] if value is not None else []
            fresh.append(name) if optional else problems.append(f"{where}: missing {name} {shape}")
        elif value.shape != parameter.shape:
            problems.append(f"{where}: {name} has shape {list(value.shape)}, expected {shape}")
        elif value.dtype != parameter.dtype and not _widens(value.dtype, parameter.dtype):
            problems.append(
                f"{where}: {name} is {value.dtype}, the model {parameter.dtype}: that would lose digits; convert the "
                "weights or the model first"
            )
        else:
            values[name] = value
            cast += [f"{name}: {value.dtype} -> {parameter.dtype}"] if value.dtype != parameter.dtype else []
    unused += [name for name in state if name.startswith(may_be_unused)]
    problems += [f"{where}: unexpected {name}; this model has no such parameter" for name in state if name not in unused]
    if problems:
        differences = [] if may_be_fresh else _differences(own, weights)
        if differences:  # these change the shapes of all decoders' weights, which stand together
            problems = [*differences, *(problem for problem in problems if "decoders." not in problem)]
        raise CheckpointError(_architecture_problem(own, weights) + _limited(problems))
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    other = _other_geometry(model, weights)
    report = LoadReport(
        where, weights.scheme, tuple(values), tuple(unused), tuple(fresh), weights.reshaped, tuple(cast), other
    )
    _LOG.log(logging.WARNING if unused or fresh or other else logging.INFO, "%s", report)
    return report


def _check_family(own: dict[str, Tensor], weights: Weights) -> None:
    is_multimae = multimae_scheme(own) is not None
    if is_multimae != (weights.family == "multimae"):
        model = "a MultiMAE" if is_multimae else "a ConvNeXt V2 or MP-MAE"
        raise CheckpointError(
            f"{weights.source} holds {describe(weights.state, weights.source)}: its weights have no place in the model, "
            f"which is {model}"
        )
    named = tuple(dict.fromkeys(name.split(".")[1] for name in own if name.startswith("input_adapters.")))
    if named != domains_of(own):
        raise CheckpointError(
            f"the model's input domains are {', '.join(named)}, in this order; expected that of create_model, "
            f"{', '.join(domains_of(own))}, in which weights are stored"
        )


def _differences(own: dict[str, Tensor], weights: Weights) -> list[str]:
    """Input domains and decoders of a MultiMAE that only one side has."""
    problems = []
    for what, names_of in (("input domain", domains_of), ("decoder", decoders_of)):
        model, found = names_of(own), names_of(weights.state)
        absent, surplus = ([name for name in a if name not in b] for a, b in ((model, found), (found, model)))
        problems += [f"{weights.source}: missing {what} {name}, which the model has" for name in absent]
        problems += [f"{weights.source}: unexpected {what} {name}; the model has none" for name in surplus]
    return problems


def _other_geometry(model: nn.Module, weights: Weights) -> tuple[str, ...]:
    if weights.family == "multimae":
        return tuple(weights.recorded("other_geometry") or ())
    encoder = getattr(model, "encoder", model)
    trained = {"stem_padding": weights.stem_padding, "grn_eps": weights.grn_eps}
    if "encoder.stem.pool.weight" not in weights.state:
        del trained["stem_padding"]  # it changes this one stem only
    return tuple(
        f"{key} = {value}, here {getattr(encoder, key)}" for key, value in trained.items() if value != getattr(encoder, key)
    )


def _widens(source: torch.dtype, target: torch.dtype) -> bool:
    return torch.promote_types(source, target) == target


def _architecture_problem(own: dict[str, Tensor], weights: Weights) -> list[str]:
    """One line that says what the checkpoint is and what the model is, where that differs."""
    model, found = describe(own, "the model"), describe(weights.state, weights.source)
    return [] if model == found else [f"{weights.source} holds {found}; the model is {model}"]


def _limited(problems: list[str]) -> list[str]:
    if len(problems) <= _MAX_LISTED:
        return problems
    return [*problems[:_MAX_LISTED], f"... and {len(problems) - _MAX_LISTED} more"]


def _short(names: Iterable[str]) -> str:
    """Names by their first part, with counts: the report's fields have them whole."""
    counts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{part} ({count})" if count > 1 else part for part, count in counts.items())
