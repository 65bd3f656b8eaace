"""Who holds a run up: judged from what every rank last said of its place."""

from collections.abc import Mapping
from typing import NamedTuple

# a rank's life and, within a step, the order of its phases
PHASES = ("start", "data", "forward", "backward", "optimizer", "publish", "probe", "validate", "save")
LEFT, FAILED = "left", "failed"
_DOING = {
    "start": "starting up",
    "data": "waiting for its loader",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer step",
    "publish": "waiting for the numbers of a step",
    "probe": "probing its features",
    "validate": "validating",
    "save": "saving",
}
_ENDED = {LEFT: "left", FAILED: "ended with an error, which its message tells"}
_NUM_LISTED = 8


class Beat(NamedTuple):
    """What a rank says of itself.

    number: counts the beats. step, micro_step: of the running step (-1 before the first), from 0; in a validation or a
    probe micro_step counts batches. num_collectives: that it has begun since the step did. idle_s: since it last got on.
    patience_s: how long it may stay at such a place.
    """

    number: int
    phase: str
    step: int
    micro_step: int
    num_collectives: int
    idle_s: float
    patience_s: float
    host: str
    process: int

    @property
    def place(self) -> tuple[int, ...]:
        """Grows as the rank gets on; a rank that waits in a collective is ahead of those it waits for."""
        return self.step, self.num_collectives, self.micro_step, PHASES.index(self.phase)


class Heard(NamedTuple):
    """The last beat of a rank (None: there has been none), and seconds since it came."""

    beat: Beat | None
    silent_s: float

    @property
    def has_ended(self) -> bool:
        """Whether the rank has said that this beat is its last."""
        return self.beat is not None and self.beat.phase in _ENDED

    @property
    def idle_s(self) -> float:
        """Seconds since the rank got on, as far as is known."""
        return self.silent_s + (self.beat.idle_s if self.beat else 0.0)

    def is_silent(self, stall_s: float) -> bool:
        """Whether the rank has missed its beats for so long that its process must be stopped, dead or out of reach."""
        patience_s = self.beat.patience_s if self.beat else stall_s
        return not self.has_ended and self.silent_s >= patience_s / 2 and self.idle_s >= patience_s


class Verdict(NamedTuple):
    """The ranks that hold the run up, how many of them cannot speak for themselves, and the message about it."""

    culprits: list[int]
    num_mute: int
    text: str


def judge(heard: Mapping[int, Heard], stall_s: float) -> Verdict | None:
    """Whether some of these ranks hold the run up; None while the run gets on.

    First come silent ranks. Then, when a rank has been idle for longer than its patience: those that ended with an error;
    else those furthest behind, if these have been idle too long themselves: a rank that waits for another one which gets on,
    however slowly, holds nothing up.
    """
    silent = [rank for rank, each in heard.items() if each.is_silent(stall_s)]
    if silent:
        return _verdict(silent, len(silent), heard, stall_s)
    running = {rank: each for rank, each in heard.items() if each.beat is not None and not each.has_ended}
    stalled = [rank for rank, each in running.items() if each.idle_s >= each.beat.patience_s]
    failed = [rank for rank, each in heard.items() if each.beat is not None and each.beat.phase == FAILED]
    if stalled and failed:
        return _verdict(failed, len(failed), heard, stall_s)
    last = min((each.beat.place for each in running.values()), default=())
    behind = [rank for rank in stalled if running[rank].beat.place == last]
    return _verdict(behind, 0, heard, stall_s) if behind else None


def _verdict(culprits: list[int], num_mute: int, heard: Mapping[int, Heard], stall_s: float) -> Verdict:
    others = [rank for rank in heard if rank not in culprits]
    parts = [f"stalled: {_listed(culprits, heard, stall_s)} (guard.stall_s = {stall_s:g})"]
    if others:
        parts.append(f"held up: {_listed(others, heard, stall_s)}")
    elif len(culprits) > 1:
        parts.append("no rank is behind the others: look at what they share (storage, network, a collective)")
    return Verdict(culprits, num_mute, "; ".join(parts))


def _listed(ranks: list[int], heard: Mapping[int, Heard], stall_s: float) -> str:
    shown = ", ".join(f"rank {rank} {_described(heard[rank], stall_s)}" for rank in ranks[:_NUM_LISTED])
    more = len(ranks) - _NUM_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def _described(heard: Heard, stall_s: float) -> str:
    beat = heard.beat
    if beat is None:
        return f"silent for {heard.silent_s:.0f} s, since the start"
    where = f"(process {beat.process} on {beat.host})"
    if heard.has_ended:
        return f"{where} has {_ENDED[beat.phase]}"
    place = f"step {beat.step + 1}, micro step {beat.micro_step + 1}" if beat.step >= 0 else "no step yet"
    if heard.is_silent(stall_s):
        silent = f"silent for {heard.silent_s:.0f} s: stopped, dead or out of reach"
        return f"{where} {silent}; it was {_DOING[beat.phase]}, {place}"
    return f"{where} {_DOING[beat.phase]}, {place}, for {heard.idle_s:.0f} s"
