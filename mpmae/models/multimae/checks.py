"""What is wrong with what a MultiMAE is given; every problem at once, as a ConfigError.

Shapes: N samples, K input domains, L patches of each, T tokens, V visible ones.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpmae.errors import ConfigError
from mpmae.loader.batch import Batch
from mpmae.modalities import spec_of
from mpmae.models.multimae.draw import TokenDraw
from mpmae.models.multimae.sampler import TokenSample

if TYPE_CHECKING:
    from mpmae.models.multimae.model import MultiMAE

_SHOWN = 8  # samples or modalities named in a message


def looked_at(tensor: Tensor) -> bool:
    """Whether values may be looked at: a GPU would have to wait for the answer, a compiler must not branch on them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def known_full(flags: Tensor) -> bool:
    """Whether all flags are known to be True."""
    return looked_at(flags) and bool(flags.all())


def domain_subset(model: "MultiMAE", domains: Sequence[str] | None) -> tuple[str, ...]:
    """The chosen input domains in the order of the tokens; None: all."""
    if domains is None:
        return tuple(model.domains_in)
    domains = (domains,) if isinstance(domains, str) else tuple(domains)
    known = ", ".join(model.domains_in)
    problems = [
        f"encode: {name!r} is no input domain of this model; it has {known}"
        for name in domains
        if name not in model.domains_in
    ]
    if not domains:
        problems.append(f"encode: an empty list of domains; name at least one of {known}")
    if problems:
        raise ConfigError(problems)
    return tuple(name for name in model.domains_in if name in domains)


def check_batch(model: "MultiMAE", batch: Batch, modalities: Sequence[str], scored: set[str]) -> None:
    """That the batch holds these modalities in the model's shape; `scored` are those whose tiles must be counted."""
    problems = [] if len(batch) else ["batch: no samples in it"]
    for name in modalities:
        if name not in batch.values or name not in batch.valid:
            problems.append(
                f"batch: no {name}; it has {', '.join(batch.values)}. Load it or take its domains out of the model"
            )
            continue
        if name in scored and name not in batch.num_present:
            problems.append(f"batch.num_present: no {name}; expected its number of tiles in the global batch")
        problems += _tensor_problems(model, batch, name)
    if problems:
        raise ConfigError(problems)


def _tensor_problems(model: "MultiMAE", batch: Batch, name: str) -> list[str]:
    values, valid, spec = batch.values[name], batch.valid[name], spec_of(name)
    categorical, problems = spec.kind == "categorical", []
    channels = 1 if categorical else len(model.bands_available[name])
    expected = (len(batch), channels, model.img_size, model.img_size)
    if tuple(values.shape) != expected:
        problems.append(f"batch.values[{name!r}]: shape {list(values.shape)}, expected {list(expected)}")
    if valid.shape != values.shape:
        problems.append(
            f"batch.valid[{name!r}]: shape {list(valid.shape)}, expected that of the values, {list(values.shape)}"
        )
    if valid.dtype != torch.bool:
        problems.append(f"batch.valid[{name!r}]: dtype {valid.dtype}, expected torch.bool")
    if not categorical and not values.is_floating_point():
        problems.append(f"batch.values[{name!r}]: dtype {values.dtype}, expected floating-point numbers")
    if categorical and values.dtype != torch.int64:
        problems.append(f"batch.values[{name!r}]: dtype {values.dtype}, expected torch.int64 class ids")
    elif categorical and not problems and looked_at(values) and values.numel():
        # the published code has a class more, its number for no data
        largest, allowed = int(torch.where(valid, values, -1).max()), spec.num_classes - (not model.reference_quirks)
        if largest > allowed:
            problems.append(f"batch.values[{name!r}]: class id {largest}, expected at most {allowed}")
    return problems


def check_data(batch: Batch, available: Tensor, names: Sequence[str]) -> None:
    """That every sample has a patch with data, `available` bool [N, K, L], in one of the input domains `names`."""
    if not looked_at(available):
        return
    empty = (~available.flatten(1).any(1)).nonzero()[:, 0].tolist()
    if empty:
        ids = ", ".join(str(int(batch.sample_ids[row])) for row in empty[:_SHOWN])
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise ConfigError(
            f"batch: no data in any input domain ({', '.join(names)}) for {len(empty)} of {len(batch)} samples, "
            f"ids {ids}{more}; leave them out of the split, or add an input domain that they have"
        )


def check_draw(model: "MultiMAE", tokens: TokenDraw, num: int) -> None:
    """That random numbers have the model's shapes."""
    if not isinstance(tokens, TokenDraw):
        raise ConfigError(
            f"tokens: a {type(tokens).__name__}, expected the random numbers of MultiMAE.draw, a TokenSample or None"
        )
    per_domain = (num, len(model.domains_in))
    expected = TokenDraw(per_domain, (num,), (*per_domain, model.num_patches), (*per_domain, model.num_patches))
    problems = [
        f"tokens.{name}: shape {list(getattr(tokens, name).shape)}, expected {list(shape)}"
        for name, shape in expected._asdict().items()
        if tuple(getattr(tokens, name).shape) != shape
    ]
    if problems:
        raise ConfigError(problems)


def check_sample(model: "MultiMAE", tokens: TokenSample, num: int) -> None:
    """That chosen tokens are tokens of the model, each at most once."""
    index, real, problems = tokens.index, tokens.real, []
    if index.dtype != torch.int64:
        problems.append(f"tokens.index: dtype {index.dtype}, expected torch.int64 token numbers")
    if index.ndim != 2 or len(index) != num or not 0 < index.shape[1] <= model.num_tokens:
        problems.append(
            f"tokens.index: shape {list(index.shape)}, expected [{num}, 1 to {model.num_tokens}] (samples, visible tokens)"
        )
    elif not problems and looked_at(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= model.num_tokens:
            problems.append(f"tokens.index: token numbers {low}..{high}, expected 0..{model.num_tokens - 1}")
        if bool((index.sort(1).values.diff(dim=1) == 0).any()):
            problems.append("tokens.index: a row names a token twice; name each once")
    if real is not None and (real.dtype != torch.bool or real.shape != index.shape):
        problems.append(
            f"tokens.real: {real.dtype} {list(real.shape)}, expected torch.bool of the index's shape {list(index.shape)}"
        )
    if problems:
        raise ConfigError(problems)
