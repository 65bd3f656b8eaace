"""Records and the pages made from them, on made-up records; nothing is measured here."""

import json
import sys

import pytest


@pytest.fixture
def benchmarks(repo, monkeypatch):
    """The benchmark scripts, importable as they import each other."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    yield
    for path in (repo / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


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


def init_runs(losses):
    """Finished runs with these relative losses, {init: {peak rate: by seed}}."""
    point = {"relative_pixel": 0.5, "relative_total": 0.5, "by_modality": {"sentinel2": 0.5, "biome": 0.25}}
    return [
        {
            "init": init, "lr": lr, "seed": seed, "max_grad_norm": 3.0, "images_per_s": 20.0,
            "training": {"step": [1, 2], "loss": [9.0, 8.0]},
            "validation": [{"step": step, "relative": loss, **point} for step in (1, 2)],
        }
        for init, rates in losses.items() for lr, seeds in rates.items() for seed, loss in enumerate(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize(("ours", "no_worse"), [([0.6, 0.7], True), ([0.9, 1.0], True), ([1.1, 1.2], False)])
def test_each_init_is_judged_at_its_better_rate(benchmarks, ours, no_worse):
    import init
    import results

    runs = init_runs({"reference": {5e-4: [0.8, 1.0], 1.5e-4: [2.0, 2.0]}, "convnextv2": {5e-4: [3.0, 3.0], 1.5e-4: ours}})
    summary = init.summarise(runs)
    assert summary["best_lr"] == {"reference": "0.0005", "convnextv2": "0.00015"}
    assert summary["convnextv2_no_worse"] is no_worse
    case = STEP["case"] | {"seeds": [0, 1], "note": "A note.", "shards": {"name": "tiles"}}
    case |= {"global_batch_size": 16, "steps": 2, "num_samples": {"train": 7, "val": 3}}
    record = {**STEP, "case": case, "results": summary | {"runs": runs}}
    section = results.init_section(record)
    assert "| reference | 0.0005 | **0.900 ± 0.141** | 0.800, 1.000 | 0.500 | 0.500 | 3 |" in section
    assert ("trains no worse than" if no_worse else "trains worse than") in section
    assert "training loss" in results.init_plot(record)


def test_an_outcome_is_read_from_the_runs_folder(benchmarks, tmp_path):
    import init

    from mpmae.config import validate

    config = validate({"run": {"dir": str(tmp_path)}, "optim": {"lr": 1e-3}, "train": {"max_steps": 20}}, "test")
    losses = {"sentinel2": 0.5, "biome": 3.0, "era5": None}
    lines = [{"step": n + 1, "loss": float(n), "grad_norm": n, "images_per_s": 1.0} for n in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validation = {"step": 20, "losses": losses, "trivial": {"sentinel2": 1.0, "biome": 2.0, "era5": None}}
    assert not init.finished(config)
    (tmp_path / "validation.jsonl").write_text(json.dumps(validation) + "\n")
    assert init.finished(config)
    (point,) = init.outcome(config)["validation"]
    assert point["by_modality"] == {"sentinel2": 0.5, "biome": 1.5}
    assert (point["relative"], point["relative_pixel"]) == (1.0, 0.5)
    assert point["relative_total"] == pytest.approx(3.5 / 3)


@pytest.fixture
def loader_work(benchmarks, mmearth_dir, tmp_path):
    """A loader benchmark's files over tiny tiles, twice over."""
    from loader_work import Work

    return Work(mmearth_dir, tmp_path, repeats=2, batch_size=16, img_size_px=56)


