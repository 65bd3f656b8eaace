"""config.json of an exported model: everything that a user of the weights must know and the tensors do not say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mpmae.errors import CheckpointError

FORMAT_NAME = "mpmae-export"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
Target = Literal["safetensors", "timm", "hub", "hf", "mmearth"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArchitectureEntry(_Strict):
    """The encoder; name: "convnextv2_atto", ..., None for dims and depths that have no usual name."""

    name: str | None
    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


class BandStatistics(_Strict):
    """Per input band, in raw units; the encoder expects (value - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Provenance(_Strict):
    """Where the weights come from.

    source: file or folder name. source_sha256: of the file, or over names and hashes of the folder's files. scheme: the
    naming that the source used. step, run_config, shards_fingerprint: of the pretraining run, where known. notes: what had
    to be assumed or added.
    """

    source: str
    source_sha256: str | None
    scheme: str
    step: int | None
    run_config: dict[str, Any] | None
    shards_fingerprint: str | None
    commit: str | None
    mpmae_version: str
    torch_version: str
    date: str
    notes: tuple[str, ...]


class ExportConfig(_Strict):
    """config.json, or the part `mpmae` of it where another program owns the rest (timm).

    target: the layout of the weights beside it. patch_size, img_size: pixels. bands_in: names in the order of the channels.
    statistics: by product level, such as sentinel2_l2a. modalities_out: name -> output channels of its head.
    num_classes: of the classifier, 0 without one. stem_padding, grn_eps: with which the dense model (`mpmae.models.dense`)
    computes what the weights were trained for. licence: SPDX name. None means unknown throughout.
    """

    format: Literal["mpmae-export"] = FORMAT_NAME
    format_version: Literal[1] = FORMAT_VERSION
    target: Target
    name: str
    architecture: ArchitectureEntry
    stem: Literal["mmearth", "convnext"]
    patch_size: int
    img_size: int | None
    in_chans: int
    bands_in: tuple[str, ...] | None
    statistics: dict[str, BandStatistics] | None
    modalities_out: dict[str, int]
    num_classes: int
    stem_padding: Literal["same", "reference"]
    grn_eps: float
    licence: str | None
    provenance: Provenance

    def dump(self) -> str:
        """The text of config.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def own_part(tree: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Our part of a config.json that was read; None if it is another program's."""
    if tree.get("format") == FORMAT_NAME:
        return tree
    part = tree.get("mpmae")
    return part if isinstance(part, Mapping) and part.get("format") == FORMAT_NAME else None


def parse_config(tree: Mapping[str, Any], where: str) -> ExportConfig | None:
    """The checked config of a config.json's content; None if it is another program's. Raises CheckpointError."""
    part = own_part(tree)
    if part is None:
        return None
    if part.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {part.get('format_version')!r}, this version reads {FORMAT_VERSION}; update mpmae"
        )
    try:
        return ExportConfig.model_validate(part)
    except ValidationError as error:
        problems = [f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}; export again" for e in error.errors()]
        raise CheckpointError(problems) from error


def load_config(folder: str | Path) -> ExportConfig | None:
    """The config of an exported folder, None if there is none of ours. Raises CheckpointError."""
    path = Path(folder) / CONFIG_NAME
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); export again or restore the file") from error
    return parse_config(tree, str(path)) if isinstance(tree, dict) else None
