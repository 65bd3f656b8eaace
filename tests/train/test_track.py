"""Trackers: what is written, what a resumed run keeps, what a full disk says."""

import json

import pytest

from mpmae.config import load_config
from mpmae.errors import TrainingError
from mpmae.train.track import JsonLines, flatten, open_trackers, read_jsonl

RECORD = {"step": 3, "loss": 1.5, "losses": {"lat": 0.5, "era5": None}, "grad_norm": float("nan")}


def test_flatten_keeps_finite_numbers():
    assert flatten(RECORD) == {"step": 3, "loss": 1.5, "losses/lat": 0.5}


def test_a_resumed_run_drops_the_lines_it_writes_again(tmp_path):
    lines = JsonLines(tmp_path, 0)
    for step in range(1, 6):
        lines.log("metrics", {"step": step})
    lines.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a writer killed in the middle of a line
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    lines = JsonLines(tmp_path, 3)
    lines.log("metrics", {"step": 4, "again": True})
    lines.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_full_disk_names_the_file(tmp_path):
    lines = JsonLines(tmp_path, 0)
    lines._files["metrics"].close()
    lines._files["metrics"] = open("/dev/full", "w", buffering=1)  # noqa: PTH123, SIM115
    with pytest.raises(TrainingError, match=r"metrics.jsonl.*No space left.*--resume auto"):
        lines.log("metrics", RECORD)


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = open_trackers(load_config(None, [f"run.dir={tmp_path}", "log.tensorboard=true"]), 0)
    trackers.log("metrics", RECORD)
    trackers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("metrics/losses/lat")] == [0.5]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 3


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = open_trackers(load_config(None, [f"run.dir={tmp_path}", "log.wandb=offline"]), 0)
    trackers.log("metrics", RECORD)
    trackers.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
