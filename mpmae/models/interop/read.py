"""Weights from any checkpoint that this project knows, under our names.

| source                                           | how it is told                                             |
|--------------------------------------------------|------------------------------------------------------------|
| our checkpoint (`step-N`), a run folder          | checkpoint.json, `checkpoints/`: the newest one            |
| an exported folder                               | config.json, model.safetensors or checkpoint.pth           |
| DeepSpeed, any ZeRO stage and number of ranks    | `*mp_rank_00_model_states.pt`                              |
| torch.distributed.checkpoint                     | `.metadata`                                                |
| file: safetensors                                | its suffix                                                 |
| file: pickle (.pth, .pt, .bin, ...)              | the rest; state dict bare, or below one of `_WRAPPED`      |

Whose names a state dict has is told by the names themselves (`names_in.scheme_of`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpmae.checkpoint_format import (
    ENGINE_FOLDER,
    META_NAME,
    MMEARTH_NAME,
    MODEL_NAME,
    all_checkpoints,
    load_meta,
    newest_checkpoint,
)
from mpmae.errors import CheckpointError
from mpmae.modalities import spec_of
from mpmae.models.dense import FIRST_TILE_SIDE, REFERENCE_GRN_EPS, SPARSE_GRN_EPS, STEM_PADDINGS
from mpmae.models.interop import folders
from mpmae.models.interop.names_in import canonical_layout, canonical_name, in_our_order, scheme_of, strip_wrappers
from mpmae.models.interop.pickles import load_pickle

CONFIG_NAME = "config.json"
_WRAPPED = ("model", "state_dict", "module")
# Input of the published MMEarth checkpoints by number of bands (MMEarth-train, MODALITIES.py); its rgb is blue, green, red.
# The one of patch size 32 among them was trained on photographs.
_DEFAULT_BANDS = spec_of("sentinel2").model_bands
_MMEARTH_BANDS = {12: _DEFAULT_BANDS, 3: ("B2", "B3", "B4")}
_IMAGENET_PATCH_SIZE = 32
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Weights:
    """A state dict under our names and where it comes from.

    state: see `names_in`. scheme: whose names it had, one of `names_in.SCHEMES`. source: file or folder, for messages.
    config: what stood beside the weights (checkpoint.json or an exported config.json), or None. unknown: names in the source
    that mean nothing in its scheme, which are not in `state`. reshaped: "name [shape] -> name [shape]", where that changed.
    """

    state: dict[str, Tensor]
    scheme: str
    source: str
    config: dict[str, Any] | None = None
    unknown: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = field(default=(), repr=False)

    def recorded(self, key: str) -> Any:
        """What `config` says of `key`: at its top, or in our part of a config.json that another program owns; else None."""
        return self._own_config().get(key)

    def _own_config(self) -> dict[str, Any]:
        config = self.config or {}
        ours = config.get("mpmae")
        return config | ours if isinstance(ours, dict) else config

    @property
    def bands_in(self) -> tuple[str, ...] | None:
        """Sentinel-2 bands that the stem reads, in the order of its channels; None where nothing says.

        Those recorded beside the weights, else `bands_by_convention`.
        """
        if "bands_in" in self._own_config():
            bands = self.recorded("bands_in")
        else:  # a checkpoint of an earlier version holds the configuration alone
            run = (self.recorded("config") or {}).get("model") or {}
            bands = run.get("bands_in") or self.bands_by_convention
        return None if bands is None else tuple(bands)

    @property
    def bands_by_convention(self) -> tuple[str, ...] | None:
        """The bands of a stem like this in MMEarth's published checkpoints, or in a run of ours that names none."""
        conv = self.state.get("encoder.stem.conv.weight")
        if conv is None or conv.ndim != 4:
            return None
        pool = self.state.get("encoder.stem.pool.weight", conv)
        if self.recorded("config"):
            table = {len(_DEFAULT_BANDS): _DEFAULT_BANDS}
        elif self.scheme.startswith("mmearth") and pool.shape[-1] * FIRST_TILE_SIDE != _IMAGENET_PATCH_SIZE:
            table = _MMEARTH_BANDS
        else:
            table = {}
        return table.get(conv.shape[1])

    @property
    def stem_padding(self) -> str:
        """With which the dense model computes what these weights were trained for: see `mpmae.models.dense.Backbone`."""
        unet = any(name.startswith("upsamples.") for name in self.state)  # the published one pads as ours does
        recorded = self.recorded("stem_padding")
        if recorded not in (None, *STEM_PADDINGS):
            raise CheckpointError(
                f"{self.source}: its config has stem_padding {recorded!r}, expected one of {', '.join(STEM_PADDINGS)}"
            )
        return recorded or ("reference" if self._as_published and not unet else "same")

    @property
    def grn_eps(self) -> float:
        """As `stem_padding`, for the epsilon of GRN."""
        recorded = self.recorded("grn_eps")
        if recorded is not None and not (isinstance(recorded, int | float) and recorded > 0):
            raise CheckpointError(f"{self.source}: its config has grn_eps {recorded!r}, expected a small positive number")
        return recorded or (REFERENCE_GRN_EPS if self._as_published else SPARSE_GRN_EPS)

    @property
    def _as_published(self) -> bool:
        """Whether these were trained as the published dense model, by its own code or by a run of ours with its quirks."""
        run = (self.recorded("config") or {}).get("model") or {}
        return self.scheme == "mmearth-dense" or (run.get("encoder") == "dense" and run.get("reference_quirks") is True)


