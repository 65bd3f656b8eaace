"""Which rank the others wait for.

In a step that all ranks share every rank seems equally slow: those that are done wait in a collective. So only time that
holds no collective counts: waiting for data and, where weights are whole on every rank (ddp, ZeRO up to stage 2), the
forward. Where the forward gathers weights (ZeRO-3, fsdp) its times agree over the ranks, and only data waits can differ.
"""

from collections import deque
from statistics import median
from typing import Any

import torch

FIELDS = ("data_wait_s", "forward_s")
WINDOW_STEPS = 10
LEAST_STEPS = 3
NOTABLE_PERCENT = 10.0
# of a step's time: below it a difference is of no interest, however large beside a short forward
NOTABLE_SHARE = 0.01


class SlowRanks:
    """Finds the slowest rank from the times of all ranks, over the last steps.

    `slots` go into a sum over the ranks; `judge` reads the sum.
    """

    def __init__(self, rank: int, world_size: int):
        self._rank, self._world_size = rank, world_size
        self._recent: deque[torch.Tensor] = deque(maxlen=WINDOW_STEPS)

    @property
    def num_slots(self) -> int:
        """Numbers that the sum needs: none for a single rank."""
        return len(FIELDS) * self._world_size if self._world_size > 1 else 0

    def slots(self, data_wait_s: float, forward_s: float) -> torch.Tensor:
        """This rank's times in their place among zeros: float64 [num_slots] on the CPU."""
        slots = torch.zeros(self.num_slots, dtype=torch.float64)
        if len(slots):
            slots[len(FIELDS) * self._rank :][: len(FIELDS)] = torch.tensor([data_wait_s, forward_s], dtype=torch.float64)
        return slots

    def judge(self, summed: torch.Tensor, elapsed_s: float) -> dict[str, Any] | None:
        """The slowest rank of the last steps beside the median of the others; None while it is not 10 % slower.

        summed: the slots' sum over the ranks [num_slots], on the CPU. elapsed_s: of the step.
        """
        if not len(summed):
            return None
        self._recent.append(summed.view(self._world_size, len(FIELDS)))
        if len(self._recent) < LEAST_STEPS:
            return None
        times = torch.stack(list(self._recent)).mean(0).tolist()
        slowest = max(range(self._world_size), key=lambda rank: sum(times[rank]))
        own = sum(times[slowest])
        others = [row for rank, row in enumerate(times) if rank != slowest]
        typical = median(sum(row) for row in others)
        behind_percent = 100 * (own / typical - 1) if typical > 0 else float("inf")
        if behind_percent <= NOTABLE_PERCENT or own - typical < NOTABLE_SHARE * elapsed_s:
            return None
        columns = list(zip(*others, strict=True))
        return {
            "slowest": slowest,
            "behind_percent": behind_percent,
            **dict(zip(FIELDS, times[slowest], strict=True)),
            **{f"others_{name}": median(column) for name, column in zip(FIELDS, columns, strict=True)},
        }
