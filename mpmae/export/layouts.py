"""The files of each export of a ConvNeXt V2 or MP-MAE, written into an empty folder.

| target      | files                                                              | loads with                    |
|-------------|--------------------------------------------------------------------|-------------------------------|
| safetensors | model.safetensors (our names, the whole model), config.json        | mpmae                         |
| timm        | model.safetensors (timm's names), config.json (ours below `mpmae`) | timm, as "local-dir:DIR"      |
| hub         | hubconf.py, mpmae_convnextv2.py, model.safetensors, config.json    | torch.hub, with source="local" |
| hf          | those of timm where timm has the model, else those of hub; README.md | timm or torch.hub           |
| mmearth     | checkpoint.pth (`{"model": ...}`, MMEarth-train's names), config.json | MMEarth-train              |
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpmae.checkpoint_format import MMEARTH_NAME
from mpmae.errors import CheckpointError
from mpmae.export.card import model_card
from mpmae.export.config import CONFIG_NAME, WEIGHTS_NAME, AnyConfig, ExportConfig
from mpmae.export.facts import DENSE, PRETRAINING
from mpmae.models import dense
from mpmae.models.interop import to_mmearth, to_timm

State = dict[str, Tensor]
Writer = Callable[[State, Any, Path], None]  # of the state, its family's config, and an empty folder
DENSE_MODULE = "mpmae_convnextv2.py"
# timm's `patch_size` is the stem's stride. At 2 it adds a downsampling before the first stage, from 8 on it dilates the last
TIMM_PATCH_SIZES = (8, 32)
TIMM_GRN_EPS = 1e-6
_GRID = 7  # patches on a side where nothing says the size of the images


def write_safetensors(state: State, config: AnyConfig, folder: Path) -> None:
    """The whole model under our names."""
    save(state, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(config.dump())


def write_timm(state: State, config: ExportConfig, folder: Path) -> None:
    """Encoder and classifier as timm's convnextv2_*. Raises CheckpointError where timm has no such model."""
    problems = timm_problems(config)
    if problems:
        raise CheckpointError([f"{problem}; use --to hub, which keeps the model as it is" for problem in problems])
    save(to_timm(_with_norm(_dense_part(state))), folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(_timm_config(config), indent=1) + "\n")


def timm_problems(config: ExportConfig) -> list[str]:
    """What keeps timm from having this model; empty if it does."""
    problems = []
    if config.stem != "convnext":
        problems.append(f"stem {config.stem}: timm's ConvNeXt V2 has the stem convnext alone")
    if config.architecture.name is None:
        dims, depths = (", ".join(map(str, numbers)) for numbers in (config.architecture.dims, config.architecture.depths))
        problems.append(f"channels {dims} and blocks {depths}: timm has no ConvNeXt V2 of this size")
    if config.patch_size not in TIMM_PATCH_SIZES:
        problems.append(f"patch size {config.patch_size}: timm's ConvNeXt V2 computes the same at 8 and 32 only")
    if config.grn_eps != TIMM_GRN_EPS:
        problems.append(f"GRN eps {config.grn_eps}: timm's is {TIMM_GRN_EPS}")
    return problems


def write_hub(state: State, config: ExportConfig, folder: Path) -> None:
    """Encoder and classifier with the code that runs them, free of mpmae."""
    save({name.removeprefix("encoder."): value for name, value in _dense_part(state).items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(config.dump())
    (folder / DENSE_MODULE).write_bytes(Path(dense.__file__).read_bytes())
    (folder / "hubconf.py").write_bytes(Path(__file__).with_name("hubconf.py").read_bytes())


def write_hf(state: State, config: ExportConfig, folder: Path) -> None:
    """A folder for the Hugging Face Hub with its model card."""
    with_timm = not timm_problems(config)
    (write_timm if with_timm else write_hub)(state, config, folder)
    (folder / "README.md").write_text(model_card(config, with_timm=with_timm))


def write_mmearth(state: State, config: ExportConfig, folder: Path) -> None:
    """A checkpoint of the published pretraining code. Raises CheckpointError for weights without decoder and heads."""
    if not config.modalities_out or "decoder.mask_token" not in state:
        raise CheckpointError(
            "--to mmearth needs the whole pretraining model, decoder and heads too; these weights lack them"
        )
    sparse = config.stem_padding == "same"  # else it is of the dense code, which has another geometry
    torch.save({"model": to_mmearth(_part(state, PRETRAINING), sparse=sparse)}, folder / MMEARTH_NAME)
    (folder / CONFIG_NAME).write_text(config.dump())


WRITERS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "timm": write_timm,
    "hub": write_hub,
    "hf": write_hf,
    "mmearth": write_mmearth,
}


def _part(state: State, kept: tuple[str, ...]) -> State:
    return {name: value for name, value in state.items() if name.startswith(kept)}


def _dense_part(state: State) -> State:
    if any(name.startswith("upsamples.") for name in state):
        raise CheckpointError("these weights are of a U-Net; use --to safetensors, which keeps it whole")
    return _part(state, DENSE)


def _with_norm(state: State) -> State:
    """With the final norm that timm insists on, as it is before any training, if there is none."""
    like = state["encoder.stages.3.0.norm.weight"]
    return {"norm.weight": torch.ones_like(like), "norm.bias": torch.zeros_like(like), **state}


def image_side(config: AnyConfig) -> int:
    """Side of the images in pixels; seven patches, as published, where nothing says it."""
    return config.img_size or _GRID * config.patch_size


def pretrained_config(config: AnyConfig, num_bands: int, num_classes: int, **more: Any) -> dict[str, Any]:
    """`pretrained_cfg` of timm's config.json; more: what the architecture adds."""
    side = image_side(config)
    pretrained = {
        "tag": config.name,
        "input_size": [num_bands, side, side],
        "crop_pct": 1.0,
        "num_classes": num_classes,
        "license": config.licence,
        **more,
    }
    if config.statistics:  # timm has room for one level: surface reflectance where there is a choice
        statistics = config.statistics[max(config.statistics)]
        pretrained |= {"mean": statistics.mean, "std": statistics.std}
    return pretrained


def _timm_config(config: ExportConfig) -> dict[str, Any]:
    layers = {"fixed_input_size": False, "first_conv": "stem.0", "classifier": "head.fc"}
    return {
        "architecture": config.architecture.name,
        "num_classes": config.num_classes,
        "num_features": config.architecture.dims[-1],
        "pretrained_cfg": pretrained_config(config, config.in_chans, config.num_classes, **layers),
        "model_args": {"in_chans": config.in_chans, "patch_size": config.patch_size // dense.FIRST_TILE_SIDE},
        "mpmae": config.model_dump(mode="json"),
    }


def save(state: State, path: Path) -> None:
    """A safetensors file."""
    save_file({name: value.contiguous() for name, value in state.items()}, path, {"format": "pt"})
