"""Every engine on this machine: images/s and peak memory per rank, for each size of the model at one and two ranks.

python benchmarks/engines.py                      (writes a record; about 10 minutes on two idle cores)
python benchmarks/engines.py --no-record --quick  (a smoke test: figures of no worth)
python benchmarks/engines.py --only base          (the cases whose name holds this; no record)

Each case is a fresh group of processes, one thread each, on synthetic batches in float32. The engines of a size and number
of ranks follow each other in every round, so that a noisy spell does not fall on one alone; base and large have one round.
Memory is the peak during the timed steps, of what the process holds over what it held before the model was made.
"""

import argparse
import ctypes
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from engine_cases import ENGINES, Case, absent, make_batch, make_engine, make_model, timed_step
from ranks import preload, run_ranks
from record import clean_commit, spread, write_record
from results_engines import table

from mpmae.engine import World, init_world

WHAT = "engines"
STATE_BYTES, PROCESS_BYTES = 24, 1.5e9  # a parameter (float32, DeepSpeed's copies included) and a process, generously


@dataclass(frozen=True)
class Turn:
    """A case, in how many rounds it takes part, and how many steps of it are timed in each, after the warm-up."""

    case: Case
    num_parameters: int
    rounds: int
    steps: int
    warmup_steps: int = 1


SIZES = {  # size: parameters in millions, micro batch, rounds, steps a round; making a large model takes most of its time
    "atto": (8, 4, 2, 4),
    "nano": (19, 2, 2, 3),
    "tiny": (32, 2, 2, 3),
    "base": (92, 1, 1, 4),
    "large": (201, 1, 1, 3),
}
CHECKPOINTED = Case("tiny", "ddp", 1, 8)


def planned(quick: bool) -> list[Turn]:
    """All turns of a round in their order."""
    turns = []
    for size, (millions, micro_batch, rounds, steps) in SIZES.items():
        for num_ranks in (1, 2):
            for engine in ENGINES:
                case = Case(size, engine, num_ranks, micro_batch)
                turns.append(Turn(case, millions * 10**6, rounds, steps))
    for activation_checkpointing in (False, True):
        case = replace(CHECKPOINTED, activation_checkpointing=activation_checkpointing)
        turns.append(Turn(case, SIZES[case.model][0] * 10**6, rounds=2, steps=2))
    if quick:
        turns = [replace(turn, rounds=1, steps=1, warmup_steps=0) for turn in turns if turn.case.model == "atto"]
        turns = [turn for turn in turns if turn.case.engine in ("ddp", "zero2") and turn.case.num_ranks == 2]
    return turns


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM, its peak, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def held_bytes(device: torch.device) -> int:
    """What this rank holds on its device now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Begin a new peak. On a CPU what was freed goes back to the system first, or it would count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most that this rank held since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def measure(turn: Turn) -> dict[str, Any]:
    """On each rank: seconds of each step by phase, and bytes: before the model, after the warm-up, peak of the steps."""
    world: World = init_world(WHAT)
    before = held_bytes(world.device)
    model = make_model(turn.case)
    engine = make_engine(turn.case, world, model)
    batch, visible = make_batch(model, turn.case.micro_batch, world)
    for _ in range(turn.warmup_steps):
        timed_step(engine, batch, visible)
    reset_peak(world.device)
    settled = held_bytes(world.device)
    steps = [timed_step(engine, batch, visible) for _ in range(turn.steps)]
    memory = {"before": before, "settled": settled - before, "peak": peak_bytes(world.device) - before}
    engine.close()
    world.close()
    return {"steps": steps, "memory": memory}


def available_bytes() -> int:
    """Memory that processes can still take on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def left_out(turn: Turn) -> str | None:
    """Why a turn is not taken; None if it is."""
    needed = turn.case.num_ranks * (STATE_BYTES * turn.num_parameters + PROCESS_BYTES)
    if (reason := absent(turn.case)) is not None:
        return reason
    if needed > (available := available_bytes()):
        return f"needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} are free"
    return None


def summarise(case: Case, rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A case's entry in the record: each step as long as its slowest rank, each memory that of the rank with most."""
    slowest = [max(ranks, key=sum) for run in rounds for ranks in zip(*(rank["steps"] for rank in run), strict=True)]
    num_images = case.num_ranks * case.micro_batch
    phases = zip(("forward", "backward", "update"), zip(*slowest, strict=True), strict=True)
    memory = {key: max(rank["memory"][key] for run in rounds for rank in run) for key in ("before", "settled", "peak")}
    return {
        **asdict(case),
        "images_per_s": spread([num_images / sum(step) for step in slowest]),
        "ms": {name: spread([1e3 * s for s in seconds]) for name, seconds in phases},
        "memory_bytes": memory,
    }


def main() -> None:
    """Take all turns of all rounds and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two engines of the smallest model, one step; no record")
    parser.add_argument("--only", default="", help="cases whose name holds this; no record")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    with_record = not (options.no_record or options.quick or options.only)
    if with_record:
        clean_commit()
    preload("deepspeed")
    started = time.monotonic()
    turns = [turn for turn in planned(options.quick) if options.only in turn.case.name]
    runs: dict[Case, list[list[dict[str, Any]]]] = {}
    missing: dict[str, str] = {}
    for number in range(max((turn.rounds for turn in turns), default=0)):
        for turn in (turn for turn in turns if number < turn.rounds):
            if (reason := left_out(turn)) is not None:
                missing[turn.case.name] = reason
                continue
            begun = time.monotonic()
            runs.setdefault(turn.case, []).append(run_ranks(measure, turn.case.num_ranks, turn))
            print(f"round {number + 1}: {turn.case.name}: {time.monotonic() - begun:.1f} s", flush=True)
    results = {
        "cases": {case.name: summarise(case, rounds) for case, rounds in runs.items()},
        "left_out": {name: reason for name, reason in missing.items() if name not in {case.name for case in runs}},
    }
    print("\n".join(table(results)))
    if with_record:
        case = {"precision": "fp32", "img_size": 56, "patch_size": 8, "threads_per_rank": 1}
        case |= {"duration_s": time.monotonic() - started}
        print(f"record: {write_record(WHAT, case, results)}")


if __name__ == "__main__":
    main()
