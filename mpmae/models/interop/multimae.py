"""Names of the published MultiMAE weights, and ours, both ways. Every value keeps its bits.

Ours stack the decoders' weights: a parameter of all T of them is one tensor with T first, in the order of `decoders.heads`.

| published                                              | ours                                                    |
|--------------------------------------------------------|---------------------------------------------------------|
| `global_tokens`, `input_adapters.*`, `encoder.*`       | the same                                                |
| `output_adapters.<decoder>.mask_token` [1, 1, D]       | `decoders.mask_token` [T, D]                            |
| `output_adapters.<decoder>.task_embeddings.<input>`    | `decoders.task_embeddings` [T, K, D]                    |
| `output_adapters.<decoder>.out_proj.*`                 | `decoders.heads.<decoder>.*`                            |
| `output_adapters.<decoder>.decoder.*`                  | `decoders.cross.*`                                      |
| `output_adapters.<decoder>.decoder_transformer.*`      | `decoders.blocks.*`                                     |
| `output_adapters.<decoder>.<rest>`                     | `decoders.<rest>`                                       |
| `*.pos_emb`, fixed                                     | not stored                                              |
| beside the model: `loss_balancer`, `log_vars`          | `log_vars`                                              |

Source: multimae-meets-eo and EPFL-VILAB/MultiMAE, `multimae.py`, `input_adapters.py`, `output_adapters.py`; of the file
around them `checkpoint.py`, `task_balancing.py` and the scripts for pretraining.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpmae.domains import DOMAINS
from mpmae.errors import CheckpointError
from mpmae.models.interop.describe_multimae import describe_multimae
from mpmae.models.interop.multimae_names import OURS, PUBLISHED, decoder_order, decoders_of, domains_of, is_ours
from mpmae.models.interop.values import Canonical, value_problem
from mpmae.models.multimae.positions import TABLE_SIZE_PX, sincos_table, table_side

BALANCER = "loss_balancer.log_vars"
_OUTPUT = "output_adapters."
_INNER = {"decoder.": "cross.", "decoder_transformer.": "blocks."}
_TASKS, _HEAD, _POSITIONS = "task_embeddings.", "out_proj.", "pos_emb"
_FIXED, _FIXED_WITHIN = 1e-3, {torch.float16: 1e-2, torch.bfloat16: 1e-2}  # of positions in [-1, 1]
_ALWAYS_ON = ("standardize_depth", "decoder_use_task_queries")  # in our model
_ARGUMENTS = {
    "input_size": "img_size",
    "num_encoded_tokens": "num_visible_tokens",
    "alphas": "alphas",
    "sample_tasks_uniformly": "sample_domains_uniformly",
    "decoder_num_heads": "decoder_num_heads",
}


def config_of(command_line: Mapping[str, Any]) -> dict[str, Any]:
    """What a published checkpoint's command line says, as it would stand in a checkpoint of ours (see `Weights.config`).

    other_geometry: arguments with which that program computes otherwise than our model does.
    """
    options = {ours: command_line[theirs] for theirs, ours in _ARGUMENTS.items() if command_line.get(theirs) is not None}
    others = [f"{name} = False, here True" for name in _ALWAYS_ON if command_line.get(name) is False]
    return {"config": {"model": options}, "other_geometry": others}


def canonical_multimae(
    names: Mapping[str, Tensor], scheme: str, where: str, command_line: Mapping[str, Any] | None = None
) -> Canonical:
    """The state dict of `names`, which are without wrappers, under our names.

    command_line: of the published training program, if the checkpoint has it.
    Raises CheckpointError with everything that is wrong at once.
    """
    leaves = _leaves(names) if scheme == PUBLISHED else {}
    of_decoders = {f"{_OUTPUT}{decoder}.{leaf}" for decoder, found in leaves.items() for leaf in found}
    known = [n for n in names if n in of_decoders or n == BALANCER or is_ours(n) or n.endswith(f".{_POSITIONS}")]
    problems = [f"{where}: {problem}" for name in known if (problem := value_problem(name, names[name]))]
    if problems:
        raise CheckpointError(problems)
    unknown = tuple(name for name in names if name not in known)
    if scheme == OURS:
        return Canonical({name: names[name] for name in known}, unknown, ())
    inputs, decoders = domains_of(names), decoder_order(leaves)
    problems = _position_problems(names, where)
    if BALANCER in names and names[BALANCER].numel() != len(decoders):
        got, expected = names[BALANCER].numel(), len(decoders)
        problems.append(f"{where}: {got} log variances for {expected} decoders ({', '.join(decoders) or 'none'})")
    try:
        state = from_published({name: names[name] for name in known}, inputs, decoders, where)
    except CheckpointError as error:
        problems += error.problems
    if problems:
        raise CheckpointError(problems)
    if BALANCER in names:
        order = balanced_order(leaves, command_line or {})
        state["log_vars"] = names[BALANCER].flatten()[[order.index(decoder) for decoder in decoders]]
    stacked = [name for name in state if name.startswith("decoders.") and not name.startswith("decoders.heads.")]
    reshaped = (f"{_OUTPUT}*.{_outer(n.removeprefix('decoders.'))} -> {n} {list(state[n].shape)}" for n in stacked)
    return Canonical(state, unknown, tuple(reshaped))


def _leaves(names: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Decoder -> rest of the published name -> weight; what other heads have (a classifier's, ...) is left out."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in names.items():
        parts = name.split(".", 2)
        if name.startswith(_OUTPUT) and len(parts) == 3:
            found.setdefault(parts[1], {})[parts[2]] = value
    return {
        decoder: {leaf: value for leaf, value in leaves.items() if _is_leaf(leaf)}
        for decoder, leaves in found.items()
        if "mask_token" in leaves or "proj_context.weight" in leaves
    }


def _is_leaf(leaf: str) -> bool:
    """Whether a published decoder may have a weight of this name."""
    if leaf == _POSITIONS or leaf.startswith(_TASKS):
        return True
    ours = f"heads.x.{leaf.removeprefix(_HEAD)}" if leaf.startswith(_HEAD) else _inner(leaf)
    return not leaf.startswith(("heads.", *_INNER.values())) and is_ours(f"decoders.{ours}")


def _position_problems(names: Mapping[str, Tensor], where: str) -> list[str]:
    """Positions that are not the fixed ones, which is all that our model has."""
    problems = []
    for name, value in names.items():
        if not name.endswith(f".{_POSITIONS}"):
            continue
        dim, side = value.shape[1] if value.ndim == 4 else 0, value.shape[-1]
        if dim < 4 or value.shape != (1, dim, side, side):
            problems.append(f"{where}: {name} has shape {list(value.shape)}, expected [1, D, G, G]")
            continue
        far = (value.double() - sincos_table(dim, side).double()).abs().max().item()
        if far > _FIXED_WITHIN.get(value.dtype, _FIXED):
            problems.append(f"{where}: {name} is {far:.2g} off the fixed sin-cos positions; learned ones have no place here")
            continue
        owner = name.removesuffix(f".{_POSITIONS}")
        patches, domain = names.get(f"{owner}.proj.weight"), DOMAINS.get(owner.split(".")[1])
        patch_size = 0 if domain is None or patches is None else patches.shape[-1] * domain.stride
        if patch_size and side != table_side(patch_size):
            made_for = f"{side * patch_size} px, expected {TABLE_SIZE_PX} px as in the published code"
            problems.append(f"{where}: {name} is made for images of {made_for}")
    return problems


def balanced_order(decoders: Sequence[str], command_line: Mapping[str, Any]) -> list[str]:
    """The decoders in the order of the published log variances.

    They follow the predictions: decoders in the order of the file, those that the program computes in float32 last.
    """
    last = str(command_line.get("fp32_output_adapters") or "").split("-")
    return [*(name for name in decoders if name not in last), *(name for name in last if name in decoders)]


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that the published model's `load_state_dict` asks for, of our state dict: its fixed positions too.

    Log variances are left out: there they are no part of the model.
    """
    inputs, decoders = domains_of(state), decoders_of(state)
    theirs = to_published({name: value for name, value in state.items() if name != "log_vars"}, inputs, decoders)
    adapters = [f"input_adapters.{domain}" for domain in inputs]
    side = table_side(describe_multimae(dict(state)).patch_size)
    widths = dict.fromkeys(adapters, state["global_tokens"].shape[-1])
    widths |= dict.fromkeys((f"{_OUTPUT}{name}" for name in decoders), state["decoders.mask_token"].shape[-1])
    return theirs | {f"{name}.{_POSITIONS}": sincos_table(dim, side) for name, dim in widths.items()}


