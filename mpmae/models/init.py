"""Initial weights.

"convnextv2", the default, is a standard deviation of 0.02 everywhere (arXiv 2301.00808, appendix A). "reference" follows the
published code (MMEarth-train, `models/fcmae.py`, `_init_weights`), where most layers get a truncated normal of standard
deviation 1 that is cut at -2 and 2 (their values then spread by 0.88): the depthwise convolutions, the linear layers of the
sparse blocks, the projection and the pixel heads; the dense kernels of the sparse convolutions, the linear layers of the
decoder, the tile heads and the mask token get 0.02. In a dense encoder it is the other way round: all convolutions get 1,
all linear layers 0.02. Biases, GRN and log variances start at 0, LayerNorm at 1 and 0.

"convnextv2" is the default since it trains better in short runs on real tiles: after 200 steps, at the better of two peak
rates and over three seeds, its validation loss is 0.63 +- 0.04 of the trivial predictor's, that of "reference" 1.09 +- 0.01
(benchmarks/records/20261121-074147-initial-weights.json). The larger rate was the better one for both; higher ones were not
tried, nor whether "reference" catches up in a long run.
"""

from torch import nn

from mpmae.models.encoder import DenseEncoder
from mpmae.models.mpmae import MPMAE

INITS = ("reference", "convnextv2")
_CUT = 2.0


def initialise(model: MPMAE, init: str) -> None:
    """Fills `model` with fresh weights from torch's generator; `init` is one of INITS."""
    wide = _wide(model) if init == "reference" else set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name in wide:
                nn.init.trunc_normal_(module.weight, std=1.0, a=-_CUT, b=_CUT)
            else:
                # A cut at 100 standard deviations is none, but trunc_normal_ would now and then return the cut itself, -2.
                nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.decoder.mask_token, std=0.02)


def _wide(model: MPMAE) -> set[str]:
    """Names of the modules that the published code fills with standard deviation 1."""
    wide = {"decoder.proj"} | {f"heads.pixel.{name}" for name in model.heads.pixel}
    wide_in_encoder = nn.Conv2d if isinstance(model.encoder, DenseEncoder) else nn.Linear
    for name, module in model.named_modules():
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        if depthwise or (name.startswith("encoder.") and isinstance(module, wide_in_encoder)):
            wide.add(name)
    return wide
