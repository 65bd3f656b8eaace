"""config.json beside fine-tuned weights: of a ConvNeXt V2 an export of ours, for `create_encoder`, `create_unet` and
`mpmae-export`; of a MultiMAE what `encoder.checkpoint` needs to evaluate it again."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import mpmae
from mpmae.eval.dataset import Task
from mpmae.eval.encoder_input import SENTINEL2
from mpmae.eval.encoders import ImageEncoder
from mpmae.eval.multimae_encoder import MultiMAEEncoder
from mpmae.eval.scaling import PRETRAINING
from mpmae.export.config import CONFIG_NAME
from mpmae.export.facts import Facts
from mpmae.files import write_whole
from mpmae.models.interop import Weights, describe, read_weights
from mpmae.provenance import commit

_SOURCE = "random weights"


def write_tuned_config(
    folder: Path, model: nn.Module, encoder: ImageEncoder, source: Weights | None, task: Task, preparation: Mapping[str, Any]
) -> None:
    """Write config.json for the weights in `folder`: what `model` is, what it reads, where it comes from.

    encoder: what the model was made of. source: the weights that training began with; None: random ones. preparation: facts
    of `mpmae.eval.prepare.Preparation`; statistics are kept where they are what the images were normalised by.
    """
    if isinstance(encoder, MultiMAEEncoder):
        write_whole(folder / CONFIG_NAME, json.dumps(_multimae(encoder, source, task, preparation), indent=1) + "\n")
        return
    state = read_weights(model.state_dict()).state
    if source is None:
        weights = Weights(state, "mpmae", _SOURCE, {"bands_in": list(encoder.input.bands)})
    else:
        weights = replace(source, state=state, unknown=(), reshaped=())
    config = Facts(weights, describe(state), None, None, None).config("safetensors")
    statistics = config.statistics if preparation["statistics"] == "pretraining" else None
    notes = [*config.provenance.notes, f"fine-tuned on {task.name}"]
    if statistics is None:
        notes.append(f"images were normalised by statistics of {task.name}: {preparation['statistics_reason']}")
    backbone = getattr(model, "encoder", model)  # of a U-Net, or the model itself
    config = config.model_copy(
        update={
            "bands_in": encoder.input.bands,
            "stem_padding": backbone.stem_padding,
            "grn_eps": backbone.grn_eps,
            "statistics": statistics,
            "provenance": config.provenance.model_copy(update={"notes": tuple(notes)}),
        }
    )
    write_whole(folder / CONFIG_NAME, config.dump())


def _multimae(
    encoder: MultiMAEEncoder, source: Weights | None, task: Task, preparation: Mapping[str, Any]
) -> dict[str, Any]:
    """What `mpmae.models.interop` looks for beside a MultiMAE's weights, and what they were tuned for.

    Statistics are those of pretraining, of the modalities whose images were normalised by them.
    """
    backbone, given = encoder.backbone, encoder.input
    by_modality = preparation.get("statistics_of") or {}
    whole = preparation["statistics"] == PRETRAINING
    kept = {name for name in given.modalities if by_modality.get(name, {"statistics": ""})["statistics"] == PRETRAINING}
    kept |= set(given.modalities) if whole and not by_modality else set()
    tables = {f"{SENTINEL2}_{level}": (SENTINEL2, entry) for level, entry in given.statistics.items()}
    tables |= {name: (name, entry) for name, entry in given.other_statistics.items()}
    statistics = {
        key: {"bands": [given.bands[i] for i in given.positions_of(name)], **{k: list(v) for k, v in entry.items()}}
        for key, (name, entry) in tables.items()
        if name in kept
    }
    return {
        "format": "mpmae-tuned",
        "format_version": 1,
        "domains_in": [domain.name for domain in backbone.domains],
        "num_heads": backbone.encoder[0].attn.num_heads,
        "patch_size": backbone.patch_size,
        "img_size": preparation["side_px"],
        "pooling": backbone.pooling,
        "reference_quirks": backbone.reference_quirks,
        "statistics": statistics,
        "classes": list(task.class_names),
        "notes": [
            f"fine-tuned on {task.name}, from {_SOURCE if source is None else source.source}",
            *(
                f"{name}: normalised by statistics of the {e['statistics']}: {e['reason']}"
                for name, e in by_modality.items()
            ),
        ],
        "mpmae_version": mpmae.__version__,
        **commit(),
    }
