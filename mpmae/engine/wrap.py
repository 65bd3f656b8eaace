"""What is done to a model's blocks from outside, the same for every engine: which they are, checkpointing, compilation.

Neither changes a parameter's name: only the `forward` of a block is replaced, inside whatever hooks an engine hangs on it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpmae.config import EngineSection


def blocks_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the blocks, the unit of sharding, checkpointing and compilation: what an nn.ModuleList holds.

    Of lists in lists the innermost counts, of blocks in blocks the outermost; what has no parameters is none. A model
    therefore keeps its layers in nn.ModuleList and calls each of them, rather than reading its parameters.
    """
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            if next(child.parameters(), None) is not None:
                yield name, child
        else:
            yield from ((f"{name}.{inner}", block) for inner, block in blocks_of(child))


def wrap_blocks(module: nn.Module, config: EngineSection) -> None:
    """Compile and checkpoint the blocks of `module` as `config` asks, in place. Before an engine sees the module."""
    for _, block in blocks_of(module):
        forward = block.forward
        if config.compile:
            # each block a cache of its own: those of one class share their code, and its limit of variants is low
            forward = torch.compile(forward, isolate_recompiles=True)
        if config.activation_checkpointing:
            forward = _checkpointed(forward)
        if forward is not block.forward:
            block.forward = forward


def unwrap_blocks(module: nn.Module) -> None:
    """Undo `wrap_blocks`."""
    for _, block in blocks_of(module):
        block.__dict__.pop("forward", None)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps its inputs only and runs again in the backward, under the same autocast and random state."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
