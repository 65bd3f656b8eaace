"""The run folder: one run at a time, never another run's, nothing lost when a run goes back."""

import json
import subprocess
import sys

import pytest

from tests.train.launches import REPO, environment, launch, launch_ok, metrics

SHORT = (
    "model.img_size=32",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "data.num_workers=1",
    "checkpoint.every_steps=1",
)
CHEAP = ("model.modalities_out=[sentinel2, biome]", "train.val_samples=1", "train.max_steps=3")


@pytest.fixture(scope="module")
def settings(shards_dir):
    return (f"data.shards={shards_dir}", *SHORT, *CHEAP)


@pytest.fixture(scope="module")
def run_dir(settings, tmp_path_factory):
    """A finished run of three steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("three") / "run"
    launch_ok("python", 1, folder, *settings)
    return folder


def test_another_run_in_the_folder_is_refused(settings, tmp_path):
    hold = (
        "import fcntl, os, sys, time; os.makedirs(sys.argv[1]); "
        "lock = open(sys.argv[1] + '/.lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    run_dir = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(run_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        done = launch("python", 1, f"run.dir={run_dir}", *settings)
    finally:
        holder.kill()
        holder.wait()
    assert done.returncode == 2
    assert f"run.dir = {run_dir} is in use by another run" in done.stdout
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    for where in ("file", "file/run"):
        done = launch("python", 1, f"run.dir={tmp_path / where}", *settings)
        assert done.returncode == 2
        assert f"run.dir = {tmp_path / where} cannot be written" in done.stdout
        assert "Traceback" not in done.stdout


def test_a_finished_run_is_left_as_it_is(run_dir, settings):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    done = launch("python", 1, f"run.dir={run_dir}", *settings, "--resume", "auto")
    assert done.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_an_older_checkpoint_of_another_run_needs_a_folder_of_its_own(run_dir, settings, tmp_path):
    start = run_dir / "checkpoints" / "step-00000002"
    done = launch("python", 1, f"run.dir={run_dir.parent}", *settings, "--resume", str(start))
    assert done.returncode == 2
    assert "is not empty; to start from" in done.stdout
    lines = launch_ok("python", 1, tmp_path / "run", *settings, "--resume", str(start))
    assert [line["step"] for line in lines] == [3]


def test_going_back_keeps_what_came_later(settings, tmp_path):
    run_dir = tmp_path / "run"
    whole = launch_ok("python", 1, run_dir, *settings)
    again = launch_ok("python", 1, run_dir, *settings, "--resume", str(run_dir / "checkpoints" / "step-00000002"))
    assert [line["step"] for line in again] == [1, 2, 3]
    assert again[2]["loss"] == whole[2]["loss"]
    dropped = [json.loads(line) for line in (run_dir / "metrics.dropped.jsonl").read_text().splitlines()]
    assert dropped == whole[2:]
    assert (run_dir / "checkpoints" / "step-00000003.abandoned").is_dir()
    assert (run_dir / "run-until-step-00000002.json").is_file()
    assert metrics(run_dir) == again


def test_dry_run_refuses_what_the_run_would(run_dir, settings):
    full = [sys.executable, "launch/pretrain.py", "--dry-run", *settings]
    for extra, words in (
        (f"run.dir={run_dir}", "is not empty"),
        ("engine.cpu_offload=true", "engine.name = ddp does not have: use engine.name=fsdp"),
        ("model.img_size=112", "larger than the tiles"),
        ("data.val_split=absent", "no split 'absent'"),
    ):
        done = subprocess.run([*full, extra], cwd=REPO, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stdout
        assert words in done.stderr
