"""A run that is asked to stop saves once, says that it is to be queued again, and goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from mpmae.config import load_config
from mpmae.durations import seconds_of
from mpmae.errors import ConfigError
from mpmae.train import loop
from mpmae.train.stopping import (
    EXIT_REQUEUE,
    REASONS,
    STOPPED_NAME,
    Stop,
    StopRequests,
    TimeLimit,
    forget_stop,
    job_age_s,
    stop_before_restart,
)
from tests.engine.spawn import run_ranks
from tests.train.launches import REPO, command, descendants, launch, launch_ok, metrics, output_of, ranks_of, running

SHORT = (
    "train.global_batch_size=4",
    "train.val_samples=1",
    "optim.warmup_steps=1",
    "data.num_workers=1",
    "model.modalities_out=[biome]",
)


@pytest.mark.parametrize(
    ("text", "seconds"), [("3:50:00", 13800), ("50:00", 3000), ("1-03:00:30", 97230), ("0:05", 5), ("100:00:00", 360000)]
)
def test_a_duration_as_slurm_writes_it(text, seconds):
    assert seconds_of(text) == seconds
    assert load_config(None, [f"guard.time_limit={text}"]).guard.time_limit == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("230", "needs quotes"),
        ("3h", "expected h:m:s"),
        ("3:60:00", "minutes 60"),
        ("1-24:00:00", "hours 24"),
        ("0:61", "seconds 61"),
        ("0:00", "no time"),
        ("-1:00", "expected h:m:s"),
    ],
)
def test_no_duration(text, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [f"guard.time_limit={text}"])


def test_a_yaml_file_that_forgot_the_quotes(tmp_path):
    (tmp_path / "run.yaml").write_text("guard:\n  time_limit: 3:50:00\n")
    with pytest.raises(ConfigError, match="in YAML it needs quotes"):
        load_config(tmp_path / "run.yaml")


def test_the_limit_leaves_room_for_step_and_save():
    now = [0.0]
    limit = TimeLimit(1000.0, num_laps=2, clock=lambda: now[0], age_s=100.0)  # so it is over at 900; the margin is 50

    def asked_at(time_s: float) -> bool:
        now[0] = time_s
        return limit.is_up()

    assert not asked_at(0)
    assert not asked_at(400), "the first lap, which compiles, does not count"
    assert not asked_at(410)
    assert not asked_at(420)
    limit.saved(100.0)
    assert not asked_at(430)
    by_num_saves = {1: 680, 2: 530}  # from 900 - 50 - 1.5 * 100 * num_saves - 2 * 10 on
    for time_s in range(440, 900, 10):
        now[0] = time_s
        found = {num_saves: limit.is_up(num_saves) for num_saves in by_num_saves}
        assert found == {num_saves: time_s >= first for num_saves, first in by_num_saves.items()}


def test_no_limit_is_never_up():
    limit = TimeLimit(None, num_laps=2, clock=lambda: 1e9, age_s=0.0)
    assert not any(limit.is_up() for _ in range(3))


def test_signals_become_votes():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests("1:00") as requests:
        assert (requests.time_limit_s, requests.votes()) == (60.0, [])
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):  # two ways for one SIGTERM
            os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while len(requests.votes()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [REASONS[vote] for vote in requests.votes()] == ["SIGTERM", "SIGUSR1"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ("SIGTERM 0, SIGTERM 4", None),  # one, by two ways
        ("SIGTERM 0, SIGTERM 6", 143),
        ("SIGUSR1 0, SIGTERM 60", None),  # it gets late, that is all
        ("SIGTERM 0, SIGUSR1 60", None),
        ("SIGUSR1 0, SIGINT 1", 130),
        ("SIGINT 0, SIGTERM 1", 143),
        ("SIGINT 0", None),
    ],
)
def test_a_second_signal_ends_at_once(monkeypatch, capsys, signals, status):
    ended_with = []
    monkeypatch.setattr(os, "_exit", ended_with.append)
    requests = StopRequests()
    for name, time_s in (each.split() for each in signals.split(", ")):
        requests._note(signal.Signals[name], float(time_s))
    assert ended_with == ([] if status is None else [status])
    assert ("ended at once" in capsys.readouterr().err) == (status is not None)


def test_it_ends_although_the_main_thread_runs_no_handler():
    code = (
        "import hashlib; from mpmae.train import stopping; stopping.REPEAT_S = 0.05\n"
        "with stopping.StopRequests():\n"
        "    print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert process.wait(timeout=10) == 143
    finally:
        process.kill()
        process.communicate()


def test_a_restarted_rank_of_a_stopped_run_stays_stopped(tmp_path, monkeypatch):
    """torchrun --max-restarts takes status 75 for a failure."""
    Stop("SIGTERM", 7).write(tmp_path)
    assert json.loads((tmp_path / STOPPED_NAME).read_text()) == {
        "reason": "signal",
        "step": 7,
        "signal": "SIGTERM",
        "requeue": True,
    }
    assert stop_before_restart(tmp_path) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert stop_before_restart(tmp_path) == Stop("SIGTERM", 7)
    os.utime(tmp_path / STOPPED_NAME, (0, 0))
    assert stop_before_restart(tmp_path) is None, "that of the job before: this one's ranks came too late the first time"
    forget_stop(tmp_path)
    assert stop_before_restart(tmp_path) is None


def test_a_job_is_as_old_as_its_launcher(monkeypatch):
    """Ranks that torchrun starts again have no more time than the job has left."""
    own = job_age_s()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    code = "import time; from mpmae.train.stopping import job_age_s; print(job_age_s())"
    child = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert float(child.stdout) >= own > 0


def stopped_late(arguments: tuple[str, list[str]]) -> list:
    """A run whose numbers come two steps late, as on a GPU, and that is asked to stop during step 2."""
    run_dir, settings = arguments

    class LateMeter(loop.Meter):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.lag = 2

    class Asked(StopRequests):
        def votes(self) -> list[int]:
            self.num_steps = getattr(self, "num_steps", 0) + 1
            return [0] if self.num_steps >= 2 else []

    with mock.patch.object(loop, "Meter", LateMeter), mock.patch.object(loop, "StopRequests", Asked):
        return list(loop.pretrain(load_config(None, [f"run.dir={run_dir}", *settings])))


def test_a_request_is_heard_before_a_save_though_numbers_come_late(shards_dir, tmp_path):
    """Else the run would save twice, for which a time limit leaves no room."""
    run_dir = tmp_path / "run"
    settings = [f"data.shards={shards_dir}", *SHORT, "train.max_steps=20", "checkpoint.every_steps=3"]
    settings.append("train.validate_every_steps=null")
    assert run_ranks(stopped_late, 1, (str(run_dir), settings), tmp_path / "processes") == [["SIGTERM", 3]]
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3]


def stopped_by(send: Callable[[subprocess.Popen], None], full: list[str], run_dir: Path) -> tuple[int, dict]:
    """The launcher's exit status, and stopped.json, of a run that is sent a signal after its first step."""
    with running(full, run_dir, 1) as process:
        ranks = ranks_of(process)
        send(process)
        status = process.wait(timeout=120)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline, output_of(run_dir).read_text()[-3000:]
            time.sleep(0.1)
    record = json.loads((run_dir / STOPPED_NAME).read_text())
    steps = [line["step"] for line in metrics(run_dir)]
    assert steps == list(range(1, record["step"] + 1))
    saved = [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()]
    assert saved == [f"step-{record['step']:08d}"], "one checkpoint, of the step after which it stopped"
    assert f"saved after step {record['step']}; queue it again" in output_of(run_dir).read_text()
    return status, record