def test_the_loader_benchmark_from_tiles_to_page(loader_work):
    import loader
    import results_loader
    from loader_cases import RAW

    turns = loader.Turns(loader_work, scratch="")
    result = turns.take(RAW, num_workers=[1], seconds=0.05)
    assert loader_work.num_tiles == 120
    assert result["process_to_first_batch_s"] > result["open_to_first_batch_s"] > 0
    samples = {key: [result[key]] for key in ("process_to_first_batch_s", "open_to_first_batch_s")}
    entry = loader.summary(RAW, samples | {"1": [1234.4]}, loader_work, written_bytes=120_000, tile_bytes=10**6)
    assert result["samples_per_s"]["1"] > 0
    assert entry["decoded_mb_per_s"]["1"]["median"] == 1234.4
    case = {
        "command": "make bench-peers", "source": "tiles", "num_tiles": 120, "repeats": 2, "tile_size_px": 64, "rounds": 1,
        "img_size_px": 56, "batch_size": 16, "modalities": ["era5"], "decoded_bytes_per_tile": 10**6, "transform": "crop",
        "page_cache": "warm", "seconds": 0.05, "gate": "equal", "packages": {"litdata": None, "h5py": "3"},
    }  # fmt: skip
    results = {
        "cases": {RAW.name: entry | {"first_process_to_first_batch_s": 9.0}},
        "left_out": {"litdata, raw": ["litdata"]},
        "limits": dict.fromkeys(results_loader.LIMITS, NUMBERS),
    }
    record = {**STEP, "case": case, "results": results}
    page = results_loader.section(record)
    assert "| **mpmae cpu, raw** | 1,234 / **1,234** / 1,234 | 1,234 |" in page
    assert "Left out: litdata, raw (litdata not installed)." in page
    assert "1,234" in results_loader.plot(record)
    slower = entry | {"ours": False, "samples_per_s": {"1": NUMBERS | {"median": 123.44}}}
    assert results_loader.ratios({"mpmae cpu, lz4": entry, "other": slower})[0].endswith("with 1 worker: 10.0 x other.")


def test_every_case_of_the_loader_benchmark_must_give_the_same_batch(loader_work):
    import loader_gate
    from loader_cases import HDF5, RAW
    from loader_work import prepare

    prepare(RAW, loader_work)
    for case in (HDF5, RAW):
        batches = case.open(loader_work, prepare(case, loader_work), 1, loader_gate.gate_views(loader_work))
        batch = next(batches)
        batches.close()
        assert loader_gate.gate_problems(batch._asdict(), loader_work) == []
    batch.values["aster"][3, 1, 5, 6] += 1
    batch.values["era5"][0, 0] = float("nan")
    batch.valid["biome"][2] ^= True
    shorter = batch._asdict() | {"rows": batch.rows[:15]}
    assert loader_gate.gate_problems(batch._asdict(), loader_work) == [
        "values of aster: 1 of 100352 differ",
        "values of era5: 1 of 192 differ",
        "valid of biome: 1 of 16 differ",
    ]
    assert loader_gate.gate_problems(shorter, loader_work)[0] == "15 tiles of 16"


def test_the_loader_benchmark_says_what_it_leaves_out(benchmarks, monkeypatch):
    import loader
    from loader_work import Case

    assert Case("x", "x", None, None, ("json", "no_such_package.part")).missing() == ["no_such_package.part"]
    monkeypatch.setattr(sys, "argv", ["loader.py", "--device", "cuda"])
    monkeypatch.setattr(loader.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU; nothing was measured"):
        loader.main()


def test_reshard_measures_every_way_and_makes_a_page(benchmarks, mmearth_dir, tmp_path):
    import reshard
    import results_reshard

    result = reshard.measure(mmearth_dir, tmp_path, num_tiles=12, rounds=2)
    assert result["num_tiles"] == 12
    assert {way.split()[0] for way in result["ways"]} == {"h5py", "inflate", "build"}
    assert all(rates["tiles_per_s"]["median"] > 0 for rates in result["ways"].values())
    table = {"num_chunks": 5, "us_per_chunk": 1.5, "bytes_per_chunk": 12}
    case = {"page cache": "warm", "rounds": 2, "source": "gzip chunks of one tile", "megabytes": 250}
    record = {**STEP, "what": "reshard", "case": case, "results": {"sources": {"synth": result}, "chunk_table": table}}
    text = results_reshard.section(record)
    assert "| build lz4, 1 worker |" in text
    assert "CPU µs a tile: read and inflate" in text
    assert results_reshard.plot(record).count("<svg") == 1
    assert not list(tmp_path.iterdir())
