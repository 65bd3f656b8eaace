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
Target = Literal["safetensors", "timm", "hub", "hf", "mmearth", "multimae"]


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


class _Shared(_Strict):
    """What config.json says of a model of either family."""

    format: Literal["mpmae-export"] = FORMAT_NAME
    format_version: Literal[1] = FORMAT_VERSION
    target: Target
    name: str
    patch_size: int
    img_size: int | None
    licence: str | None
    provenance: Provenance

    def dump(self) -> str:
        """The text of config.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


class ExportConfig(_Shared):
    """config.json of a ConvNeXt V2 or MP-MAE, or the part `mpmae` of it where another program owns the rest (timm).

    target: the layout of the weights beside it. patch_size, img_size: pixels. bands_in: names in the order of the channels.
    statistics: by product level, such as sentinel2_l2a. modalities_out: name -> output channels of its head.
    num_classes: of the classifier, 0 without one. stem_padding, grn_eps: with which the dense model (`mpmae.models.dense`)
    computes what the weights were trained for. licence: SPDX name. None means unknown throughout.
    """

    architecture: ArchitectureEntry
    stem: Literal["mmearth", "convnext"]
    in_chans: int
    bands_in: tuple[str, ...] | None
    statistics: dict[str, BandStatistics] | None
    modalities_out: dict[str, int]
    num_classes: int
    stem_padding: Literal["same", "reference"]
    grn_eps: float


class ViTEntry(_Strict):
    """The encoder; name: "multimae_tiny", ..., None for a width and depth that have no usual name."""

    name: str | None
    dim: int
    depth: int


class DomainEntry(_Strict):
    """An input domain: bands of a modality in the order of the channels, or its classes with the one for no data.

    stride: pixels of the image on a side of one pixel of the domain. standardise: per sample, see `mpmae.domains.Domain`.
    """

    modality: str
    bands: tuple[str, ...]
    num_classes: int
    stride: int
    standardise: bool


class NamedStatistics(BandStatistics):
    """Of the bands that domains read, in raw units; the model expects (value - mean) / std."""

    bands: tuple[str, ...]


class MultiMAEExportConfig(_Shared):
    """config.json of a MultiMAE, whole or its encoder for one domain, as `ExportConfig` of the other family.

    num_heads, decoder_num_heads: None where nothing says. domains_in: in the order of the tokens. decoders: name -> output
    channels, empty without them. statistics: by modality, or product level of Sentinel-2. num_visible_tokens, alphas,
    sample_domains_uniformly, reference_quirks: see `mpmae.create_model`.
    """

    family: Literal["multimae"] = "multimae"
    architecture: ViTEntry
    num_heads: int | None
    domains_in: dict[str, DomainEntry]
    decoders: dict[str, int]
    decoder_dim: int
    decoder_depth: int
    decoder_num_heads: int | None
    statistics: dict[str, NamedStatistics] | None
    num_visible_tokens: int | None
    alphas: float | dict[str, float] | None
    sample_domains_uniformly: bool | None
    reference_quirks: bool | None


AnyConfig = ExportConfig | MultiMAEExportConfig


def own_part(tree: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Our part of a config.json that was read; None if it is another program's."""
    if tree.get("format") == FORMAT_NAME:
        return tree
    part = tree.get("mpmae")
    return part if isinstance(part, Mapping) and part.get("format") == FORMAT_NAME else None


def parse_config(tree: Mapping[str, Any], where: str) -> AnyConfig | None:
    """The checked config of a config.json's content; None if it is another program's. Raises CheckpointError."""
    part = own_part(tree)
    if part is None:
        return None
    if part.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {part.get('format_version')!r}, this version reads {FORMAT_VERSION}; update mpmae"
        )
    try:
        return (MultiMAEExportConfig if part.get("family") == "multimae" else ExportConfig).model_validate(part)
    except ValidationError as error:
        problems = [f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}; export again" for e in error.errors()]
        raise CheckpointError(problems) from error


def load_config(folder: str | Path) -> AnyConfig | None:
    """The config of an exported folder, None if there is none of ours. Raises CheckpointError."""
    path = Path(folder) / CONFIG_NAME
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); export again or restore the file") from error
    return parse_config(tree, str(path)) if isinstance(tree, dict) else None
