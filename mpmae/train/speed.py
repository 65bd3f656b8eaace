"""How fast a step was, from its time and the counted cost of the model."""

from typing import Any

from mpmae.cost import Cost
from mpmae.cost.peaks import Peak
from mpmae.loader import BatchPlan


class Speed:
    """Rates of a run.

    cost: of the model, counted once. peak: of one device, None where it has none to be compared with. num_optimizer_shards:
    ranks that share the optimizer's state. clipped: whether gradients are scaled to a norm.
    """

    def __init__(self, cost: Cost, batch: BatchPlan, peak: Peak | None, num_optimizer_shards: int, clipped: bool):
        self._batch, self._peak = batch, peak
        num_images = batch.micro_batch_size * batch.num_micro_steps
        self._flops = num_images * cost.flops
        self._bytes = cost.step_bytes(num_images, batch.num_micro_steps, clipped, num_optimizer_shards)

    def rates(self, elapsed_s: float) -> dict[str, Any]:
        """What a step of so many seconds makes; mfu_percent only where the device's peak is known.

        images_per_s is of the whole run, what ends in `_per_rank` of one rank, to be compared with one device.
        """
        images_per_s = self._batch.global_batch_size / elapsed_s
        rates = {
            "images_per_s": images_per_s,
            "images_per_s_per_rank": images_per_s / self._batch.world_size,
            "tflops_per_rank": self._flops / elapsed_s / 1e12,
            "gb_per_s_per_rank": self._bytes / elapsed_s / 1e9,
        }
        if self._peak is not None:
            rates["mfu_percent"] = 100 * self._flops / elapsed_s / self._peak.flops_per_s
        return rates
