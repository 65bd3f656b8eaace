"""The cost of a model of any family."""

from mpmae.cost.mpmae import mpmae_cost
from mpmae.cost.multimae import multimae_cost
from mpmae.cost.parts import Cost
from mpmae.models import MPMAE
from mpmae.models.multimae.model import MultiMAE


def model_cost(model: MPMAE | MultiMAE, precision: str, capability: int | None = None) -> Cost:
    """The cost of a training step of `model`, on any device (meta too); ask before ZeRO takes the parameters apart.

    precision: "fp32" or "bf16", of activations. capability: the major compute capability of the GPU whose kernels' bytes are
    counted; None, and where the model has no kernels of this project (a dense encoder, MultiMAE): the least that any
    implementation moves.
    """
    if isinstance(model, MultiMAE):
        return multimae_cost(model, precision)
    return mpmae_cost(model, precision, capability)
