"""The encoder of a MultiMAE for one input domain as timm's VisionTransformer, both ways.

| timm                                | ours                              |
|-------------------------------------|-----------------------------------|
| `patch_embed.proj.*`                | `input_adapters.<domain>.proj.*`  |
| `pos_embed` [1, 1+L, D]             | computed; 0 for the global token  |
| `cls_token`                         | `global_tokens`                   |
| `blocks.*`                          | `encoder.*`                       |

The class token comes first there and last here, which attention does not tell apart. There is no final norm.
Source: timm `models/vision_transformer.py`; EPFL-VILAB/MultiMAE, `tools/multimae2vit_converter.py`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mpmae.errors import CheckpointError
from mpmae.models.interop.values import Canonical, value_problem
from mpmae.models.multimae.adapters import PatchAdapter
from mpmae.models.multimae.positions import positions, sincos_table, table_side

_POSITIONS = "pos_embed"
_FIXED_WITHIN = 1e-2  # of positions in [-1, 1], whatever precision they were kept in


def to_vit(state: Mapping[str, Tensor], domain: str, num_patches_side: int) -> dict[str, Tensor]:
    """Our state dict under timm's names, for images of `num_patches_side` patches on a side of a continuous domain."""
    result = {"cls_token": state["global_tokens"]}
    patches = state[f"input_adapters.{domain}.proj.weight"]
    result[_POSITIONS] = _pos_embed(patches, num_patches_side)
    adapter = f"input_adapters.{domain}."
    result |= {f"patch_embed.{n.removeprefix(adapter)}": v for n, v in state.items() if n.startswith(adapter)}
    return result | {f"blocks.{n.removeprefix('encoder.')}": v for n, v in state.items() if n.startswith("encoder.")}


def canonical_vit(names: Mapping[str, Tensor], domain: str | None, where: str) -> Canonical:
    """Our state dict of a ViT under timm's names that reads `domain`; its head and final norm have no place in it.

    Raises CheckpointError: a domain that nothing names, positions that are not the fixed ones, unsuitable values.
    """
    if domain is None:
        raise CheckpointError(
            f"{where} is a ViT in timm's naming; only one that mpmae-export wrote can be read, with the config.json beside "
            "it, which says what domain it reads"
        )
    prefixes = {"patch_embed.proj.": f"input_adapters.{domain}.proj.", "blocks.": "encoder."}
    state, unknown, problems = {}, [], []
    for name, value in names.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if old is None and name not in ("cls_token", _POSITIONS):
            unknown.append(name)
            continue
        problem = value_problem(name, value)
        problems += [f"{where}: {problem}"] if problem else []
        if name != _POSITIONS:
            state["global_tokens" if old is None else prefixes[old] + name.removeprefix(old)] = value
    pos_embed, patches = names.get(_POSITIONS), names["patch_embed.proj.weight"]
    if pos_embed is not None and not problems:
        side = math.isqrt(pos_embed.shape[1] - 1)
        fixed = _pos_embed(patches, side)
        if pos_embed.shape != fixed.shape or (pos_embed.double() - fixed.double()).abs().max() > _FIXED_WITHIN:
            problems.append(f"{where}: {_POSITIONS} is not the fixed sin-cos positions; tuned ones have no place here")
    if problems:
        raise CheckpointError(problems)
    return Canonical(state, tuple(unknown), ())


def _pos_embed(patches: Tensor, side: int) -> Tensor:
    """[1, 1+L, D] in the precision of the patch embedding's weight [D, C, P, P], as the model computes them."""
    table = sincos_table(patches.shape[0], table_side(patches.shape[-1])).to(patches.dtype)
    where = positions(table, side, PatchAdapter.position_mode)
    return torch.cat([torch.zeros_like(where[:1]), where])[None]
