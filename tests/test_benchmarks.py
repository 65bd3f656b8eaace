"""Records and the pages made from them, on made-up records; nothing is measured here."""

import json
import sys

import pytest


@pytest.fixture
def benchmarks(repo, monkeypatch):
    """The benchmark scripts, importable as they import each other."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    yield
    for name in ("record", "results"):
        sys.modules.pop(name, None)


STEP = {
    "what": "training step",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "environment": {"gpu": None, "cores": 2, "python": "3.11", "packages": {"torch": "2.13.0"}},
    "case": {
        "model": "mpmae_atto", "img_size": 56, "patch_size": 8, "engine": "ddp", "precision": "fp32",
        "global_batch_size": 64, "rounds": 3, "steps": 12,
    },
}  # fmt: skip
NUMBERS = {"p20": 1.0, "median": 2.0, "p80": 3.0}


PARTS = ("data wait", "forward", "backward", "optimizer", "step", "stem", "decoder block", *(f"stage {i}" for i in range(4)))
CASES = ("1 rank, 1 thread", "1 rank, 2 threads", "2 ranks, 1 thread each")


def step_record():
    case = {"images_per_s": {"p20": 40.0, "median": 41.4, "p80": 43.0}, "ms": dict.fromkeys(PARTS, NUMBERS)}
    speedup = dict.fromkeys(CASES, 1.0)
    results = {"loader_alone_samples_per_s": 1234.5, "speedup_over_1_rank_1_thread": speedup}
    return {**STEP, "results": {**results, "cases": dict.fromkeys(CASES, case)}}


def test_the_pages_hold_the_records_numbers(benchmarks):
    import results

    record = step_record()
    assert "**41 images/s**" in results.readme_figure(record)
    assert "| 1 rank, 1 thread | 40.0 / **41.4** / 43.0 |" in results.step_section(record)
    assert results.step_plot(record).count("41 images/s") >= 3


def test_no_record_from_a_dirty_tree(benchmarks, monkeypatch, tmp_path):
    import record

    monkeypatch.setattr(record, "commit", lambda ignored: {"commit": "abc", "dirty": True})
    with pytest.raises(SystemExit, match="commit first"):
        record.write_record("x", {}, {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(record, "commit", lambda ignored: {"commit": "abc", "dirty": False})
    path = record.write_record("Some thing", {"a": 1}, {"b": 2}, tmp_path)
    assert json.loads(path.read_text())["results"] == {"b": 2}
    assert record.load_records("Some thing", tmp_path)[0]["commit"] == "abc"
    assert record.load_records("other", tmp_path) == []


def test_spread(benchmarks):
    import record

    assert record.spread([1, 2, 3, 4, 5, 6]) == {"p20": 2.0, "median": 3.5, "p80": 5.0, "repeats": 6}
