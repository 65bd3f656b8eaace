"""State dicts of ConvNeXt V2 and MP-MAE, in any scheme of `names_in`, under our names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mpmae.errors import CheckpointError
from mpmae.models.interop.names_in import canonical_layout, canonical_name, in_our_order
from mpmae.models.interop.values import Canonical, value_problem


def canonical_convnext(names: Mapping[str, Tensor], scheme: str, where: str) -> Canonical:
    """The state dict of `names`, which are without wrappers, in our names and layouts.

    Raises CheckpointError: copies of the shared decoder that differ, shapes of no known layout, unsuitable values.
    """
    original_stem = any("stem_orig." in name for name in names)
    state, unknown, reshaped, origin, problems = {}, [], [], {}, []
    for name, value in names.items():
        new = canonical_name(name, scheme, original_stem)
        if new is None:
            unknown.append(name)
            continue
        problem = value_problem(name, value)
        if problem:
            problems.append(f"{where}: {problem}")
            continue
        try:
            moved = canonical_layout(new, value, name.endswith(".kernel"))
        except ValueError as error:
            problems.append(f"{where}: {name} has shape {list(value.shape)}: {error}")
            continue
        if new in state:
            if state[new].dtype != moved.dtype or not torch.equal(state[new], moved):
                why = "one decoder shared by all modalities" if new.startswith("decoder.") else f"one {new}"
                problems.append(f"{where}: {name} differs from {origin[new]}; expected {why}")
            continue
        if moved.shape != value.shape:
            reshaped.append(f"{name} {list(value.shape)} -> {new} {list(moved.shape)}")
        state[new], origin[new] = moved, name
    if scheme.startswith("mmearth") and "log_vars" in state and list(names) != sorted(names):
        state["log_vars"], problem = in_our_order(state["log_vars"], state)
        problems += [f"{where}: {problem}"] if problem else []
    if problems:
        raise CheckpointError(problems)
    return Canonical(state, tuple(unknown), tuple(reshaped))
