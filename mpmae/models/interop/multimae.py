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

Source: multimae-meets-eo and EPFL-VILAB/MultiMAE, `multimae.py`, `input_adapters.py`, `output_adapters.py`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_INNER = {"decoder.": "cross.", "decoder_transformer.": "blocks."}


def from_published(state: Mapping[str, Tensor], inputs: Sequence[str], decoders: Sequence[str]) -> dict[str, Tensor]:
    """Our state dict of published weights; `inputs`, `decoders`: names of the model's input domains and decoders, in order.

    Raises KeyError for a decoder or an input that lacks a weight.
    """
    ours = {}
    for name, value in state.items():
        if not name.startswith("output_adapters.") and not name.endswith(".pos_emb"):
            ours[name] = value
    prefix = f"output_adapters.{decoders[0]}."
    for name in [name.removeprefix(prefix) for name in state if name.startswith(prefix)]:
        if name == "pos_emb" or name.startswith("task_embeddings."):
            continue
        values = [state[f"output_adapters.{decoder}.{name}"] for decoder in decoders]
        if name.startswith("out_proj."):
            leaf = name.removeprefix("out_proj.")
            ours |= {f"decoders.heads.{decoder}.{leaf}": v for decoder, v in zip(decoders, values, strict=True)}
        else:
            stack = torch.stack(values)
            ours[f"decoders.{_inner(name)}"] = stack.flatten(0, 2) if name == "mask_token" else stack
    tables = [[state[f"output_adapters.{d}.task_embeddings.{k}"].flatten() for k in inputs] for d in decoders]
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
