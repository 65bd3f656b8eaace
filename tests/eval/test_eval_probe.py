"""The probe as a whole: what solves the synthetic task, what is read once, and how it goes on after a kill."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpmae.config_tree import load_tree
from mpmae.errors import ConfigError
from mpmae.eval import probe as probe_module
from mpmae.eval.methods import Division, SealedLabels, method_names, run_method
from mpmae.eval.plan import class_labels, plan_runs
from mpmae.eval.probe import probe
from mpmae.eval.probe_config import ProbeConfig, ProbeSection
from mpmae.eval.scores import read_scores
from mpmae.models import create_encoder
from tests.eval.memory_set import MemorySet

METHODS = ("knn", "ridge", "lbfgs", "adamw", "sgd")
FAST = ProbeSection(methods=METHODS, ks=(5,), strengths=(1e-3, 1e-1), lrs=(1e-2, 1e-1), epochs=20)
BANDS = "encoder.bands_in=[B2,B3,B4,B8]"


def config(folder, *overrides) -> ProbeConfig:
    keys = (f"output.dir={folder}", "output.num_workers=0", "output.seeds=[0]", BANDS, "probe.methods=[knn,ridge]")
    return load_tree(ProbeConfig, None, [*keys, "probe.baselines=[random_init,image_statistics]", *overrides])


def known_features(labelled: MemorySet, right: bool) -> torch.Tensor:
    """Brightness and roughness of each image; or brightness alone."""
    bright = labelled.images[:, 3].mean((1, 2)) / 1000
    rough = np.abs(np.diff(labelled.images[:, 0], axis=1)).mean((1, 2)) / 100
    columns = [bright, rough] if right else [bright, labelled.images[:, 0].mean((1, 2)) / 1000]
    return torch.from_numpy(np.stack(columns, 1)).float()


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("method", method_names(FAST))
def test_the_right_features_solve_the_task_and_others_do_not(method, kind):
    labelled = MemorySet(num_per_class=40, kind=kind)
    labels, task = class_labels(labelled), labelled.task
    reached = {}
    for right in (True, False):
        features = known_features(labelled, right)
        if method.startswith("knn"):
            features = (features - features.mean(0)) / features.std(0)  # a cosine sees angles
        division = Division.of(features, labels, labelled.splits, kind, task.num_classes)
        outcome = run_method(method, division, FAST, task.metric, seed=0)
        reached[right] = outcome.metrics[task.metric]
        assert (outcome.correct is None) == (kind == "multilabel")
    assert reached[True] == 1.0
    assert reached[False] < 0.9


def test_test_labels_are_handed_out_once():
    labelled = MemorySet()
    division = Division.of(known_features(labelled, True), class_labels(labelled), labelled.splits, "multiclass", 4)
    assert set(division.labels) == {"train", "val"}
    run_method("linear-ridge", division, FAST, "accuracy", 0)
    with pytest.raises(AssertionError, match="read already"):
        run_method("linear-ridge", division, FAST, "accuracy", 0)


@pytest.mark.parametrize("method", method_names(FAST))
def test_test_labels_are_read_after_the_last_choice(method, monkeypatch):
    labelled, opened = MemorySet(), []
    division = Division.of(known_features(labelled, True), class_labels(labelled), labelled.splits, "multiclass", 4)
    monkeypatch.setattr(SealedLabels, "open", lambda self: opened.append(1) or np.zeros(12, np.int64))
    other = run_method(method, division, FAST, "accuracy", 0)
    assert opened == [1]
    monkeypatch.undo()
    assert run_method(method, division, FAST, "accuracy", 0).settings == other.settings


@pytest.mark.parametrize("method", ["linear-ridge", "linear-lbfgs", "linear-adamw"])
def test_fitting_again_takes_validation_images_in(method):
    labelled = MemorySet(num_per_class=6, seed=2)
    features = known_features(labelled, True) + 0.3 * torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    labels = class_labels(labelled)
    joined = FAST.model_copy(update={"fit_with_val": True})
    outcomes = [
        run_method(method, Division.of(features, labels, labelled.splits, "multiclass", 4), section, "accuracy", 0)
        for section in (FAST, joined)
    ]
    settings = [{**outcome.settings, "fit_with_val": None} for outcome in outcomes]
    assert settings[0] == settings[1]  # the choice is the same
    assert outcomes[1].settings["fit_with_val"]


def test_label_fractions_are_nested_and_every_run_is_planned_once():
    labelled = MemorySet(num_per_class=40)
    section = config("x", "dataset.label_fractions=[0.05,0.25,1]", "dataset.num_folds=4").dataset
    runs = list(plan_runs(labelled, class_labels(labelled), section, (0, 1, 0)))
    assert len(runs) == 2 * 4 * 3
    for few, some, whole in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        assert set(few.splits["train"]) < set(some.splits["train"]) < set(whole.splits["train"])
        assert np.array_equal(few.splits["test"], whole.splits["test"])
        assert np.array_equal(few.unlabelled, whole.splits["train"])
    assert not np.array_equal(runs[0].splits["test"], runs[12].splits["test"])  # another seed, other folds


def test_a_probe_writes_its_results_and_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    labelled = MemorySet(num_per_class=10)
    asked = config(tmp_path / "run", "dataset.num_folds=3", "dataset.label_fractions=[0.5,1]")
    whole = probe(asked, labelled=labelled)
    assert len(whole) == 2 * 3 * (2 * 3)  # encoders x methods x (fractions x folds)
    assert {score.method for score in whole} == {"knn-5", "knn-20", "linear-ridge"}
    assert all(len(score.per_sample) in (13, 14) for score in whole)
    read, facts = read_scores(tmp_path / "run" / "scores.json")
    assert read == whole
    assert facts["inputs"]["random init"]["num_features"] == 320
    text = (tmp_path / "run" / "results.md").read_text()
    assert "| image statistics | linear-ridge | 50 % |" in text
    assert (tmp_path / "run" / "results.png").stat().st_size > 10_000

    killed = asked.model_copy(update={"output": asked.output.model_copy(update={"dir": tmp_path / "killed"})})
    real, done = probe_module.run_method, []

    def dies(*arguments, **options):
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(probe_module, "run_method", dies)
    with pytest.raises(KeyboardInterrupt):
        probe(killed, labelled=labelled)
    with (tmp_path / "killed" / "scores.jsonl").open("a") as file:
        file.write('{"encoder": "torn')
    monkeypatch.setattr(probe_module, "run_method", lambda *a, **o: done.append(1) or real(*a, **o))
    assert probe(killed, resume=True, labelled=labelled) == whole
    assert len(done) == len(whole)
    assert probe(killed, resume=True, labelled=labelled) == whole
    assert len(done) == len(whole)

    with pytest.raises(ConfigError, match="--resume auto"):
        probe(killed, labelled=labelled)
    other = load_tree(ProbeConfig, None, [])
    changed = killed.model_copy(update={"image": other.image.model_copy(update={"fit": "crop"})})
    with pytest.raises(ConfigError, match=r"another evaluation: image.fit was resize, now crop"):
        probe(changed, resume=True, labelled=labelled)
    with pytest.raises(ConfigError, match="another evaluation: set was"):
        probe(killed, resume=True, labelled=MemorySet(num_per_class=10, seed=5))
    more = killed.model_copy(update={"probe": killed.probe.model_copy(update={"methods": ("knn", "ridge", "lbfgs")})})
    assert len(probe(more, resume=True, labelled=labelled)) == len(whole) + 2 * 2 * 3


def test_a_checkpoint_stands_beside_its_random_twin_and_keeps_its_features(tmp_path):
    torch.manual_seed(7)
    path = tmp_path / "model.safetensors"
    save_file(create_encoder("convnextv2_atto", bands_in=("B2", "B3", "B4", "B8")).state_dict(), path)
    labelled = MemorySet()
    asked = config(tmp_path / "run", f"encoder.checkpoint={path}", f"probe.features_dir={tmp_path / 'features'}")
    scores = probe(asked, labelled=labelled)
    assert list(dict.fromkeys(score.encoder for score in scores)) == [str(path), "random init", "image statistics"]
    read = labelled.num_reads
    again = asked.model_copy(update={"output": asked.output.model_copy(update={"dir": tmp_path / "again"})})
    assert probe(again, labelled=labelled) == scores
    assert labelled.num_reads - read <= 16  # those of the set's identity
    torch.manual_seed(8)
    save_file(create_encoder("convnextv2_atto", bands_in=("B2", "B3", "B4", "B8")).state_dict(), path)
    with pytest.raises(ConfigError, match="another evaluation: weights was"):
        probe(asked, resume=True, labelled=labelled)


def test_every_impossible_setting_is_told_at_once():
    with pytest.raises(ConfigError) as raised:
        config("x", "probe.ks=[5,0]", "probe.strengths=[0.0]", "probe.lrs=[]", "probe.methods=[svm]")
    assert {problem.split("=")[0] for problem in raised.value.problems} == {
        "override probe.ks", "override probe.strengths", "override probe.lrs", "override probe.methods"
    }  # fmt: skip
    for text in ("output.seeds=[0,-1]", "dataset.label_fractions=[]", "dataset.label_fractions=[0.1,1.5]"):
        with pytest.raises(ConfigError, match=f"override {re.escape(text)}"):
            config("x", text)


def test_label_maps_are_sent_elsewhere(tmp_path):
    labelled = MemorySet()
    object.__setattr__(labelled.task, "kind", "segmentation")
    with pytest.raises(ConfigError, match=r"launch/finetune\.py"):
        probe(config(tmp_path / "run"), labelled=labelled)


def test_the_launcher_probes_a_set(repo, tmp_path, shared_dir):
    command = [sys.executable, str(repo / "launch/probe.py"), "--config", str(repo / "configs/eval/eurosat_probe.yaml")]
    overrides = [f"dataset.path={shared_dir / 'data/eurosat_ms'}", f"output.dir={tmp_path / 'run'}", "output.seeds=[0]"]
    overrides += [
        "dataset.num_folds=null",
        "probe.methods=[knn,ridge]",
        "probe.baselines=[image_statistics]",
        "image.size=16",
    ]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "one seed" in done.stdout
    facts = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert len(facts["scores"]) == 2 * 3
