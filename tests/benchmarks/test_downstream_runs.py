"""The pretraining runs of the downstream benchmark: none is used that is not what the record says."""

import json

import pytest
from rich.console import Console

from mpmae.train.stopping import Stop


@pytest.fixture
def work(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").touch()
    return tmp_path


def pretrain_all(work, steps=4):
    from downstream_runs import pretrain_all

    return pretrain_all(work / "tiles", work, 1, steps, Console(quiet=True))


def leave(folder, steps):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": {"train": {"max_steps": steps}}}))
    (folder / "validation.jsonl").write_text(json.dumps({"step": steps}) + "\n")


def test_a_run_that_was_stopped_is_not_judged(work, monkeypatch):
    import downstream_runs

    monkeypatch.setattr(downstream_runs, "pretrain", lambda config: Stop("SIGTERM", 2))
    with pytest.raises(SystemExit, match="stopped by SIGTERM after step 2; the same command goes on"):
        pretrain_all(work)


def test_finished_runs_are_taken_and_those_of_other_lengths_refused(work):
    from downstream_runs import VARIANTS, run_config

    folders = [run_config(work, variant, 0, 4).run.dir for variant in VARIANTS]
    for folder in folders:
        leave(folder, 4)
    assert list(pretrain_all(work).values()) == folders
    with pytest.raises(SystemExit, match=r"seed0 is a run of 4 steps, not 6; give another --work"):
        pretrain_all(work, steps=6)
