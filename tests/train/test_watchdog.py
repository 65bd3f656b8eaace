"""A run that hangs ends, names the rank that holds it up, and leaves the stacks of all ranks."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mpmae.engine import init_world
from mpmae.engine.world import BESIDE_TRAINING
from mpmae.train.heartbeats import num_collectives
from mpmae.train.stalls import FAILED, LEFT, Beat, Heard, judge
from mpmae.train.watchdog import EXIT_STALLED
from tests.engine.spawn import run_ranks
from tests.train.launches import command, launch, output_of, ranks_of, running

STALL_S = 4
SHORT = (
    "train.global_batch_size=4",
    "train.max_steps=1000",
    "optim.warmup_steps=1",
    "data.num_workers=1",
    "model.modalities_out=[biome]",
    f"guard.stall_s={STALL_S}",
)


def heard(phase="backward", step=3, collectives=5, idle_s=0.0, silent_s=0.0, patience_s=10.0) -> Heard:
    return Heard(Beat(9, phase, step, 0, collectives, idle_s, patience_s, "node", 77), silent_s)


@pytest.mark.parametrize(
    ("ranks", "culprits", "words"),
    [
        ([heard(idle_s=9), heard("data", collectives=2, idle_s=9)], None, ""),
        (
            [heard(idle_s=11), heard("data", collectives=2, idle_s=11)],
            [1],
            "rank 1 (process 77 on node) waiting for",
        ),
        ([heard(idle_s=11), heard("data", collectives=2, idle_s=1)], None, ""),  # slow, not stalled
        ([heard(collectives=4, idle_s=11), heard(idle_s=11)], [0], "rank 0 (process 77 on node) in the backward pass"),
        ([heard(step=4, collectives=1, idle_s=11), heard(idle_s=11)], [1], "step 4"),
        ([heard(idle_s=11), heard(idle_s=11)], [0, 1], "no rank is behind the others"),
        ([heard(idle_s=5), heard(idle_s=1, silent_s=9.5)], [1], "silent for 10 s: stopped, dead or out of reach"),
        ([heard(idle_s=5), heard(idle_s=1, silent_s=9.5, patience_s=30)], None, ""),  # compiling, perhaps
        ([heard(), Heard(None, 11.0)], [1], "rank 1 silent for 11 s, since the start"),
        ([heard(idle_s=11), heard(FAILED, silent_s=99)], [1], "has ended with an error"),
        ([heard(idle_s=1), heard(FAILED, silent_s=99)], None, ""),
        ([heard(LEFT, silent_s=99), heard(LEFT, silent_s=99)], None, ""),
        ([heard("save", idle_s=50, patience_s=30)], [0], "saving"),
    ],
)
def test_who_holds_a_run_up(ranks, culprits, words):
    verdict = judge(dict(enumerate(ranks)), 10.0)
    assert (verdict and verdict.culprits) == culprits
    assert verdict is None or words in verdict.text


def test_a_thousand_ranks_fit_a_message():
    text = judge({rank: heard("data" if rank > 500 else "backward", idle_s=11) for rank in range(1000)}, 10.0).text
    assert "rank 501" in text
    assert "and 491 more" in text
    assert len(text) < 2000


def counted(_) -> list[int]:
    """Collectives counted after one in the run's group, and after one more in a group beside it."""
    world = init_world()
    beside = dist.new_group(group_desc=BESIDE_TRAINING)
    before, counts = num_collectives(), []
    for group in (None, beside):
        dist.all_reduce(torch.ones(1), group=group)
        counts.append(num_collectives() - before)
    world.close()
    return counts


def test_what_a_thread_writes_beside_a_step_puts_no_rank_ahead(tmp_path):
    assert run_ranks(counted, 2, None, tmp_path) == [[1, 1], [1, 1]]


def check_stacks(run_dir: Path, sleeper: int, function: str) -> None:
    """Of both ranks; that of the sleeping one shows where."""
    stacks = [(run_dir / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert f"in {function}" in stacks[sleeper]
    assert f"in {function}" not in stacks[1 - sleeper]


@pytest.mark.parametrize(
    ("fault", "doing", "function"),
    [
        ("sleep_in_loader 1 2", "waiting for its loader", "training"),
        pytest.param("sleep_in_forward 0 2", "in the forward pass", "patched", marks=pytest.mark.slow),
        pytest.param("sleep_in_backward 0 2", "in the backward pass", "patched", marks=pytest.mark.slow),
    ],
)
def test_a_sleeping_rank_is_named(shards_dir, tmp_path, fault, doing, function):
    run_dir = tmp_path / "run"
    done = launch("torchrun", 2, f"run.dir={run_dir}", f"data.shards={shards_dir}", *SHORT, fault=fault)
    rank = int(fault.split()[1])
    assert done.returncode == 1, "torchrun's own"
    assert f"exitcode  : {EXIT_STALLED}" in done.stdout
    assert f"error: rank {rank}: stalled: rank {rank} (" in done.stdout
    assert (
        f"{doing}, step 3, micro step 1, for {STALL_S} s (guard.stall_s = {STALL_S}); held up: rank {1 - rank} ("
        in done.stdout
    )
    check_stacks(run_dir, rank, function)


@contextmanager
def two_ranks(shards_dir, run_dir: Path, launcher: str = "torchrun", *extra: str):
    """A running run of two ranks, and the processes of these."""
    full = command(launcher, 2, *extra, f"run.dir={run_dir}", f"data.shards={shards_dir}", *SHORT)
    with running(full, run_dir, 3) as process:
        yield process, ranks_of(process)


def ended_after_s(pid: int) -> float:
    """Seconds until a process is gone, or only waits to be asked for its status."""
    started = time.monotonic()
    while time.monotonic() - started < 60:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_process_is_named(shards_dir, tmp_path, stopped):
    """It cannot speak, so the others have to tell; torchrun's agent holds the store."""
    with two_ranks(shards_dir, tmp_path / "run") as (_, ranks):
        os.kill(ranks[stopped], signal.SIGSTOP)
        assert ended_after_s(ranks[1 - stopped]) < 3 * STALL_S + STALL_S / 3 + 15
        shown = output_of(tmp_path / "run").read_text()
    assert f"error: rank {1 - stopped}: stalled: rank {stopped} (" in shown
    assert "stopped, dead or out of reach" in shown
    assert (tmp_path / "run" / "stacks" / f"rank-{1 - stopped}.txt").exists()


@pytest.mark.slow
def test_the_rank_that_holds_the_store_is_stopped(shards_dir, tmp_path):
    """Under deepspeed that is rank 0: the other one can ask nobody, and ends all the same."""
    with two_ranks(shards_dir, tmp_path / "run", "deepspeed", "--ds-config", "configs/ds/zero2.json") as (_, ranks):
        os.kill(ranks[0], signal.SIGSTOP)
        assert ended_after_s(ranks[1]) < 3 * STALL_S + STALL_S / 3 + 15
        shown = output_of(tmp_path / "run").read_text()
    assert "error: rank 1: stalled: the store at 127.0.0.1" in shown
    assert "rank 0) is stopped, dead or out of reach" in shown


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(shards_dir, tmp_path):
    with two_ranks(shards_dir, tmp_path / "run") as (process, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        shown = output_of(tmp_path / "run").read_text()
    assert "exitcode  : -9" in shown
    assert "rank      : 1" in shown
