"""Trackers: what is written, what a resumed run keeps, what a full disk says."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest

from mpmae.config import load_config
from mpmae.errors import ConfigError, TrainingError
from mpmae.train.track import JsonLines, Trackers, flatten, open_trackers, read_jsonl

RECORD = {"step": 3, "loss": 1.5, "losses": {"lat": 0.5, "era5": None}, "grad_norm": float("nan")}


def test_flatten_keeps_finite_numbers():
    assert flatten(RECORD) == {"step": 3, "loss": 1.5, "losses/lat": 0.5}
    probe = {"linear": 0.5, "metric": "accuracy", "num_val": 7}
    assert flatten({"step": 0, "probe": probe}) == {"step": 0, "probe/linear": 0.5, "probe/num_val": 7}


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


def test_a_run_that_starts_anew_drops_the_line_before_its_first_step(tmp_path):
    for _ in range(2):  # killed before its first checkpoint, and started again
        lines = JsonLines(tmp_path, 0)
        lines.log("metrics", {"step": 0, "probe": {"linear": 0.5}})
        lines.log("metrics", {"step": 1})
        lines.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.dropped.jsonl")] == [0, 1]


class Disk(io.FileIO):
    """A file that takes `room` more bytes, and then says `number`."""

    room, number = 30, errno.ENOSPC

    def write(self, data) -> int:
        taken = min(len(data), self.room)
        if not taken:
            raise OSError(self.number, os.strerror(self.number))
        self.room -= taken
        return super().write(data[:taken])


def test_a_full_disk_ends_nothing_and_loses_nothing(tmp_path, caplog):
    """Saves that fail do not end a run, so its lines must not either."""
    lines = JsonLines(tmp_path, 0)
    lines._files["metrics"]._file = disk = Disk(tmp_path / "metrics.jsonl", "a")
    for step in range(1, 6):
        lines.log("metrics", {"step": step, "loss": 0.25})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1, "and a torn one"
    (said,) = caplog.messages
    assert "metrics.jsonl: No space left on device; the run goes on" in said
    disk.room = 1000
    lines.log("metrics", {"step": 6})
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    disk.room = 0
    lines.log("metrics", {"step": 7})
    disk.room = 1000
    lines.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")][-1] == 7


def test_another_fault_of_the_disk_names_the_file(tmp_path):
    lines = JsonLines(tmp_path, 0)
    lines._files["metrics"]._file = disk = Disk(tmp_path / "metrics.jsonl", "a")
    disk.room, disk.number = 0, errno.EIO
    with pytest.raises(TrainingError, match=r"metrics.jsonl.*Input/output error.*--resume auto"):
        lines.log("metrics", RECORD)


def log_and_resume(tmp_path, *settings):
    """Steps 1 to 5 with validations, then again from step 3 to 6, as two launches of a run."""
    for start_step, last, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        trackers = open_trackers(load_config(None, [f"run.dir={tmp_path}", *settings]), start_step)
        for step in range(start_step + 1, last + 1):
            trackers.log("metrics", RECORD | {"step": step, "loss": loss * step})
        trackers.log("validation", {"step": last, "loss": 0.5})
        trackers.close()


def test_tensorboard_reads_back_each_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_and_resume(tmp_path, "log.tensorboard=true")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("metrics/loss")} == {1: 1, 2: 2, 3: 3, 4: 8, 5: 10, 6: 12}
    assert len(events.Scalars("metrics/loss")) == 6
    assert [e.value for e in events.Scalars("metrics/losses/lat")] == [0.5] * 6
    assert [e.step for e in events.Scalars("validation/loss")] == [6]
    assert "metrics/grad_norm" not in events.Tags()["scalars"]
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 7))


def wandb_records(path):
    """The protobuf records of a .wandb file: a header of 7 bytes, then LevelDB's log blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def wandb_history(path):
    """{step: {name: number}} and the run's facts."""
    history, run = {}, None
    for record in wandb_records(path):
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history[record.history.step.num] = items
    return history, run


def test_wandb_offline_reads_back_and_resumes_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_and_resume(tmp_path, "log.wandb=offline", "log.wandb_project=earth", "run.name=first")
    first, second = (wandb_history(path) for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")))
    identity = (tmp_path / "wandb-id.txt").read_text()
    for _, run in (first, second):
        assert (run.run_id, run.project, run.display_name) == (identity, "earth", "first")
    assert {step: items["metrics/loss"] for step, items in first[0].items()} == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}
    assert {step: items["metrics/loss"] for step, items in second[0].items()} == {4: 8, 5: 10, 6: 12}
    assert first[0][5]["validation/loss"] == 0.5
    assert first[0][1]["metrics/losses/lat"] == 0.5
    config = {item.key: json.loads(item.value_json) for item in first[1].config.update}
    assert config["log"]["wandb_project"] == "earth"


class Broken:
    def log(self, kind, record):
        raise ConnectionError("the service is gone")

    def close(self):
        raise AssertionError("is not asked any more")


def test_a_viewer_that_fails_is_dropped_and_the_run_goes_on(tmp_path, caplog):
    trackers = Trackers(JsonLines(tmp_path, 0), {"viewer": Broken()})
    for step in (1, 2):
        trackers.log("metrics", {"step": step})
    trackers.close()
    assert caplog.text.count("viewer failed and gets no more records (ConnectionError: the service is gone)") == 1
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wandb_online_without_a_login_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for key in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"log\.wandb = online: .*API key.*log\.wandb = offline"):
        open_trackers(load_config(None, [f"run.dir={tmp_path}", "log.wandb=online"]), 0)


@pytest.mark.slow
def test_wandb_online_without_its_server_goes_on_offline(tmp_path):
    """In a process of its own: wandb reads its environment once."""
    pytest.importorskip("wandb")
    code = (
        "import sys; from mpmae.config import load_config; from mpmae.train import track; track.Wandb.INIT_TIMEOUT_S = 3\n"
        "t = track.open_trackers(load_config(None, ['run.dir=' + sys.argv[1], 'log.wandb=online']), 0)\n"
        "t.log('metrics', {'step': 1, 'loss': 2.0}); t.close()"
    )
    environment = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Logging offline; `wandb sync` sends it later" in done.stderr
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert wandb_history(path)[0][1]["metrics/loss"] == 2.0
