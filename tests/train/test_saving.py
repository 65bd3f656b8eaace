"""A run whose saves fail, or are written while it trains: real runs on two ranks, several in one start of the processes."""

import contextlib
import errno
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from mpmae.checkpoint_format import all_checkpoints, find_problems
from mpmae.checkpoint_tools.readers import open_state
from mpmae.config import load_config
from mpmae.engine import init_world
from mpmae.engine.world import hold_process_group
from mpmae.errors import CheckpointError, ConfigError
from mpmae.train import pretrain, saving
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.engine_state import load_engine, snapshot_engine
from mpmae.train.saving import Saver
from mpmae.train.setup import set_up
from tests.engine.spawn import REPO, run_ranks
from tests.engine.toy import Case, make_engine, train
from tests.train.launches import metrics

STEPS = 6
SHORT = (
    "model.img_size=16",
    "model.decoder_dim=32",
    "train.global_batch_size=4",
    "model.modalities_out=[sentinel2, biome]",
    "train.val_samples=1",
    f"train.max_steps={STEPS}",
    "optim.warmup_steps=1",
    "data.num_workers=1",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
)
BACKGROUND = "checkpoint.background=true"
RUNS = {  # further settings, and the steps at whose saves rank 1's disk is full
    "plain": ((), ()),
    "full": ((), (2, STEPS)),
    "background": ((BACKGROUND,), ()),
    "background, full": ((BACKGROUND,), (2, STEPS)),
    "fsdp in the background": ((BACKGROUND, "engine.name=fsdp"), ()),
}


@contextlib.contextmanager
def full_disk(at_steps: tuple[int, ...], rank: int):
    """On rank 1, fsync fails during the saves of some steps."""
    begin, fsync, current = Checkpoints.begin, os.fsync, [None]

    def noted_begin(self, step):
        current[0] = step
        return begin(self, step)

    def full(descriptor):
        if rank == 1 and current[0] in at_steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    with mock.patch.object(Checkpoints, "begin", noted_begin), mock.patch.object(os, "fsync", full):
        yield


def run_all(argument: tuple[str, tuple[str, ...]]) -> tuple[dict[str, str | None], dict[str, list]]:
    folder, settings = argument
    world = init_world("toy")
    hold_process_group("test")  # one start for all runs
    errors = {}
    for name, (extra, at_steps) in RUNS.items():
        config = load_config(REPO / "configs" / "run" / "demo.yaml", [*settings, *extra, f"run.dir={folder}/{name}"])
        errors[name] = None
        with full_disk(at_steps, world.rank):
            try:
                pretrain(config)
            except CheckpointError as error:
                errors[name] = str(error)
    return errors, {name: late_write(name, Path(folder) / f"late {name}", world) for name in ("ddp", "fsdp")}


def late_write(name: str, folder: Path, world) -> list:
    """The state when a save began, and as another engine reads what was written after more steps."""
    case = Case(name)
    engine = make_engine(case, world)
    train(engine, case, 0, 2)
    states = [engine.full_state_dict()]
    write = snapshot_engine(engine)
    expected = train(engine, case, 2, 4)["loss"]
    Checkpoints(folder, 1, world).save(2, write, {})
    engine.close()
    engine = make_engine(case, world)
    load_engine(engine, Checkpoints(folder, 1, world).latest())
    states.append(engine.full_state_dict())
    losses = train(engine, case, 2, 4)["loss"]
    engine.close()
    return [*states, expected, losses]


@pytest.fixture(scope="module")
def outcome(shards_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    argument = (str(folder), (f"data.shards={shards_dir}", *SHORT))
    return folder, run_ranks(run_all, 2, argument, folder / "processes")


def steps_in(run_dir: Path) -> list[int]:
    paths = all_checkpoints(run_dir / "checkpoints")
    assert [find_problems(path) for path in paths] == [[]] * len(paths)
    return [int(path.name.removeprefix("step-")) for path in paths]


@pytest.mark.parametrize("name", ["full", "background, full"])
def test_a_full_disk_does_not_end_the_run(outcome, name):
    folder, _ = outcome
    assert steps_in(folder / name) == [4]
    lines = metrics(folder / name)
    assert len(lines) == STEPS
    assert "checkpoint_failed" not in lines[1]
    assert lines[-1]["checkpoint_failed"] == 1
    assert not list((folder / name / "checkpoints").glob("*.partial"))
    log = (folder / "processes" / "rank0.log").read_text()
    assert "NO CHECKPOINT of step 2; the run goes on" in log
    assert "rank 1: OSError: [Errno 28] No space left on device" in log


@pytest.mark.parametrize("name", ["full", "background, full"])
def test_the_last_save_has_to_work(outcome, name):
    _, ranks = outcome
    for errors, _ in ranks:
        assert f"checkpoint of step {STEPS} not saved" in errors[name]
        assert "rank 1: OSError: [Errno 28] No space left on device" in errors[name]


@pytest.mark.parametrize("name", ["full", "background", "background, full"])
def test_how_it_is_saved_does_not_change_what(outcome, name):
    folder, _ = outcome
    for step in steps_in(folder / name):
        one, other = (open_state(folder / run / "checkpoints" / f"step-{step:08d}") for run in ("plain", name))
        assert one.num_updates == other.num_updates == step
        for parameter in one.shapes:
            first, second = one.read(parameter), other.read(parameter)
            assert all(torch.equal(first[part], second[part]) for part in first), parameter


def test_background_saves_are_all_there(outcome):
    folder, ranks = outcome
    for name in ("background", "fsdp in the background"):
        assert [errors[name] for errors, _ in ranks] == [None, None]
        assert steps_in(folder / name) == [2, 4, 6]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_training_on_does_not_change_what_is_written(outcome, name):
    _, ranks = outcome
    before, read, expected, losses = ranks[0][1][name]
    assert all(torch.equal(before[key], read[key]) for key in before)
    assert losses == expected


def test_a_save_in_the_background_takes_until_it_is_written(tmp_path):
    """Not as long as the loop waits for it: a time limit has to leave room for all of it."""
    took = []
    saver = Saver(mock.Mock(rank=0, world_size=1), Checkpoints(tmp_path, 2), True, took.append)
    with mock.patch.object(saving, "snapshot_engine", return_value=lambda folder: time.sleep(0.2)):
        saver.save(2, {}, is_last=False)
        assert saver.is_saving
        assert took == []
        saver.save(4, {}, is_last=True)
    assert not saver.is_saving
    assert len(took) == 2
    assert min(took) >= 0.2
    assert len(all_checkpoints(tmp_path)) == 2


def test_deepspeed_in_the_background_is_refused(shards_dir):
    keys = [f"data.shards={shards_dir}", *SHORT, BACKGROUND, "engine.name=deepspeed"]
    config = load_config(REPO / "configs" / "run" / "demo.yaml", [*keys, f"engine.ds_config={REPO}/configs/ds/zero2.json"])
    with pytest.raises(ConfigError, match="deepspeed's save is itself collective"):
        set_up(config, 2)
