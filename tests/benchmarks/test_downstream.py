"""The benchmark of pretrained features: what it compares, its page on made-up numbers, and the command on a few tiles."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mpmae.modalities import MODALITIES, TARGETS
from tests.eval.labelled_files import write_h5

ENVIRONMENT = {"gpu": None, "cores": 2, "python": "3.11", "packages": {"torch": "2.13.0"}}
STAMP = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "environment": ENVIRONMENT}


def row(encoder: str, method: str, values: list[float]) -> dict:
    mean = float(np.mean(values))
    common = {"task": "set", "split": "test", "metric": "accuracy", "label_fraction": 1.0, "num_train": 100}
    return {
        "encoder": encoder,
        "method": method,
        **common,
        "values": values,
        "mean": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
    }


@pytest.fixture
def record():
    rows = [
        row(e, m, v)
        for e, v in (("random init", [0.5, 0.4]), ("pretrained, all maps", [0.6, 0.8]))
        for m in ("knn-20", "lbfgs")
    ]
    table = {"header": ["encoder", "accuracy %"], "rows": [["random init", "45.0"]], "notes": ["Two seeds."]}
    losses = {"all maps": {"aster": {"training": 0.25, "validation": 0.5, "trivial": 1.0}}, "all modalities": {}}
    case = {"model": "mpmae_atto", "steps": 3, "batch_size": 4, "peak_lr": 1e-3, "seeds": 2, "folds": 5}
    case |= {"labelled": "set.h5", "tiles": "tiles"}
    results = {"table": table, "rows": rows, "losses": losses, "pretraining_commits": ["a" * 40]}
    return {**STAMP, "case": case, "results": results}


def test_the_page_says_what_the_record_holds(record):
    from results_downstream import plot, readme, section

    text = section(record)
    assert "| random init | 45.0 |" in text
    assert "| aster | 0.25 / 0.50 (1.00) | – |" in text
    assert "pretraining at commit aaaaaaaaaa" in text
    assert readme(record).startswith("Measured on set (5 folds, 2 seeds")
    assert "45.0 % random init, 70.0 % pretrained, all maps" in readme(record)
    picture = plot(record)
    assert picture.count("random init") == 1
    assert "on held-out images" in picture


def test_the_curve(record):
    from results_downstream import curve_section

    points = [{"step": 20, "sentinel2_loss": 0.6, "accuracy": {"knn-5": 0.48}}]
    text = curve_section(record | {"results": {"points": points, "random_init": {"knn-5": 0.55}}})
    assert "| random init | – | 55.0 |" in text
    assert "| 20 | 0.60 | 48.0 |" in text


def test_the_variants(tmp_path):
    from downstream_runs import VARIANTS, run_config

    outputs = {variant: run_config(tmp_path, variant, 0).model.modalities_out for variant in VARIANTS}
    assert outputs["Sentinel-2 only"] == ("sentinel2",)
    assert outputs["all modalities"] == TARGETS
    assert {MODALITIES[name].scope for name in outputs["all maps"]} == {"pixel"}
    assert run_config(tmp_path, "all maps", 1).run.dir != run_config(tmp_path, "all maps", 0).run.dir


@pytest.mark.slow
def test_the_command_runs_and_repeats(repo, mmearth_dir, tmp_path):
    image = np.random.default_rng(0).integers(1, 4000, (60, 12, 64, 64)).astype(np.uint16)
    image[::3, 7] *= 4
    label = (np.arange(60) % 3 == 0).astype(np.int64)
    bands = list(MODALITIES["sentinel2"].model_bands)
    splits = {"train": list(range(40)), "val": list(range(40, 50)), "test": list(range(50, 60))}
    labelled = write_h5(tmp_path / "set.h5", image, label, splits, bands=bands, classes=["dark", "bright"])
    outputs = []
    for work in ("one", "two"):
        command = [sys.executable, "benchmarks/downstream.py", "--tiles", str(mmearth_dir), "--labelled", str(labelled)]
        command += ["--work", str(tmp_path / work), "--steps", "2", "--seeds", "1", "--no-record"]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        probes = sorted((tmp_path / work / "probes").glob("*/scores.json"))
        scores = [score for path in probes for score in json.loads(path.read_text())["scores"]]
        outputs.append([(score["method"], score["fold"], score["metrics"]) for score in scores])
    assert len(outputs[0]) == 5 * 4 * (3 + 3)  # folds x methods x (pretrained and untrained encoders)
    assert outputs[0] == outputs[1]
