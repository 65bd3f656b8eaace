"""Numbers of the running step, kept on the device and read late, so that the hot path never waits for them."""

import resource
import sys
import time
from collections import deque
from typing import Any

import torch

from mpmae.engine.base import Engine


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Collects one step's shares of the losses and hands out finished metric records.

    On a GPU records come out `lag` steps late, when their numbers have long arrived; on a CPU at once.
    """

    def __init__(self, engine: Engine, modalities: tuple[str, ...], global_batch_size: int):
        self._engine, self._modalities, self._global_batch_size = engine, modalities, global_batch_size
        self._lag = 2 if engine.device.type == "cuda" else 0
        self._sums = torch.zeros(len(modalities) + 1, dtype=torch.float64, device=engine.device)
        self._absent: set[str] = set()
        self._pending: deque[tuple[dict[str, Any], torch.Tensor, torch.cuda.Event | None]] = deque()
        self._step_start, self._wait_s = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """Note time spent waiting for data."""
        self._wait_s += seconds

    @torch.no_grad()
    def add(self, loss: torch.Tensor, losses: dict[str, torch.Tensor], num_present: dict[str, int]) -> None:
        """Add a micro batch's shares of the global loss; a modality that no tile of the global batch has gets no number."""
        self._absent = {name for name in self._modalities if not num_present[name]}
        self._sums += torch.stack([loss, *(losses[name] for name in self._modalities)]).to(self._sums.dtype)

    @torch.no_grad()
    def finish_step(self, step: int, epoch: int, lr: float, grad_norm: torch.Tensor) -> None:
        """Close the step: sum over ranks and queue its record."""
        now = time.perf_counter()
        elapsed_s = now - self._step_start
        sums = self._engine.sum_over_ranks(self._sums)
        numbers = torch.cat([sums, grad_norm.reshape(1).to(sums)])
        known = {
            "step": step,
            "epoch": epoch,
            "absent": self._absent,
            "lr": lr,
            "images_per_s": self._global_batch_size / elapsed_s,
            "data_wait_percent": 100 * self._wait_s / elapsed_s,
            "memory_bytes": memory_bytes(self._engine.device),
        }
        copied = None
        if self._lag:
            numbers, copied = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._pending.append((known, numbers, copied))
        self._sums = torch.zeros_like(self._sums)
        self._step_start, self._wait_s = now, 0.0

    def restart_clock(self) -> None:
        """Leave out what happened since the last step (a validation, a save)."""
        self._step_start, self._wait_s = time.perf_counter(), 0.0

    def ready(self, everything: bool = False) -> list[dict[str, Any]]:
        """Records whose numbers are there, oldest first."""
        records = []
        while len(self._pending) > (0 if everything else self._lag):
            known, numbers, copied = self._pending.popleft()
            if copied:
                copied.synchronize()
            loss, *losses, grad_norm = numbers.tolist()
            by_modality = dict(zip(self._modalities, losses, strict=True)) | dict.fromkeys(known.pop("absent"))
            first = {"step": known["step"], "epoch": known["epoch"], "loss": loss, "losses": by_modality}
            records.append(first | {"lr": known["lr"], "grad_norm": grad_norm} | known)
        return records