def from_published(
    state: Mapping[str, Tensor], inputs: Sequence[str], decoders: Sequence[str], where: str = "the state dict"
) -> dict[str, Tensor]:
    """Our state dict of published weights; `inputs`, `decoders`: names of the model's input domains and decoders, in order.

    Raises CheckpointError with every weight that a decoder lacks, or has in another shape or precision than the first one.
    """
    ours = {name: value for name, value in state.items() if is_ours(name)}
    if not decoders:
        return ours
    leaves = _leaves(state)
    problems = []
    wanted = dict.fromkeys(leaf for decoder in decoders for leaf in leaves.get(decoder, {}) if leaf != _POSITIONS)
    wanted |= dict.fromkeys(f"{_TASKS}{name}" for name in inputs)
    problems += [
        f"{where}: {_OUTPUT}*.{leaf} is of no input domain; input_adapters has {', '.join(inputs)}"
        for leaf in wanted
        if leaf.startswith(_TASKS) and leaf.removeprefix(_TASKS) not in inputs
    ]
    stacks: dict[str, list[Tensor]] = {}
    for leaf in wanted:
        found = [leaves.get(decoder, {}).get(leaf) for decoder in decoders]
        stacks[leaf] = found
        like = next((value for value in found if value is not None), None)
        for decoder, value in zip(decoders, found, strict=True):
            name = f"{_OUTPUT}{decoder}.{leaf}"
            if value is None:
                problems.append(f"{where}: missing {name}" + ("" if like is None else f" {list(like.shape)}"))
            elif not leaf.startswith(_HEAD) and (value.shape, value.dtype) != (like.shape, like.dtype):
                problems.append(
                    f"{where}: {name} is {list(value.shape)} {value.dtype}, in other decoders {list(like.shape)} "
                    f"{like.dtype}; all decoders of a model have one shape"
                )
    if problems:
        raise CheckpointError(problems)
    for leaf, values in stacks.items():
        if leaf.startswith(_HEAD):
            part = leaf.removeprefix(_HEAD)
            ours |= {f"decoders.heads.{decoder}.{part}": v for decoder, v in zip(decoders, values, strict=True)}
        elif not leaf.startswith(_TASKS):
            stack = torch.stack(values)
            ours[f"decoders.{_inner(leaf)}"] = stack.flatten(0, 2) if leaf == "mask_token" else stack
    tables = [[stacks[f"{_TASKS}{name}"][row].flatten() for name in inputs] for row in range(len(decoders))]
    ours["decoders.task_embeddings"] = torch.stack([torch.stack(row) for row in tables])
    return ours


def to_published(values: Mapping[str, Tensor], inputs: Sequence[str], decoders: Sequence[str]) -> dict[str, Tensor]:
    """Anything by our parameter names, and of their shapes, under the published ones: the inverse of `from_published`."""
    theirs = {}
    for name, value in values.items():
        if not name.startswith("decoders."):
            theirs[name] = value
            continue
        name = name.removeprefix("decoders.")
        if name.startswith("heads."):
            decoder, leaf = name.split(".")[1:]
            theirs[f"output_adapters.{decoder}.out_proj.{leaf}"] = value
            continue
        for decoder, part in zip(decoders, value.unbind(), strict=True):
            prefix = f"output_adapters.{decoder}"
            if name == "mask_token":
                theirs[f"{prefix}.mask_token"] = part[None, None]
            elif name == "task_embeddings":
                rows = zip(inputs, part, strict=True)
                theirs |= {f"{prefix}.task_embeddings.{domain}": row[None, None] for domain, row in rows}
            else:
                theirs[f"{prefix}.{_outer(name)}"] = part
    return theirs


def _inner(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in _INNER.items() if name.startswith(old)), name)


def _outer(name: str) -> str:
    return next((old + name.removeprefix(new) for old, new in _INNER.items() if name.startswith(new)), name)
