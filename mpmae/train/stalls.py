"""Who holds a run up: judged from what every rank last said of its place."""

from collections.abc import Mapping
from typing import NamedTuple

# a rank's life and, within a step, the order of its phases
PHASES = ("start", "data", "forward", "backward", "update", "publish", "validate", "save")
LEFT, FAILED = "left", "failed"
_DOING = {
    "start": "starting up",
    "data": "waiting for its loader",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "update": "in the optimizer step",
    "publish": "waiting for the numbers of a step",
    "validate": "validating",
    "save": "saving",
}
_ENDED = {LEFT: "left", FAILED: "ended with an error, which its message tells"}
_NUM_LISTED = 8


class Beat(NamedTuple):
    """What a rank says of itself.

    number: counts the beats. step, micro_step: of the running step (-1 before the first); in a validation micro_step counts
    batches. num_collectives: that it has begun since the step did. idle_s: since it last got on. patience_s: how long it may
    stay at such a place.
    """

    number: int
    phase: str
    step: int
    micro_step: int
    num_collectives: int
    idle_s: float
    patience_s: float
    host: str
    pid: int

    @property
    def place(self) -> tuple[int, ...]:
        """Grows as the rank gets on; a rank that waits in a collective is ahead of those it waits for."""
        phase = PHASES.index(self.phase) if self.phase in PHASES else len(PHASES)
        return self.step, self.num_collectives, self.micro_step, phase


class Heard(NamedTuple):
    """The last beat of a rank, and seconds since it came; None when there has been none."""

    beat: Beat | None
    silent_s: float


class Verdict(NamedTuple):
    """The ranks that hold the run up, whether these cannot speak for themselves, and the message about it."""

    culprits: tuple[int, ...]
    are_silent: bool
    text: str


def judge(heard: Mapping[int, Heard], stall_s: float) -> Verdict | None:
    """Whether some of these ranks hold the run up; None while the run gets on.

    First come ranks that have said nothing for `stall_s`, as a stopped or dead process does. Then, when a rank has been idle
    for longer than its patience: those that ended with an error; else those furthest behind, if these have been idle too
    long themselves. A rank that waits for another one which gets on, however slowly, holds nothing up.
    """
    silent = [rank for rank, (beat, silent_s) in heard.items() if _may_speak(beat) and silent_s >= stall_s]
    if silent:
        return _verdict(silent, True, heard, stall_s)
    running = {rank: beat for rank, (beat, _) in heard.items() if beat is not None and beat.phase not in (LEFT, FAILED)}
    stalled = [rank for rank, beat in running.items() if beat.idle_s + heard[rank].silent_s >= beat.patience_s]
    if not stalled:
        return None
    failed = [rank for rank, (beat, _) in heard.items() if beat is not None and beat.phase == FAILED]
    if failed:
        return _verdict(failed, True, heard, stall_s)
    last = min(beat.place for beat in running.values())
    behind = [rank for rank in stalled if running[rank].place == last]
    return _verdict(behind, False, heard, stall_s) if behind else None


def _may_speak(beat: Beat | None) -> bool:
    return beat is None or beat.phase not in (LEFT, FAILED)


def _verdict(culprits: list[int], are_silent: bool, heard: Mapping[int, Heard], stall_s: float) -> Verdict:
    others = [rank for rank in heard if rank not in culprits]
    lines = [f"stalled: {_listed(culprits, heard, stall_s)} (guard.stall_s = {stall_s:g})"]
    if others:
        lines.append(f"held up: {_listed(others, heard, stall_s)}")
    elif len(culprits) > 1:
        lines.append("no rank is behind the others: look at what they share (storage, network, a collective)")
    return Verdict(tuple(culprits), are_silent, "; ".join(lines))


def _listed(ranks: list[int], heard: Mapping[int, Heard], stall_s: float) -> str:
    shown = ", ".join(f"rank {rank} {_described(*heard[rank], stall_s)}" for rank in ranks[:_NUM_LISTED])
    more = len(ranks) - _NUM_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def _described(beat: Beat | None, silent_s: float, stall_s: float) -> str:
    if beat is None:
        return f"silent for {silent_s:.0f} s, since the start"
    where = f"process {beat.pid} on {beat.host}"
    if beat.phase in _ENDED:
        return f"({where}) has {_ENDED[beat.phase]}"
    place = f"step {beat.step + 1}, micro step {beat.micro_step + 1}" if beat.step >= 0 else "no step yet"
    silent = f"silent for {silent_s:.0f} s (stopped, dead or out of reach), last " if silent_s >= stall_s else ""
    return f"({where}) {silent}{_DOING[beat.phase]}, {place}, for {beat.idle_s + silent_s:.0f} s"