def read_weights(source: Mapping[str, Tensor] | str | Path) -> Weights:
    """The weights of a checkpoint: a state dict, a file or a folder (see the module's table). No code of a file is run.

    Raises CheckpointError: unreadable, torn or refused file, no state dict in it, names of no known scheme, copies of the
    shared decoder that differ, weights that are no numbers.
    """
    if isinstance(source, Mapping):
        return _canonical(dict(_unwrapped(source)), "the state dict", None)
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}")
    raw, config, path = _read_folder(path) if path.is_dir() else (_read_file(path), _config_beside(path), path)
    return _canonical(raw, str(path), config)


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, Path]:
    """State dict, config and the folder that they were found in."""
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise CheckpointError(f"run folder {folder} has no complete checkpoint in {folder / 'checkpoints'}")
        folder = newest
    elif all_checkpoints(folder):
        folder = newest_checkpoint(folder) or folder
    if (folder / META_NAME).is_file():
        return _read_file(folder / MODEL_NAME), load_meta(folder), folder
    for name in (MODEL_NAME, MMEARTH_NAME):
        if (folder / name).is_file():
            return _read_file(folder / name), _config_beside(folder / name), folder
    tag = folder / "latest"
    candidates = [folder, folder / ENGINE_FOLDER / "deepspeed"]
    if tag.is_file():  # DeepSpeed's own pointer to the newest of several
        candidates.append(folder / tag.read_text(errors="replace").strip())
    for candidate in candidates:
        if folders.is_deepspeed(candidate):
            return folders.read_deepspeed(candidate), None, candidate
        if folders.is_dcp(candidate):
            return folders.read_dcp(candidate), None, candidate
    raise CheckpointError(
        f"folder {folder} is no checkpoint: expected {META_NAME} or {MODEL_NAME} (ours), checkpoints/ (a run), "
        "*mp_rank_00_model_states.pt (DeepSpeed) or .metadata (torch.distributed.checkpoint)"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    content = _unwrapped(load_pickle(path))
    if not isinstance(content, Mapping) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise CheckpointError(
            f"{path}: no state dict in it; expected one at the top level or under {', '.join(map(repr, _WRAPPED))}"
        )
    return dict(content)


def _unwrapped(content: Any) -> Any:
    """The state dict in what a training program saved beside its optimizer, command line, ...; else `content`."""
    inside = (content[key] for key in _WRAPPED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping))
    return next(inside, content)


def _config_beside(path: Path) -> dict[str, Any] | None:
    config = path.with_name(CONFIG_NAME)
    if not (path.suffix == ".safetensors" or path.name == MMEARTH_NAME) or not config.is_file():
        return None
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    return content if isinstance(content, dict) else None


def _raw_problems(raw: dict[Any, Any], where: str) -> list[str]:
    """What is no name, no tensor, or twice there once `strip_wrappers` has gone over the names."""
    problems = [f"{where}: key {name!r} is no name of a weight" for name in raw if not isinstance(name, str)]
    problems += [f"{where}: {name} is a {type(v).__name__}, no tensor" for name, v in raw.items() if not torch.is_tensor(v)]
    first: dict[str, str] = {}
    for name in raw:
        if isinstance(name, str) and first.setdefault(strip_wrappers(name), name) != name:
            problems.append(f"{where}: {name} and {first[strip_wrappers(name)]} are the same weight; take one of them out")
    return problems


def _canonical(raw: dict[str, Tensor], where: str, config: dict[str, Any] | None) -> Weights:
    problems = _raw_problems(raw, where)
    if problems:
        raise CheckpointError(problems)
    names = {strip_wrappers(name): value for name, value in raw.items()}
    scheme = scheme_of(names)
    if scheme is None:
        shown = ", ".join(list(names)[:5]) or "none"
        raise CheckpointError(
            f"{where}: {len(names)} names of no known layout ({shown}, ...); expected a ConvNeXt V2 or MP-MAE of "
            "MMEarth-train, facebookresearch/ConvNeXt-V2, timm or this project"
        )
    original_stem = any("stem_orig." in name for name in names)
    state, unknown, reshaped, origin = {}, [], [], {}
    for name, value in names.items():
        new = canonical_name(name, scheme, original_stem)
        if new is None:
            unknown.append(name)
            continue
        if value.dtype not in _FLOATS:
            problems.append(f"{where}: {name} is {value.dtype}, expected floating-point weights; was it quantised?")
            continue
        if value.is_meta or value.layout != torch.strided:
            kind = "on the meta device" if value.is_meta else f"stored as {value.layout}"
            problems.append(f"{where}: {name} is {kind}; expected a dense tensor with values")
            continue
        if value.ndim == 0:
            problems.append(f"{where}: {name} is a single number; no weight has shape []")
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
        if not bool(moved.isfinite().all()):
            problems.append(f"{where}: {name} holds NaN or inf; the run that wrote it had diverged")
        if moved.shape != value.shape:
            reshaped.append(f"{name} {list(value.shape)} -> {new} {list(moved.shape)}")
        state[new], origin[new] = moved, name
    if scheme.startswith("mmearth") and "log_vars" in state and list(names) != sorted(names):
        state["log_vars"], problem = in_our_order(state["log_vars"], state)
        problems += [f"{where}: {problem}"] if problem else []
    if problems:
        raise CheckpointError(problems)
    return Weights(state, scheme, where, config, tuple(unknown), tuple(reshaped))
