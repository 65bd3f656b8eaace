import errno
import json
import logging
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from mpmae.checkpoint_format import find_problems, load_meta
from mpmae.config import validate
from mpmae.errors import CheckpointError
from mpmae.train import checkpoint as module
from mpmae.train import engine_state
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.compatibility import check_compatible, checkpoint_meta


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the code under test may run."""


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "state.bin").write_text(text)
        (folder / "model.safetensors").write_text(text * 2)

    return write


def save(folder: Path, step: int, keep_last: int = 3) -> Path:
    return Checkpoints(folder, keep_last).save(step, writer(f"step {step}"), {"epoch": 1})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_saved_checkpoint_is_complete(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 20)
    assert path.name == "step-00000020"
    assert Checkpoints(path.parent, 3).latest() == path
    assert (path.parent / "latest").read_text() == "step-00000020\n"
    assert names(path.parent) == ["latest", "step-00000020"]
    meta = load_meta(path)
    assert meta["step"] == 20
    assert meta["epoch"] == 1
    assert meta["files"] == {"engine/state.bin": 7, "model.safetensors": 14}


def test_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "absent", 3).latest() is None
    assert Checkpoints(tmp_path, 3).latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_meta(tmp_path / "step-00000001")


def test_keeps_the_newest(tmp_path):
    for step in (9, 10, 100, 1000):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["latest", "step-00000100", "step-00001000"]
    save(tmp_path, 1001, keep_last=1)
    assert names(tmp_path) == ["latest", "step-00001001"]


def test_removes_what_a_crash_left(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "step-00000020.partial" / "engine").mkdir(parents=True)
    assert Checkpoints(tmp_path, 3).latest().name == "step-00000010"
    save(tmp_path, 30)
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000030"]


def test_a_run_resumed_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=5)
    Checkpoints(tmp_path, 2).save(20, writer("another branch"), {})
    assert Checkpoints(tmp_path, 2).latest() == tmp_path / "step-00000020"
    assert "another branch" in (tmp_path / "step-00000020" / "model.safetensors").read_text()
    kept = ["step-00000010", "step-00000020", "step-00000020.abandoned", "step-00000030.abandoned"]
    assert names(tmp_path) == ["latest", *kept]


def test_what_was_set_aside_does_not_pile_up(tmp_path):
    for step in range(10, 60, 10):
        save(tmp_path, step, keep_last=9)
    save(tmp_path, 5, keep_last=2)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000040.abandoned", "step-00000050.abandoned"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "engine" / "state.bin").unlink(), "engine/state.bin is absent"),
        (lambda path: (path / "model.safetensors").write_text("x"), "model.safetensors has 1 bytes, expected 14"),
        (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json is absent"),
        (lambda path: (path / "checkpoint.json").write_text('{"step": 20'), "checkpoint.json is absent or unreadable"),
    ],
)
def test_torn_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage, reason):
    save(tmp_path, 10)
    torn = save(tmp_path, 20)
    damage(torn)
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(tmp_path, 3).latest() == tmp_path / "step-00000010"
    assert str(torn) in caplog.text
    assert reason in caplog.text
    with pytest.raises(CheckpointError, match="torn"):
        load_meta(torn)


def test_newer_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    meta = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(meta | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        load_meta(path)


class FailingAt:
    """Raises `error` at the n-th call, over all patched functions together; counts in any case."""

    def __init__(self, monkeypatch, n: int, error: BaseException):
        self.num_calls = 0
        for owner, name in [
            (os, "fsync"),
            (os, "rename"),
            (os, "replace"),
            (os, "mkdir"),
            (os, "open"),
            (os, "unlink"),
            (shutil, "rmtree"),
            (Path, "mkdir"),
            (Path, "open"),
            (Path, "rename"),
            (Path, "replace"),
            (module, "sync"),
            (module, "write_synced"),
        ]:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name), n, error))

    def wrap(self, function, n, error):
        def wrapped(*args, **kwargs):
            self.num_calls += 1
            if self.num_calls == n:
                raise error
            return function(*args, **kwargs)

        return wrapped


def count_calls(tmp_path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "count").mkdir()
        save(tmp_path / "count", 10, keep_last=1)
        counter = FailingAt(patch, -1, KilledError())
        save(tmp_path / "count", 20, keep_last=1)
        return counter.num_calls


def test_killed_at_every_step_of_a_save(tmp_path):
    num_calls = count_calls(tmp_path)
    assert num_calls > 20
    outcomes = []
    for n in range(1, num_calls + 1):
        folder = tmp_path / str(n)
        save(folder, 10, keep_last=1)
        with pytest.MonkeyPatch.context() as patch:
            FailingAt(patch, n, KilledError())
            with pytest.raises(KilledError):
                save(folder, 20, keep_last=1)
        found = Checkpoints(folder, 1).latest()
        assert found is not None, f"nothing left after a kill at call {n}"
        assert find_problems(found) == []
        assert (folder / (folder / "latest").read_text().strip()).exists() or found.name == "step-00000020"
        outcomes.append(found.name)
        save(folder, 30, keep_last=1)
        assert names(folder) == ["latest", "step-00000030"]
    assert outcomes == sorted(outcomes), "once there, the new checkpoint has to stay"
    assert set(outcomes) == {"step-00000010", "step-00000020"}


def test_disk_full_at_every_step_of_a_save(tmp_path):
    num_calls = count_calls(tmp_path)
    num_refused = 0
    for n in range(1, num_calls + 1):
        folder = tmp_path / str(n)
        save(folder, 10, keep_last=1)
        expected, refusal = "step-00000020", None
        with pytest.MonkeyPatch.context() as patch:
            FailingAt(patch, n, OSError(errno.ENOSPC, "No space left on device"))
            try:
                save(folder, 20, keep_last=1)
            except CheckpointError as error:
                refusal = str(error)
        if refusal is not None:
            num_refused += 1
            assert "No space left on device" in refusal
            assert str(folder) in refusal
            assert "step-00000020.partial" not in names(folder)
            if "step-00000020" not in names(folder):  # there if only the fsync after the rename failed
                expected = "step-00000010"
        found = Checkpoints(folder, 1).latest()
        assert found.name == expected
        assert find_problems(found) == []
        save(folder, 30, keep_last=1)
        assert names(folder) == ["latest", "step-00000030"]
    assert num_refused > 10


def test_trouble_after_the_commit_is_a_warning(tmp_path, caplog, monkeypatch):
    save(tmp_path, 10, keep_last=1)

    def refuse(path):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 20, keep_last=1)
    assert "step-00000020 is saved, but" in caplog.text
    assert "Permission denied" in caplog.text
    assert Checkpoints(tmp_path, 1).latest().name == "step-00000020"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_real_full_disk(tmp_path):
    save(tmp_path, 10)

    def write(folder: Path) -> None:
        (folder / "small").write_text("fits")
        with Path("/dev/full").open("wb") as file:
            torch.save({"weight": torch.zeros(10_000)}, file)

    with pytest.raises(CheckpointError, match="No space left on device"):
        Checkpoints(tmp_path, 3).save(20, write, {})
    assert names(tmp_path) == ["latest", "step-00000010"]


def test_a_lost_mount_is_an_error_of_the_checkpoint(tmp_path, monkeypatch):
    def lost(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    save(tmp_path, 10)
    for owner, name in ((os, "stat"), (os, "statvfs"), (shutil, "disk_usage")):
        monkeypatch.setattr(owner, name, lost)
    with pytest.raises(CheckpointError, match=r"not saved .*Stale file handle.*: rank 0: OSError"):
        Checkpoints(tmp_path, 3).save(20, lambda folder: lost(), {})
    monkeypatch.undo()
    assert Checkpoints(tmp_path, 3).latest().name == "step-00000010"


def test_error_in_the_writer_is_not_hidden(tmp_path):
    def write(folder: Path) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(CheckpointError, match="ZeroDivisionError: a bug") as caught:
        Checkpoints(tmp_path, 3).save(20, write, {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("by", "is_alike"), [("ddp", True), ("deepspeed", False)])
def test_a_checkpoint_of_before_layouts_is_loaded_by_its_own_engine(tmp_path, monkeypatch, by, is_alike):
    path = Checkpoints(tmp_path, 1).save(10, writer("early"), {"engine": by})
    engine = mock.Mock(layout={"engine": "ddp"})
    monkeypatch.setattr(engine_state, "_open_on_all", lambda *_: "state")
    notes = engine_state.load_engine(engine, path)
    assert bool(engine.load.called) == is_alike == (notes == [])
    assert bool(engine.load_portable.called) == (not is_alike)


def config_of(**changes):
    return validate(changes, "test")


def meta_of(config, world_size=2, zero_stage=None, shards="a" * 64):
    return json.loads(json.dumps(checkpoint_meta(config, 3, 17, shards, world_size, zero_stage, note="kept")))


def test_same_run_continues():
    config = config_of()
    meta = meta_of(config)
    assert meta["note"] == "kept"
    assert (meta["epoch"], meta["batch_index"]) == (3, 17)
    assert check_compatible(meta, config, "a" * 64, 2) == []


def test_a_key_that_the_checkpoint_does_not_know_yet_was_its_default():
    meta = meta_of(config_of())
    del meta["config"]["model"]["encoder"]
    assert check_compatible(meta, config_of(), "a" * 64, 2) == []
    with pytest.raises(CheckpointError, match=r"model\.encoder: 'sparse' in the checkpoint, 'dense' now"):
        check_compatible(meta, config_of(model={"encoder": "dense"}), "a" * 64, 2)


CACHES = {"cache_dir": "x", "cache_size_gb": 3, "storage_options": {"anon": True}, "host_cache_gb": 1, "device_cache_gb": 1}


def test_harmless_differences_are_notes():
    meta = meta_of(config_of())
    config = config_of(
        train={"epochs": 300},
        optim={"lr": 0.01},
        run={"dir": "elsewhere"},
        model={"init": "reference"},
        data={"shards": "s3://moved", "num_workers": 7, "prefetch": 2, "loader": "dali", **CACHES},
    )
    notes = check_compatible(meta, config, "a" * 64, 4)
    assert len(notes) == 3
    assert any("train.epochs: 200 in the checkpoint, 300 now" in note for note in notes)
    assert any("optim.lr" in note for note in notes)
    assert any("world size 2 in the checkpoint, 4 now" in note for note in notes)


def test_all_forbidden_differences_at_once():
    meta = meta_of(config_of())
    config = config_of(
        model={"name": "mpmae_tiny", "modalities_out": ["sentinel2"]},
        train={"global_batch_size": 512, "seed": 1},
        data={"train_split": "other"},
    )
    with pytest.raises(CheckpointError) as caught:
        check_compatible(meta, config, "b" * 64, 2, 2)
    text = str(caught.value)
    for expected in (
        "model.name: 'mpmae_atto' in the checkpoint, 'mpmae_tiny' now",
        "model.modalities_out",
        "train.global_batch_size",
        "train.seed",
        "data.train_split",
        "aaaaaaaaaaaa",
        "bbbbbbbbbbbb",
    ):
        assert expected in text
    assert len(caught.value.problems) == 7


def test_the_order_must_not_change():
    """Another mode or window would give other global batches from here on."""
    window = config_of(data={"order": "window", "window_shards": 16})
    assert check_compatible(meta_of(window), window, "a" * 64, 2) == []
    with pytest.raises(CheckpointError) as caught:
        check_compatible(meta_of(config_of()), window, "a" * 64, 2)
    assert "data.order: 'exact' in the checkpoint, 'window' now" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"data.window_shards: 16 in the checkpoint, 8 now"):
        check_compatible(meta_of(window), config_of(data={"order": "window", "window_shards": 8}), "a" * 64, 2)
    before = meta_of(config_of())
    for key in ("order", "window_shards"):  # written by a version that knew one order only
        del before["config"]["data"][key]
    assert check_compatible(before, config_of(), "a" * 64, 2) == []
    with pytest.raises(CheckpointError, match=r"data.order: 'exact' in the checkpoint"):
        check_compatible(before, window, "a" * 64, 2)


def test_engine_stage_world_size_and_precision_are_free():
    meta = meta_of(config_of(engine={"name": "deepspeed"}), world_size=2, zero_stage=2)
    assert check_compatible(meta, config_of(engine={"name": "deepspeed"}), "a" * 64, 2, 2) == []
    for name, stage in (("deepspeed", 3), ("ddp", None), ("fsdp", None)):
        assert check_compatible(meta, config_of(engine={"name": name}), "a" * 64, 2, stage) == []
    notes = check_compatible(meta, config_of(engine={"name": "fsdp"}, train={"precision": "bf16"}), "a" * 64, 3, None)
    assert len(notes) == 2
    assert "train.precision: 'fp32' in the checkpoint, 'bf16' now: the losses go on to within about 0.005" in notes[0]
    assert "world size 2 in the checkpoint, 3 now" in notes[1]
    assert "1e-05" in notes[1]


def test_shards_that_differ_are_named():
    before = {"train": {"a.tar": "1", "b.tar": "2", **{f"n{i}.tar": "0" for i in range(9)}}, "val": {"v.tar": "3"}}
    now = {"train": {"a.tar": "1", "b.tar": "9", "c.tar": "4"}, "val": {"v.tar": "3"}}
    meta = meta_of(config_of()) | {"shards": before}
    with pytest.raises(CheckpointError) as caught:
        check_compatible(meta, config_of(), "b" * 64, 2, None, now)
    text = str(caught.value)
    assert "changed train/b.tar; gone train/n0.tar, train/n1.tar" in text
    assert ", ... (9); new train/c.tar;" in text
    for same, words in ((before, "modality tables are not"), (None, "does not name them")):
        with pytest.raises(CheckpointError, match=words):
            check_compatible(meta, config_of(), "b" * 64, 2, None, same)


def test_another_family_of_models_is_one_difference():
    meta = meta_of(config_of(model={"name": "multimae_tiny"}))
    assert check_compatible(meta, config_of(model={"name": "multimae_tiny"}), "a" * 64, 2) == []
    with pytest.raises(CheckpointError, match=r"model\.name: 'multimae_tiny' in the checkpoint, 'mpmae_atto' now") as caught:
        check_compatible(meta, config_of(), "a" * 64, 2)
    assert not any("absent" in problem for problem in caught.value.problems)


def test_a_key_of_multimae_that_the_checkpoint_does_not_know_yet_was_its_default():
    config = config_of(model={"name": "multimae_base"})
    meta = meta_of(config)
    del meta["config"]["model"]["decoder_dim"]
    assert check_compatible(meta, config, "a" * 64, 2) == []
