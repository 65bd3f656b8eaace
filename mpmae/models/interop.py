"""Weights of the published MMEarth-train code, in and out.

Its sparse layers keep other shapes than ours (R = kernel side; the row offset is the fastest axis of the kernel index):

| layer                         | published name, shape               | here                                        |
|-------------------------------|-------------------------------------|---------------------------------------------|
| sparse convolution            | `kernel` [R*R, C_in, C_out]         | `weight` [C_out, C_in, R, R]                |
| same with R = 1               | `kernel` [C_in, C_out]              | `weight` [C_out, C_in, 1, 1]                |
| sparse depthwise convolution  | `kernel` [R*R, C]                   | `weight` [C, 1, R, R]                       |
| bias of a sparse convolution  | [1, C]                              | [C]                                         |
| decoder GRN                   | `gamma`, `beta` [1, 1, 1, D]        | [1, D]                                      |
| 1x1 convolution (projection, pixel heads) | `weight` [C_out, C_in, 1, 1] | `weight` [C_out, C_in]                |
| mask token                    | [1, C, 1, 1]                        | [1, 1, C]                                   |

Its `decoder_dict.<modality>` are one module under many names: equal copies are read once.
Source: MMEarth-train, `models/fcmae.py`, `models/convnextv2_sparse.py`, `helpers.py` (`remap_checkpoint_keys`).
"""

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mpmae.errors import CheckpointError
from mpmae.models.encoder import ConvNextStem
from mpmae.models.mpmae import MPMAE


@dataclass(frozen=True)
class Twin:
    """A parameter of ours under its published name and shape."""

    name: str
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]
    kernel: bool  # a sparse kernel, whose axes move; everything else only changes its shape

    def to_reference(self, own: Tensor) -> Tensor:
        """`own` (or its gradient) in the published layout."""
        return (own.permute(3, 2, 1, 0) if self.kernel else own).reshape(self.shape)

    def from_reference(self, value: Tensor) -> Tensor:
        """`value`, in the published layout, in ours."""
        if not self.kernel:
            return value.reshape(self.own_shape)
        out_channels, in_channels, rows, columns = self.own_shape
        return value.reshape(columns, rows, in_channels, out_channels).permute(3, 2, 1, 0).contiguous()


def reference_parameters(model: MPMAE) -> dict[str, Twin]:
    """Our parameter name -> its published twin, for every parameter of `model`."""
    modules = dict(model.named_modules())
    decoder = f"decoder_dict.{next(iter(model.bands_out))}"
    original_stem = isinstance(model.encoder.stem, ConvNextStem)
    twins = {}
    for name, value in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        sparse = isinstance(modules[owner], nn.Conv2d) and name.startswith("encoder.")
        published, shape = _rename(name, decoder, original_stem), tuple(value.shape)
        if sparse and leaf == "weight":
            out_channels, in_channels, side, _ = shape
            published = published.removesuffix("weight") + "kernel"
            depthwise = modules[owner].groups > 1
            taps = () if side == 1 and not depthwise else (side * side,)
            own, shape = shape, (*taps, out_channels) if depthwise else (*taps, in_channels, out_channels)
            twins[name] = Twin(published, shape, own, kernel=True)
            continue
        own = shape
        if sparse:
            shape = (1, *shape)
        elif name == "decoder.mask_token":
            shape = (1, shape[-1], 1, 1)
        elif name.startswith("decoder.") and ".grn." in name:
            shape = (1, 1, *shape)
        elif (name.startswith("heads.pixel.") or name.startswith("decoder.proj.")) and leaf == "weight":
            shape = (*shape, 1, 1)
        twins[name] = Twin(published, shape, own, kernel=False)
    return twins


def _rename(name: str, decoder: str, original_stem: bool) -> str:
    sparse_block = r"^encoder\.stages\.(\d+)\.(\d+)\."
    rules = (
        (r"^log_vars$", "loss_fn.log_vars"),
        (r"^encoder\.stem\.conv\.", "encoder.stem_orig.0." if original_stem else "encoder.initial_conv.0."),
        (r"^encoder\.stem\.conv_norm\.", "encoder.initial_conv.1.ln."),
        (r"^encoder\.stem\.pool\.", "encoder.stem.0."),
        (r"^encoder\.stem\.norm\.", "encoder.stem_orig.1.ln." if original_stem else "encoder.stem.1.ln."),
        (r"^encoder\.downsamples\.(\d+)\.norm\.", r"encoder.downsample_layers.\1.0.ln."),
        (r"^encoder\.downsamples\.(\d+)\.conv\.", r"encoder.downsample_layers.\1.1."),
        (sparse_block + r"norm\.", r"encoder.stages.\1.\2.norm.ln."),
        (sparse_block + r"(pwconv[12])\.", r"encoder.stages.\1.\2.\3.linear."),
        (r"^decoder\.proj\.", "proj."),
        (r"^decoder\.mask_token$", "mask_token"),
        (r"^decoder\.blocks\.", decoder + "."),
        (r"^heads\.tile_norm\.", "layer_norm_tmp."),
        (r"^heads\.(?:pixel|tile)\.", "pred_dict."),
    )
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def load_reference(model: MPMAE, source: Mapping[str, Tensor] | str | Path) -> None:
    """Loads weights of the published code into `model`, in place and completely.

    source: a state dict, or a file: safetensors, or a pickle that holds one (bare or under "model"; read with
    weights_only=True, so no code of the file runs).
    Raises CheckpointError, listing every missing, unexpected or misshapen key; the model is then unchanged.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    state = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    problems = _merge_decoders(state, f"decoder_dict.{next(iter(model.bands_out))}", where)
    parameters, twins = dict(model.named_parameters()), reference_parameters(model)
    values = {}
    for name, twin in twins.items():
        value = state.pop(twin.name, None)
        if value is None:
            problems.append(f"{where}: missing {twin.name} {list(twin.shape)} (our {name})")
        elif value.numel() != math.prod(twin.shape) or _squeezed(value.shape) != _squeezed(twin.shape):
            problems.append(f"{where}: {twin.name} has shape {list(value.shape)}, expected {list(twin.shape)} (our {name})")
        else:
            values[name] = twin.from_reference(value)
    problems += [f"{where}: unexpected {key}; this model has no such parameter" for key in state]
    if problems:
        raise CheckpointError(problems)
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def reference_state_dict(model: MPMAE) -> dict[str, Tensor]:
    """The weights of `model` under the published names and shapes; the decoder once, under its first modality."""
    twins = reference_parameters(model)
    return {twins[name].name: twins[name].to_reference(value.detach()) for name, value in model.named_parameters()}


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _merge_decoders(state: dict[str, Tensor], prefix: str, where: str) -> list[str]:
    """Leaves one decoder in `state`, named `prefix`; problems where two copies of the shared module differ."""
    problems, merged = [], {}
    for key in [key for key in state if key.startswith("decoder_dict.")]:
        rest = key.split(".", 2)[2]
        value = state.pop(key)
        if rest in merged and not torch.equal(merged[rest][1], value):
            problems.append(f"{where}: {key} differs from {merged[rest][0]}; expected one decoder shared by all modalities")
        merged.setdefault(rest, (key, value))
    state.update({f"{prefix}.{rest}": value for rest, (_, value) in merged.items()})
    return problems


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The published checkpoints carry their command line as an argparse.Namespace, which holds plain data only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {error}; expected safetensors or a pickle of plain tensors"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(torch.is_tensor(value) for value in content.values()):
        raise CheckpointError(f"{path}: no state dict in it; expected one at the top level or under 'model'")
    return dict(content)
