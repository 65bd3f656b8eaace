"""A real run with everything on that shows it: metrics, TensorBoard, wandb, a profile, and what mpmae-runs makes of it."""

import gzip
import json
import runpy

import pytest

from mpmae.config import load_config
from mpmae.errors import ConfigError
from mpmae.runs import cli
from tests.train.launches import REPO, launch, metrics
from tests.train.test_track import wandb_history

SETTINGS = (
    "train.global_batch_size=4",
    "train.max_steps=3",
    "train.val_samples=1",
    "model.modalities_out=[biome]",
    "optim.warmup_steps=1",
    "data.num_workers=1",
    "log.tensorboard=true",
    "log.wandb=offline",
)


@pytest.fixture(scope="module")
def run(shards_dir, tmp_path_factory):
    """The folder of a finished run of three steps, and what it printed."""
    folder = tmp_path_factory.mktemp("seeing") / "run"
    done = launch("python", 1, f"run.dir={folder}", f"data.shards={shards_dir}", *SETTINGS, "--profile", "2:3")
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, done.stdout


def test_metrics_hold_rates_of_a_stated_count(run):
    folder, printed = run
    record = json.loads((folder / "run.json").read_text())
    for line in metrics(folder):
        assert line["tflops_per_rank"] == pytest.approx(record["flops_per_image"] * line["images_per_s"] / 1e12)
        assert line["gb_per_s_per_rank"] > 0
        assert line["images_per_s_per_rank"] == line["images_per_s"]
        assert {"mfu_percent", "ranks", "memory_reserved_bytes"}.isdisjoint(line)  # one rank, on a CPU
    assert record["peak_flops_per_s"] is None
    assert metrics(folder)[-1]["left_s"] == 0
    assert "step 3/3  0:00 left  loss" in printed
    assert "GFLOP/s" in printed


def test_both_trackers_have_what_the_lines_have(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = run
    losses = {line["step"]: pytest.approx(line["loss"]) for line in metrics(folder)}
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("metrics/loss")} == losses
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    history, facts = wandb_history(path)
    assert {step: items["metrics/loss"] for step, items in history.items()} == losses
    assert history[3]["validation/loss"] > 0
    assert facts.display_name == "run"


def test_the_trace_holds_the_steps_asked_for(run):
    folder, printed = run
    assert f"profile of steps 2-3: {folder}/profile/rank-*.json.gz" in printed.replace("\n", "")
    trace = json.loads(gzip.decompress((folder / "profile" / "rank-0.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert [names.count(name) for name in ("data", "forward", "backward", "optimizer")] == [2] * 4
    assert "mpmae::block" in (folder / "profile" / "rank-0.txt").read_text()


def test_mpmae_runs_reads_a_real_run(run, tmp_path, capsys):
    folder, _ = run
    assert cli.main(["list", str(folder)]) == 0
    assert cli.main(["compare", str(folder), "-o", str(tmp_path / "curves.png"), "--x", "hours"]) == 0
    out = capsys.readouterr().out
    assert "complete" in out
    assert "3 / 3" in out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_steps_that_cannot_be_traced(capsys):
    parse = runpy.run_path(str(REPO / "launch" / "pretrain.py"))["parse"]
    assert parse(["--profile", "2:3", "run.dir=x"]).profile == [2, 3]
    assert parse(["run.dir=x", "--profile"]).profile == [10, 12]
    with pytest.raises(SystemExit):
        parse(["--profile", "run.dir=x"])
    assert "'run.dir=x' is not FIRST:LAST, such as 10:12; without steps, put --profile last" in capsys.readouterr().err
    for steps in ("[5, 2]", "[0, 2]"):
        with pytest.raises(ConfigError, match=r"log.profile_steps.*expected 1 <= first <= last, such as \[10, 12\]"):
            load_config(None, [f"log.profile_steps={steps}"])
