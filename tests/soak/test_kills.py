"""A run that is killed at random moments, again and again, ends as if nothing had happened: `make soak`.

About half a minute for ten kills. MPMAE_SOAK_KILLS sets how many there are in all (200), MPMAE_SOAK_SEED which.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mpmae.checkpoint_format import all_checkpoints, find_problems, step_of
from tests.train.launches import REPO, TIMEOUT_S, command, descendants, environment, kill_tree, launch_ok, metrics

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

NUM_KILLS = int(os.environ.get("MPMAE_SOAK_KILLS", "200"))
SEED = int(os.environ.get("MPMAE_SOAK_SEED", "0"))
STEPS_PER_KILL = 6  # more than a life of the run gets done, so that it does not complete before its time
MAX_START_S = 6.0
COMPLETE = "complete"
COMMON = (
    "model.name=mpmae_atto",
    "model.modalities_out=[sentinel2, biome]",
    "train.global_batch_size=4",
    "train.epochs=1000000",
    "train.val_samples=2",
    "optim.lr=1e-3",
    "optim.warmup_steps=5",
    "data.num_workers=1",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=2",
)
ENGINES = {
    "ddp": (0.5, "torchrun", ()),
    "ddp in background": (0.2, "torchrun", ("checkpoint.background=true",)),
    "zero2": (0.15, "deepspeed", ("--ds-config", "configs/ds/zero2.json")),
    "fsdp": (0.15, "torchrun", ("engine.name=fsdp",)),
}


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that is whole; 0 before the first."""
    whole = [step_of(path) for path in all_checkpoints(run_dir / "checkpoints") if not find_problems(path)]
    return max(whole, default=0)


def last_step(run_dir: Path) -> int:
    lines = metrics(run_dir)
    return lines[-1]["step"] if lines else 0


def launched_at(run_dir: Path) -> int:
    """Changes when a launch has gone back to its checkpoint and begins to train; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def live_and_die(draw: random.Random, arguments: list[str], run_dir: Path) -> str:
    """Start the run, and kill a rank or everything while it starts, trains or saves; how it went, in words."""
    while_starting = draw.random() < 0.2
    delay_s = draw.uniform(0, MAX_START_S if while_starting else 0.6)
    wanted = newest_step(run_dir) + draw.randrange(1, STEPS_PER_KILL)
    before = launched_at(run_dir)
    with (run_dir.parent / "killed.log").open("w") as log:
        process = subprocess.Popen(arguments, cwd=REPO, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not while_starting and not (launched_at(run_dir) != before and last_step(run_dir) >= wanted):
            if process.poll() == 0:
                return COMPLETE
            assert process.poll() is None, (run_dir.parent / "killed.log").read_text()[-4000:]
            assert time.monotonic() < deadline, (run_dir.parent / "killed.log").read_text()[-4000:]
            time.sleep(0.01)
        time.sleep(delay_s)
        if process.poll() == 0:
            return COMPLETE
        ranks = descendants(process.pid)
        if ranks and draw.random() < 0.3:
            victim = draw.choice(ranks)
            os.kill(victim, signal.SIGKILL)
            process.wait(timeout=TIMEOUT_S)  # whatever is left has to notice
            return f"one process of {len(ranks)}"
        return "everything"
    finally:
        kill_tree(process.pid)
        process.wait()


@pytest.mark.parametrize("engine", list(ENGINES))
def test_killed_again_and_again(engine, shards_dir, tmp_path):
    share, launcher, extra = ENGINES[engine]
    num_kills = max(1, round(share * NUM_KILLS))
    steps = num_kills * STEPS_PER_KILL
    settings = (f"data.shards={shards_dir}", *COMMON, f"train.max_steps={steps}", *extra)
    expected = launch_ok(launcher, 2, tmp_path / "whole", *settings)

    draw, run_dir, kept = random.Random(f"{SEED} {engine}"), tmp_path / "run", 0
    for kill in range(num_kills):
        arguments = command(launcher, 2, f"run.dir={run_dir}", *settings, "--resume", "auto")
        how = live_and_die(draw, arguments, run_dir)
        if how == COMPLETE:
            assert kill >= 0.8 * num_kills, "the run is over before its time: raise STEPS_PER_KILL"
            break
        now = newest_step(run_dir)
        print(f"{engine}: kill {kill + 1} of {num_kills} ({how}), checkpoint of step {now}", flush=True)
        assert now >= kept, "a checkpoint was lost"
        kept = now
    resumed = launch_ok(launcher, 2, run_dir, *settings, "--resume", "auto")

    assert [line["step"] for line in resumed] == list(range(1, steps + 1))
    for key in ("loss", "losses", "grad_norm"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    final = [
        load_file(folder / "checkpoints" / f"step-{steps:08d}" / "model.safetensors")
        for folder in (tmp_path / "whole", run_dir)
    ]
    assert all((final[0][name] == tensor).all() for name, tensor in final[1].items())
