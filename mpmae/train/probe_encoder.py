"""The encoder of a model that is being trained, as evaluations of its checkpoints have it."""

import copy
from dataclasses import dataclass

import torch

from mpmae.config import RunConfig
from mpmae.engine import Engine
from mpmae.eval.config import EncoderSection
from mpmae.eval.dataset import Task
from mpmae.eval.encoder_input import EncoderInput, statistics_by_level
from mpmae.eval.image_encoder import ImageEncoder
from mpmae.eval.multimae_encoder import encoder_of
from mpmae.models import MPMAE, MultiMAE, create_encoder
from mpmae.shard_format import Manifest

_LABEL = "the run"
_NOT_TRAINED = {"backbone.norm.weight", "backbone.norm.bias"}  # behind the pooling, where no feature comes from


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder whose weights are those of a model in training whenever `with_weights` is asked for it.

    blueprint: without memory for weights. names: of its weights, and what the model calls them. reads: what is read of a
    set, for people; "" where the set has no say in it.
    """

    blueprint: ImageEncoder
    names: dict[str, str]
    reads: str

    def with_weights(self, engine: Engine) -> ImageEncoder:
        """The encoder with the weights of the moment, float32, whole on every rank's device. Collective."""
        whole = engine.full_state_dict(set(self.names.values()))
        encoder, state = copy.deepcopy(self.blueprint), {}
        for name, like in encoder.state_dict().items():
            state[name] = torch.zeros_like(like, device=engine.device)
            if whole is not None and name in self.names:
                state[name].copy_(whole[self.names[name]])
            engine.world.broadcast_into(state[name])
        encoder.load_state_dict(state, assign=True)
        return encoder.to(engine.device)


def trained_encoder(config: RunConfig, manifest: Manifest, model: MPMAE | MultiMAE, task: Task) -> TrainedEncoder:
    """The dense encoder of an MP-MAE; of a MultiMAE the one for all input domains whose bands the set of `task` stores.

    The model has to be whole, before an engine takes it apart. No random number is drawn. Raises DatasetError when the set
    has bands for no input domain.
    """
    statistics = model.input_record(manifest)["statistics"]
    with torch.random.fork_rng([]):
        if isinstance(model, MultiMAE):
            encoder, prefix = encoder_of(model, EncoderSection(), _LABEL, task, statistics), ""
        else:
            encoder, prefix = _dense(config, model, statistics), "encoder."
    theirs, names = model.state_dict(), {}
    for name in encoder.state_dict():
        names[name] = prefix + name.removeprefix("backbone.")
    assert {name for name in names if names[name] not in theirs} == _NOT_TRAINED, names
    encoder.load_state_dict({name: value.to("meta") for name, value in encoder.state_dict().items()}, assign=True)
    names = {name: own for name, own in names.items() if own in theirs}
    return TrainedEncoder(encoder.eval(), names, _reads(model, encoder))


def _dense(config: RunConfig, model: MPMAE, statistics: dict) -> ImageEncoder:
    with torch.device("meta"):
        backbone = create_encoder(
            config.model.name.replace("mpmae_", "convnextv2_"),
            patch_size=model.patch_size,
            stem=config.model.stem,
            bands_in=model.bands_in,
            stem_padding=model.encoder.stem_padding,
            grn_eps=model.encoder.grn_eps,
        )
    return ImageEncoder(backbone, EncoderInput(model.bands_in, model.patch_size, statistics_by_level(statistics)), _LABEL)


def _reads(model: MPMAE | MultiMAE, encoder: ImageEncoder) -> str:
    chosen = encoder.facts.get("domains")
    if chosen is None:
        return ""
    left_out = [name for name in model.domains_in if name not in chosen]
    but = f" (not {', '.join(left_out)}: the set lacks their bands)" if left_out else ""
    return f"the encoder reads {', '.join(chosen)}{but}; features are the {encoder.facts['pooling'].removeprefix('the ')}"
