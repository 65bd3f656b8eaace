"""Initial weights of MultiMAE, those of the published code.

Linear layers are Xavier uniform with biases 0, each decoder's by its own shape, and attention's queries, keys and values
each by theirs; patch embeddings likewise, their biases as torch's convolutions start (uniform within 1 / sqrt(fan in)).
Normal with standard deviation 0.02: global token, domain embeddings of the decoders, class embeddings. Mask tokens and log
variances start at 0, normalisations at 1 and 0.
Source: multimae-meets-eo, `multimae.py`, `input_adapters.py`, `output_adapters.py`.
"""

import math

from torch import nn

from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.vit import StackedLinear

_PARTS = {"qkv": 3, "kv": 2}
_STD = 0.02


def initialise(model: MultiMAE) -> None:
    """Fills `model` with fresh weights from torch's generator."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | StackedLinear):
            dim_out, dim_in = module.weight.shape[-2:]
            bound = math.sqrt(6 / (dim_out // _PARTS.get(name.rsplit(".", 1)[-1], 1) + dim_in))
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=_STD)
    nn.init.normal_(model.global_tokens, std=_STD)
    nn.init.normal_(model.decoders.task_embeddings, std=_STD)
