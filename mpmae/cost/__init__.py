"""What a training step takes, counted and not measured: operations, bytes, parameters."""

from mpmae.cost.model import Cost, Part, model_cost

__all__ = ["Cost", "Part", "model_cost"]
