"""config.json beside fine-tuned weights: an export of ours, for `create_encoder`, `create_unet` and `mpmae-export`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mpmae.eval.dataset import Task
from mpmae.eval.encoders import ImageEncoder
from mpmae.export.config import CONFIG_NAME
from mpmae.export.facts import Facts
from mpmae.files import write_whole
from mpmae.models.interop import Weights, describe, read_weights

_SOURCE = "random weights"


def write_tuned_config(
    folder: Path, model: nn.Module, encoder: ImageEncoder, source: Weights | None, task: Task, preparation: Mapping[str, Any]
) -> None:
    """Write config.json for the weights in `folder`: what `model` is, which bands it reads, where it comes from.

    encoder: what the model was made of. source: the weights that training began with; None: random ones. preparation: facts
    of `mpmae.eval.prepare.Preparation`; statistics are kept where they are what the images were normalised by.
    """
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
    config = config.model_copy(
        update={
            "bands_in": encoder.input.bands,
            "stem_padding": encoder.backbone.stem_padding,
            "grn_eps": encoder.backbone.grn_eps,
            "statistics": statistics,
            "provenance": config.provenance.model_copy(update={"notes": tuple(notes)}),
        }
    )
    write_whole(folder / CONFIG_NAME, config.dump())
