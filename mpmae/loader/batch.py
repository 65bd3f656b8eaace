"""What a loader hands to the model.

Shapes: N samples, C bands, H = W image size in pixels, K length of a tile vector.
"""

from dataclasses import dataclass, field, fields

import torch


@dataclass
class Batch:
    """One micro batch.

    values: per modality
        pixel, continuous   float32 [N, C, H, W], normalised (mean 0, std 1), 0 where there is no data
        pixel, categorical  int64 [N, 1, H, W], class id, -1 where there is no data
        tile, continuous    float32 [N, K], normalised, 0 where there is no data
        tile, categorical   int64 [N], class id, -1 where there is no data
    valid: bool, the shape of the values: True where there is data. A NaN or infinite value counts as not valid in any case.
    sample_ids: int64 [N], position of the sample in its split; on the host as a loader gives them.
    num_present: per modality, in how many tiles of the whole GLOBAL batch it is present (the divisor of its loss).
    global_batch_size: samples of the global batch, padding not counted.
    padding: bool [N], True for repeats that only fill up an evaluation batch; they must not count.
    """

    values: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]
    sample_ids: torch.Tensor
    num_present: dict[str, int]
    global_batch_size: int
    padding: torch.Tensor = field(default=None)

    def __post_init__(self):
        if self.padding is None:
            self.padding = torch.zeros(len(self.sample_ids), dtype=torch.bool, device=self.sample_ids.device)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The batch on `device`."""
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, dict):
                value = {k: v.to(device, non_blocking=non_blocking) if torch.is_tensor(v) else v for k, v in value.items()}
            elif torch.is_tensor(value):
                value = value.to(device, non_blocking=non_blocking)
            moved[item.name] = value
        return Batch(**moved)
