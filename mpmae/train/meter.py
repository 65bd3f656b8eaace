"""Numbers of the running step, kept on the device and read late, so that the hot path never waits for them."""

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mpmae.engine.base import Engine


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Finished(NamedTuple):
    """A step whose numbers have arrived.

    record: for the trackers, the same on every rank but for clocks and memory. own_loss, own_losses: this rank's share of
    the loss, and by modality. num_votes: how many ranks voted for each thing that `Meter.finish_step` lets them vote for.
    """

    record: dict[str, Any]
    own_loss: float
    own_losses: dict[str, float]
    num_votes: list[int]


class Meter:
    """Collects one step's shares of the losses and hands out finished steps.

    On a GPU they come out `lag` steps late, when their numbers have long arrived; on a CPU at once. num_choices: how many
    things a rank can vote for.
    """

    def __init__(self, engine: Engine, modalities: tuple[str, ...], global_batch_size: int, num_choices: int = 0):
        self._engine, self._modalities, self._global_batch_size = engine, modalities, global_batch_size
        self.lag = 2 if engine.device.type == "cuda" else 0
        self._sums = torch.zeros(len(modalities) + 1, dtype=torch.float64, device=engine.device)
        self._no_votes = torch.zeros(num_choices, dtype=torch.float64, device=engine.device)
        self._log_vars: dict[str, torch.Tensor] = {}
        self._absent: set[str] = set()
        self._pending: deque[tuple[dict[str, Any], torch.Tensor, torch.cuda.Event | None]] = deque()
        self._step_start, self._wait_s = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """Note time spent waiting for data."""
        self._wait_s += seconds

    @torch.no_grad()
    def add(
        self,
        loss: torch.Tensor,
        losses: dict[str, torch.Tensor],
        log_vars: dict[str, torch.Tensor],
        num_present: dict[str, int],
    ) -> None:
        """Add a micro batch's shares of the global loss; a modality that no tile of the global batch has gets no number.

        log_vars: the log variances that weighed it, by modality; empty without such weights.
        """
        self._log_vars = log_vars
        self._absent = {name for name in self._modalities if not num_present[name]}
        self._sums += torch.stack([loss, *(losses[name] for name in self._modalities)]).to(self._sums.dtype)

    @torch.no_grad()
    def finish_step(self, step: int, epoch: int, lr: float, grad_norm: torch.Tensor, votes: Sequence[int] = ()) -> None:
        """Close the step: sum over ranks and queue its record. votes: what this rank votes for, as indices."""
        now = time.perf_counter()
        elapsed_s = now - self._step_start
        cast = self._no_votes.clone()
        for choice in votes:
            cast[choice].fill_(1)  # no copy from the host, which would wait for the device
        sums = self._engine.sum_over_ranks(torch.cat([self._sums, cast]))
        log_vars = torch.stack(list(self._log_vars.values())).to(sums) if self._log_vars else sums[:0]
        numbers = torch.cat([sums, self._sums, log_vars, grad_norm.reshape(1).to(sums)])
        known = {
            "step": step,
            "epoch": epoch,
            "absent": self._absent,
            "log_variances": tuple(self._log_vars),
            "lr": lr,
            "images_per_s": self._global_batch_size / elapsed_s,
            "data_wait_percent": 100 * self._wait_s / elapsed_s,
            "memory_bytes": memory_bytes(self._engine.device),
        }
        copied = None
        if self.lag:
            numbers, copied = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._pending.append((known, numbers, copied))
        self._sums = torch.zeros_like(self._sums)
        self._step_start, self._wait_s = now, 0.0

    def restart_clock(self) -> None:
        """Leave out what happened since the last step (a validation, a save)."""
        self._step_start, self._wait_s = time.perf_counter(), 0.0

    def ready(self, everything: bool = False) -> list[Finished]:
        """Steps whose numbers are there, oldest first."""
        finished = []
        while len(self._pending) > (0 if everything else self.lag):
            known, numbers, copied = self._pending.popleft()
            if copied:
                copied.synchronize()
            finished.append(self._finished(known, iter(numbers.tolist())))
        return finished

    def _finished(self, known: dict[str, Any], numbers: Iterator[float]) -> Finished:
        """Takes the numbers apart in the order in which `finish_step` put them together."""
        loss, losses = next(numbers), self._take(self._modalities, numbers)
        votes = [round(next(numbers)) for _ in self._no_votes]
        own_loss, own_losses = next(numbers), self._take(self._modalities, numbers)
        log_variances = self._take(known.pop("log_variances"), numbers)
        record = {"step": known["step"], "epoch": known["epoch"], "loss": loss}
        record["losses"] = losses | dict.fromkeys(known.pop("absent"))
        record |= {"log_variances": log_variances} if log_variances else {}
        record |= {"lr": known["lr"], "grad_norm": next(numbers)} | known
        return Finished(record, own_loss, own_losses, votes)

    def _take(self, names: Sequence[str], numbers: Iterator[float]) -> dict[str, float]:
        return {name: next(numbers) for name in names}
