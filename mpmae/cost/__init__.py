"""What a training step takes, counted and not measured: operations, bytes, parameters."""

from mpmae.cost.model import model_cost
from mpmae.cost.parts import Cost, Part

__all__ = ["Cost", "Part", "model_cost"]
