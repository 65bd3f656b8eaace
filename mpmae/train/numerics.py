"""Watching the numbers of a run: skipped steps, loss spikes, clipped gradients."""

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mpmae.config import GuardSection
from mpmae.files import write_whole
from mpmae.shard_format import sample_key

BAD_BATCH_NAME = "bad_batch.json"
WINDOW_STEPS = 64
MIN_STEPS = 16  # before so many, a median says little


def with_loud_gradient(loss: torch.Tensor) -> torch.Tensor:
    """`loss` itself, with a gradient of NaN when it is not finite, so that no engine can miss it: the step is skipped.

    A loss may be NaN and its gradient finite, as of a mean over nothing. Nothing here waits for the device.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class NumericsGuard:
    """Judges finished records and adds what it finds to them; every rank feeds it the same ones.

    Added are skipped_steps and skipped_in_a_row (steps without a finite loss and gradient), spike, and clipped_percent: the
    part of the last `WINDOW_STEPS` steps whose gradient was clipped (None without clipping).

    A spike: the mean over the modalities of each one's unweighted loss over its median of the last `WINDOW_STEPS` steps is
    above spike_factor (None: never). Unweighted losses are never negative, unlike the total under uncertainty weighting; the
    division makes up for their scales, so that no modality rules, and the mean lets none raise an alarm by its own noise.

    state: what `state()` of an earlier launch gave.
    """

    def __init__(self, config: GuardSection, clip_grad_norm: float | None, state: dict[str, Any] | None = None):
        state = state or {}
        self._max_skipped, self._spike_factor, self._clip_grad_norm = (
            config.max_skipped_steps,
            config.spike_factor,
            clip_grad_norm,
        )
        self._skipped, self._in_a_row = state.get("skipped_steps", 0), state.get("skipped_in_a_row", 0)
        self._clipped = deque(state.get("clipped", ()), WINDOW_STEPS)
        self._recent = {name: deque(losses, WINDOW_STEPS) for name, losses in state.get("recent_losses", {}).items()}

    @property
    def is_exhausted(self) -> bool:
        """Whether as many steps in a row were skipped as are allowed."""
        return self._in_a_row >= self._max_skipped

    def state(self) -> dict[str, Any]:
        """Plain data to continue from."""
        recent = {name: list(losses) for name, losses in self._recent.items()}
        counts = {"skipped_steps": self._skipped, "skipped_in_a_row": self._in_a_row}
        return counts | {"clipped": list(self._clipped), "recent_losses": recent}

    def check(self, record: dict[str, Any]) -> list[str]:
        """Notes on a record, which gets its new entries."""
        notes, grad_norm = [], record["grad_norm"]
        is_skipped = not (math.isfinite(record["loss"]) and math.isfinite(grad_norm))
        self._skipped += is_skipped
        self._in_a_row = self._in_a_row + 1 if is_skipped else 0
        if is_skipped:
            what = ", ".join(f"{name} {record[name]}" for name in ("loss", "grad_norm") if not math.isfinite(record[name]))
            of = ", ".join(not_finite(record["losses"]))
            notes.append(
                f"step {record['step']}: skipped, as it is not finite: {what}{f' ({of})' if of else ''}; {self._in_a_row} "
                f"in a row, guard.max_skipped_steps = {self._max_skipped}"
            )
        ratios = self._ratios(record["losses"])
        ratio = sum(ratios.values()) / len(ratios) if ratios else 0.0
        is_spike = self._spike_factor is not None and ratio > self._spike_factor
        if is_spike:
            worst = ", ".join(f"{name} {ratios[name]:.3g}x" for name in sorted(ratios, key=ratios.get, reverse=True)[:3])
            notes.append(
                f"step {record['step']}: the losses are {ratio:.3g} times their medians of the last steps (most: {worst})"
            )
        if self._clip_grad_norm is not None and not is_skipped:
            self._clipped.append(int(grad_norm > self._clip_grad_norm))
        clipped_percent = 100 * sum(self._clipped) / len(self._clipped) if self._clipped else None
        record |= {"skipped_steps": self._skipped, "skipped_in_a_row": self._in_a_row, "spike": is_spike}
        record |= {"clipped_percent": clipped_percent}
        return notes

    def _ratios(self, losses: dict[str, float | None]) -> dict[str, float]:
        """Each finite loss over its recent median; from then on it is part of the past itself."""
        ratios = {}
        for name, loss in losses.items():
            if loss is None or not math.isfinite(loss):
                continue
            past = self._recent.setdefault(name, deque(maxlen=WINDOW_STEPS))
            middle = median(past) if len(past) >= MIN_STEPS else 0.0
            if middle > 0:
                ratios[name] = loss / middle
            past.append(loss)
        return ratios


def not_finite(losses: dict[str, float | None]) -> list[str]:
    """The names of the losses that are NaN or infinite."""
    return [name for name, loss in losses.items() if loss is not None and not math.isfinite(loss)]


class RecentSamples:
    """The sample ids that this rank has trained on in the last steps, by step."""

    def __init__(self, num_steps: int):
        self._steps: deque[tuple[int, list[list[int]]]] = deque(maxlen=num_steps)

    def add(self, step: int, sample_ids: torch.Tensor) -> None:
        """Note a micro batch of a step (counted from 1); ids int64 [N] on the host."""
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append((step, []))
        self._steps[-1][1].append(sample_ids.tolist())

    def of(self, step: int) -> list[list[int]]:
        """The ids of each micro batch of a step."""
        return dict(self._steps)[step]


def write_bad_batch(run_dir: Path, record: dict[str, Any], shares: Sequence[dict[str, Any]]) -> None:
    """Write bad_batch.json about the step of `record`; shares: `loss`, `losses` and `sample_ids` by micro step of each rank.

    Numbers that are not finite are written as NaN and Infinity, which Python reads back. `keys` name the members of the
    training split's shards.
    """
    ranks = []
    for rank, share in enumerate(shares):
        keys = [[sample_key(number) for number in ids] for ids in share["sample_ids"]]
        ranks.append({"rank": rank, **share, "keys": keys})
    content = {key: record[key] for key in ("step", "epoch", "loss", "losses", "grad_norm", "skipped_in_a_row")}
    content |= {"bad_ranks": _bad_ranks(shares), "ranks": ranks}
    write_whole(run_dir / BAD_BATCH_NAME, json.dumps(content) + "\n")


def too_many_skipped(run_dir: Path, record: dict[str, Any], shares: Sequence[dict[str, Any]]) -> str:
    """The message of a run that ends for it; arguments as in `write_bad_batch`."""
    modalities = ", ".join(not_finite(record["losses"])) or "none alone"
    ranks = ", ".join(map(str, _bad_ranks(shares))) or "none alone"
    return (
        f"{record['skipped_in_a_row']} steps in a row without a finite loss and gradient (guard.max_skipped_steps), the "
        f"last step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}, modalities: {modalities}, "
        f"ranks: {ranks}; {run_dir / BAD_BATCH_NAME} has the samples. Lower optim.blr, set optim.clip_grad_norm, or resume "
        f"from an earlier checkpoint in {run_dir}"
    )


def _bad_ranks(shares: Sequence[dict[str, Any]]) -> list[int]:
    """The ranks whose own share of the loss was not finite."""
    return [rank for rank, share in enumerate(shares) if not math.isfinite(share["loss"])]
