"""How launch/ ends when something else than a good run happens, and what the demo starts."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mpmae.train
from mpmae.engine import init_world, lost_peer_message
from mpmae.errors import ConfigError, ShardError
from mpmae.train.stopping import Stop
from tests.engine.spawn import run_ranks
from tests.train.launches import REPO, command, environment, metrics


@pytest.fixture
def ends(monkeypatch, capfd):
    """A function: launch/pretrain.py as rank `rank` in which `error` is raised; its exit status and stderr."""

    def run(error: BaseException, rank: int) -> tuple[int, str]:
        def fail(config):
            raise error

        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(mpmae.train, "pretrain", fail)
        monkeypatch.setattr(sys, "argv", ["launch/pretrain.py"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPO / "launch" / "pretrain.py"), run_name="__main__")
        return end.value.code, capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("local rank 1 has no GPU"), 2, "local rank 1 has no GPU"),
        (ShardError("torn"), 2, "torn"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
            1,
            "another rank stopped; its message says why",
        ),
        (
            torch.distributed.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."),
            1,
            "another rank stopped; its message says why",
        ),
        (
            RuntimeError(
                "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 45000ms for recv operation to complete"
            ),
            1,
            "another rank has not answered for 45 s: it hangs, or its node or the link to it is gone; see the logs of the "
            "other nodes (guard.stall_s sets the bound)",
        ),
    ],
)
def test_every_rank_says_in_one_line_why_it_ends(ends, error, status, message):
    assert ends(error, 0) == (status, f"error: {message}\n")
    assert ends(error, 1) == (status, f"error: rank 1: {message}\n")


def test_a_stopped_run_asks_to_be_queued_again(monkeypatch, capfd):
    monkeypatch.setattr(mpmae.train, "pretrain", lambda config: Stop("SIGTERM", 12))
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "launch" / "pretrain.py"), run_name="__main__")
    shown = "error: stopped by SIGTERM and saved after step 12; queue it again with --resume auto\n"
    assert (end.value.code, capfd.readouterr().err) == (75, shown)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        torch.distributed.DistBackendError("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 19000"),
        torch.distributed.DistNetworkError("The server socket has failed to listen: EADDRINUSE"),
    ],
)
def test_faults_of_this_rank_keep_their_traceback(ends, error):
    with pytest.raises(type(error), match=str(error)[:12]):
        ends(error, 1)


def sum_after_rank_1_left(_) -> bool:
    world = init_world()
    world.barrier()
    lost = True
    if world.rank == 0:
        try:
            for _ in range(100):  # the other side closes a moment later
                world.sum_over_ranks(torch.ones(1))
            lost = False
        except RuntimeError as error:
            lost = lost_peer_message(error) is not None
    world.close()
    return lost


def test_gloos_own_words_for_a_lost_peer(tmp_path):
    assert run_ranks(sum_after_rank_1_left, 2, None, tmp_path) == [True, True]


def test_ctrl_c_ends_a_run_in_one_line(tmp_path, shards_dir):
    run_dir = tmp_path / "run"
    arguments = [
        f"run.dir={run_dir}",
        f"data.shards={shards_dir}",
        "train.global_batch_size=4",
        "model.modalities_out=[biome]",
    ]
    process = subprocess.Popen(
        command("python", 1, *arguments),
        cwd=REPO,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # a shell starts background jobs with the signal ignored, which a suite run as one would pass on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not metrics(run_dir):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown == "error: interrupted\n"


@pytest.fixture(scope="module")
def demo() -> dict:
    return runpy.run_path(str(REPO / "launch" / "demo.py"))


@pytest.mark.parametrize(
    ("num_gpus", "num_ranks", "words"), [(0, 2, "CPU"), (1, 1, "one GPU"), (2, 2, "2 GPUs"), (8, 2, "2 GPUs")]
)
def test_the_demo_starts_no_rank_without_a_gpu(demo, monkeypatch, num_gpus, num_ranks, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert demo["ranks"]()[0] == num_ranks
    assert words in demo["ranks"]()[1]


def test_the_demo_says_what_resharding_costs(demo, monkeypatch, capsys, mmearth_dir, tmp_path):
    started = []
    scope = demo["shards_of"].__globals__
    monkeypatch.setitem(scope, "run", lambda *command: started.append(command))
    monkeypatch.setitem(scope, "load_manifest", lambda folder: None)
    monkeypatch.setitem(scope, "LARGE_H5_BYTES", 1e6)
    demo["shards_of"](mmearth_dir, tmp_path / "shards")
    assert "note: resharding" in capsys.readouterr().out
    assert "48 GB takes about 0.3 h (at 40 MB/s" in demo["resharding_cost"](48e9, Path("shards"))
    assert len(started) == 1
