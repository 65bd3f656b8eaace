"""Weights into a model: everything fits, or nothing is changed and every difference is named."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mpmae.errors import CheckpointError
from mpmae.models.interop.describe import describe
from mpmae.models.interop.names_in import canonical_name
from mpmae.models.interop.read import Weights, read_weights

_LOG = logging.getLogger(__name__)
_MAX_LISTED = 10


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
    """Loads a whole pretraining checkpoint into an MP-MAE, in place, and says what became of every weight.

    source: anything that `read_weights` takes: a state dict, a file or a folder in the layout of MMEarth-train, of a
    DeepSpeed, DCP or safetensors checkpoint, or of an export. Every parameter must be in it; what else it holds must be the
    unused classifier (`norm`, `head`) of a dense encoder. Logs a warning when something stays unused.
    Raises CheckpointError with every missing, unexpected, misshapen or unsuitable weight; the model is then unchanged.
    """
    weights = as_weights(source)
    trained, bands = weights.bands_in, getattr(model, "bands_in", None)
    if trained and bands and trained != tuple(bands) and len(trained) == len(bands):
        raise CheckpointError(
            f"{weights.source} was trained on {', '.join(trained)}, in this order; the model reads {', '.join(bands)}"
        )
    return _load(model, weights, may_be_unused=("norm.", "head."), may_be_fresh=())


def load_encoder(encoder: nn.Module, source: Mapping[str, Tensor] | str | Path | Weights) -> LoadReport:
    """Loads the encoder of any known checkpoint into an encoder, sparse or dense, or a U-Net, in place.

    Decoder, heads and log variances of the source stay unused; what the model has beyond the encoder keeps its initial
    values if the source has nothing of its shape (another number of classes). Both are reported and logged as a warning.
    Raises CheckpointError as `load_reference`.
    """
    unused = ("decoder.", "heads.", "log_vars", "norm.", "head.", "upsamples.")
    return _load(encoder, as_weights(source), may_be_unused=unused, may_be_fresh=("norm.", "head.", "upsamples."))


def as_weights(source: Mapping[str, Tensor] | str | Path | Weights) -> Weights:
    """`source` if it has been read already, else what `read_weights` makes of it."""
    return source if isinstance(source, Weights) else read_weights(source)


def _load(model: nn.Module, weights: Weights, may_be_unused: tuple[str, ...], may_be_fresh: tuple[str, ...]) -> LoadReport:
    own = {canonical_name(name, "mpmae", False): value for name, value in model.named_parameters()}
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


def _other_geometry(model: nn.Module, weights: Weights) -> tuple[str, ...]:
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