def test_sigterm_to_torchrun_and_a_second_life(shards_dir, tmp_path):
    """As Slurm does it: to the launcher and its ranks at once, so that these get it twice."""
    run_dir = tmp_path / "run"
    settings = (f"run.dir={run_dir}", f"data.shards={shards_dir}", *SHORT)
    full = command("torchrun", 2, *settings, "train.max_steps=1000")
    _, record = stopped_by(lambda process: os.killpg(process.pid, signal.SIGTERM), full, run_dir)
    assert (record["reason"], record["signal"]) == ("signal", "SIGTERM")
    last = record["step"] + 2
    lines = launch_ok("python", 1, run_dir, *settings, f"train.max_steps={last}", "--resume", "auto")
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert not (run_dir / STOPPED_NAME).exists()


def test_the_time_limit_ends_a_run_with_status_75(shards_dir, tmp_path):
    settings = (f"run.dir={tmp_path / 'run'}", f"data.shards={shards_dir}", *SHORT, "train.max_steps=1000")
    done = launch("python", 1, *settings, "--time-limit", "0:05")
    assert done.returncode == EXIT_REQUEUE, done.stdout[-2000:]
    record = json.loads((tmp_path / "run" / STOPPED_NAME).read_text())
    assert (record["reason"], record["signal"], record["requeue"]) == ("time limit", None, True)
    assert f"stopped by time limit and saved after step {record['step']}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", ["launch", "group", "rank 1"])
def test_signals_to_deepspeed(shards_dir, tmp_path, target):
    """The launcher proper tells one rank after another; `deepspeed` itself tells nobody, so the group has to be told."""
    run_dir = tmp_path / "run"
    settings = (f"run.dir={run_dir}", f"data.shards={shards_dir}", *SHORT, "train.max_steps=1000")
    full = command("deepspeed", 2, "--ds-config", "configs/ds/zero2.json", *settings)

    def send(process: subprocess.Popen) -> None:
        if target == "group":
            os.killpg(process.pid, signal.SIGTERM)
        elif target == "launch":
            os.kill(descendants(process.pid)[0], signal.SIGTERM)
        else:
            os.kill(ranks_of(process)[1], signal.SIGUSR1)

    status, record = stopped_by(send, full, run_dir)
    assert record["signal"] == ("SIGUSR1" if target == "rank 1" else "SIGTERM")
    assert status == {"launch": 1, "group": -signal.SIGTERM, "rank 1": EXIT_REQUEUE}[target]
