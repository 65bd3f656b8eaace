"""Checkpoints of real engines on two ranks: what is written, and that a failing rank leaves no other one waiting."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpmae.checkpoint_format import load_meta
from mpmae.engine import files, init_world
from mpmae.errors import CheckpointError
from mpmae.train.checkpoint import Checkpoints, load_engine, write_engine
from mpmae.train.compatibility import check_compatible, checkpoint_meta
from tests.engine.spawn import run_ranks
from tests.engine.toy import Case, make_engine, run_config, train

ENGINES = {"ddp": Case("ddp"), "fsdp": Case("fsdp"), "zero1": Case("deepspeed", 1), "zero3": Case("deepspeed", 3)}


def in_ranks(folder: str) -> dict[str, list]:
    """For each engine: save, fail on rank 1's disk, fail on rank 0's, restore in a new engine and go on."""
    world = init_world("toy")
    results = {}
    for name, case in ENGINES.items():
        checkpoints = Checkpoints(Path(folder) / name, keep_last=2)
        engine = make_engine(case, world)
        train(engine, case, 0, 2)
        meta = checkpoint_meta(run_config(case), 0, 2, "f" * 64, world.world_size, engine.zero_stage)
        checkpoints.save(2, write_engine(engine), meta)
        state = engine.full_state_dict()
        expected = train(engine, case, 2, 4)["loss"]

        errors = [failing_save(checkpoints, engine, meta, failing_rank) for failing_rank in (1, 0)]
        engine.close()

        engine = make_engine(case, world)
        path = checkpoints.latest()
        notes = check_compatible(load_meta(path), run_config(case), "f" * 64, world.world_size, engine.zero_stage)
        load_engine(engine, path)
        results[name] = [state, expected, errors, notes, train(engine, case, 2, 4)["loss"]]
        engine.close()
    world.close()
    return results


def failing_save(checkpoints, engine, meta, failing_rank: int) -> str:
    original = files.os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    if engine.rank == failing_rank:
        files.os.fsync = full
    try:
        checkpoints.save(4, write_engine(engine), meta)
    except CheckpointError as error:
        return str(error)
    finally:
        files.os.fsync = original
    return "nothing was raised"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(in_ranks, 2, str(folder), folder / "processes", timeout_s=120)


@pytest.mark.parametrize("name", ENGINES)
def test_continues_from_a_checkpoint(outcome, name):
    _, ranks = outcome
    for rank in ranks:
        _, expected, _, notes, continued = rank[name]
        assert continued == expected
        assert notes == []


@pytest.mark.parametrize("name", ENGINES)
def test_model_file_is_the_whole_model(outcome, name):
    folder, ranks = outcome
    state = ranks[0][name][0]
    written = load_file(folder / name / "step-00000002" / "model.safetensors")
    assert sorted(written) == sorted(state)
    assert all(torch.equal(written[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ENGINES)
def test_full_disk_on_one_rank_is_an_error_on_both(outcome, name):
    folder, ranks = outcome
    for failing_rank in (1, 0):
        for rank in ranks:
            error = rank[name][2][1 - failing_rank]
            assert f"rank {failing_rank}: OSError" in error
            assert "No space left on device" in error
            assert f"rank {1 - failing_rank}:" not in error
    assert sorted(p.name for p in (folder / name).iterdir()) == ["latest", "step-00000002"]


def test_meta_is_readable_without_deepspeed(outcome):
    folder, _ = outcome
    meta = json.loads((folder / "zero3" / "step-00000002" / "checkpoint.json").read_text())
    assert (meta["engine"], meta["zero_stage"], meta["world_size"], meta["step"]) == ("deepspeed", 3, 2, 2)
    assert any("zero_pp_rank_1" in name for name in meta["files"])
