"""Numbers of the running step, kept on the device and read late, so that the hot path never waits for them."""

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from mpmae.engine.base import Engine
from mpmae.train.slow_ranks import SlowRanks
from mpmae.train.speed import Speed

PHASES = ("data", "forward", "backward", "optimizer")
_PACE_STEPS = 100


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Peaks so far: memory_bytes in use and memory_reserved_bytes held by a GPU's allocator; on a CPU the process's."""
    if device.type == "cuda":
        return {
            "memory_bytes": torch.cuda.max_memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB elsewhere
    return {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


@dataclass
class _Times:
    """Seconds of a step on this rank, by the host's clock, and on a GPU the events around each of its forwards."""

    data_s: float = 0.0
    forward_s: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def are_known(self) -> bool:
        """Whether the GPU has passed the last event; does not wait for it."""
        return not self.events or self.events[-1][1].query()

    def pair(self) -> tuple[float, float]:
        """Waiting for data and forward."""
        if self.events:
            return self.data_s, sum(start.elapsed_time(end) for start, end in self.events) / 1e3
        return self.data_s, self.forward_s


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

    On a GPU they come out `lag` steps late, when their numbers have long arrived; on a CPU at once. speed: turns a step's
    time into rates. total_steps: of the run, for the time left. num_choices: how many things a rank can vote for.
    """

    def __init__(self, engine: Engine, modalities: tuple[str, ...], speed: Speed, total_steps: int, num_choices: int = 0):
        self._engine, self._modalities, self._speed, self._total_steps = engine, modalities, speed, total_steps
        self._on_gpu = engine.device.type == "cuda"
        self.lag = 2 if self._on_gpu else 0
        self._sums = torch.zeros(len(modalities) + 1, dtype=torch.float64, device=engine.device)
        self._no_votes = torch.zeros(num_choices, dtype=torch.float64, device=engine.device)
        self._log_vars: dict[str, torch.Tensor] = {}
        self._absent: set[str] = set()
        self._pending: deque[tuple[dict[str, Any], torch.Tensor, torch.cuda.Event | None]] = deque()
        self._slow_ranks = SlowRanks(engine.rank, engine.world_size)
        self._times, self._unknown_times, self._known_times = _Times(), deque(), (0.0, 0.0)
        self._launched = self._step_start = time.perf_counter()
        self._pace: deque[float] = deque([self._step_start], maxlen=_PACE_STEPS)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as one of PHASES, and name it in a profiler's trace."""
        assert name in PHASES, name
        events = None
        if self._on_gpu and name == "forward":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        started = time.perf_counter()
        with record_function(name):
            yield
        elapsed_s = time.perf_counter() - started
        if name == "data":
            self._times.data_s += elapsed_s
        elif name == "forward":
            self._times.forward_s += elapsed_s
        if events:
            events[1].record()
            self._times.events.append(events)

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
        self._pace.append(now)
        pace_s = (now - self._pace[0]) / (len(self._pace) - 1)
        slots = self._slow_ranks.slots(*self._latest_times()).to(self._sums.device, non_blocking=True)
        cast = self._no_votes.clone()
        for choice in votes:
            cast[choice].fill_(1)  # no copy from the host, which would wait for the device
        sums = self._engine.sum_over_ranks(torch.cat([self._sums, cast, slots]))
        log_vars = torch.stack(list(self._log_vars.values())).to(sums) if self._log_vars else sums[:0]
        numbers = torch.cat([grad_norm.reshape(1).to(sums), self._sums, log_vars, sums])
        known = {
            "step": step,
            "epoch": epoch,
            "absent": self._absent,
            "log_variances": tuple(self._log_vars),
            "lr": lr,
            "elapsed_s": elapsed_s,
            **self._speed.rates(elapsed_s),
            "data_wait_percent": 100 * self._times.data_s / elapsed_s,
            **memory_bytes(self._engine.device),
            "running_s": now - self._launched,
            "left_s": pace_s * (self._total_steps - step),
        }
        copied = None
        if self._on_gpu:
            numbers, copied = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._pending.append((known, numbers, copied))
        self._sums = torch.zeros_like(self._sums)
        self._step_start, self._times = now, _Times()

    def restart_clock(self) -> None:
        """Leave out what happened since the last step (a validation, a save)."""
        self._step_start, self._times = time.perf_counter(), _Times()

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
        grad_norm = next(numbers)
        own_loss, own_losses = next(numbers), self._take(self._modalities, numbers)
        log_variances = self._take(known.pop("log_variances"), numbers)
        loss, losses = next(numbers), self._take(self._modalities, numbers)
        num_votes = [round(next(numbers)) for _ in self._no_votes]
        slowest = self._slow_ranks.judge(torch.tensor(list(numbers), dtype=torch.float64), known.pop("elapsed_s"))

        record = {"step": known["step"], "epoch": known["epoch"], "loss": loss}
        record["losses"] = losses | dict.fromkeys(known.pop("absent"))
        record |= {"log_variances": log_variances} if log_variances else {}
        record |= {"lr": known["lr"], "grad_norm": grad_norm} | known
        record |= {} if slowest is None else {"ranks": slowest}
        return Finished(record, own_loss, own_losses, num_votes)

    def _take(self, names: Sequence[str], numbers: Iterator[float]) -> dict[str, float]:
        return {name: next(numbers) for name in names}

    def _latest_times(self) -> tuple[float, float]:
        """Those of this step; on a GPU those of the last step that it has finished, so that nothing waits for it."""
        self._unknown_times.append(self._times)
        while self._unknown_times and self._unknown_times[0].are_known():
            self._known_times = self._unknown_times.popleft().pair()
        return self._known_times
