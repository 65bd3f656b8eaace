"""`finetune` as a whole: every run, what it writes, its weights read again, the command."""

import copy
import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mpmae.errors import ConfigError
from mpmae.eval.devices import find_device
from mpmae.eval.finetune import finetune
from mpmae.eval.finetune_config import FinetuneConfig, load_config
from mpmae.eval.launcher import launch
from mpmae.eval.scores import read_scores
from mpmae.export.config import load_config as load_export
from mpmae.export.export import export
from mpmae.files import read_jsonl
from mpmae.models import create_encoder
from tests.eval.bright_bands import bright_bands
from tests.eval.labelled_files import write_h5

BANDS = ("B2", "B3", "B4", "B8")
QUICK = ["finetune.epochs=2", "finetune.lr=1e-3", "finetune.warmup_epochs=0", "finetune.batch_size=4", "output.device=cpu"]
QUICK += ["finetune.baselines=[random_init]"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint that names its bands."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = create_encoder("convnextv2_atto", bands_in=BANDS)
    torch.save({"model": model.state_dict()}, folder / "raw.pth")
    raw = export(folder / "raw.pth", "safetensors", folder / "plain", licence="CC-BY-4.0")
    config = json.loads((raw.folder / "config.json").read_text())
    statistics = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [1.0, 1.0, 2.0, 1.0]}
    config |= {"bands_in": BANDS, "statistics": {"sentinel2_l2a": statistics}}
    (raw.folder / "config.json").write_text(json.dumps(config))
    return raw.folder


@pytest.fixture(scope="module")
def evaluation(pretrained, tmp_path_factory):
    """(output folder, the set, configuration, scores) of a pretrained encoder beside one from scratch."""
    folder = tmp_path_factory.mktemp("finetune") / "out"
    labelled = bright_bands(sizes=(12, 6, 6), side=8)
    keys = [f"encoder.checkpoint={pretrained}", f"output.dir={folder}", "output.seeds=[3]", "augment.smoothing=0"]
    config = load_config(None, [*QUICK, *keys, "dataset.label_fractions=[0.5,1]", "finetune.drop_path=0.1"])
    return folder, labelled, config, finetune(config, labelled=labelled)


def test_every_run_has_a_score(evaluation, pretrained):
    folder, labelled, _, scores = evaluation
    runs = [(s.encoder, s.label_fraction, s.num_train, s.seed, s.fold, s.split, s.method) for s in scores]
    names = (str(pretrained), "random init")
    expected = [(name, share, round(12 * share), 3, None, "test", "finetune") for share in (0.5, 1.0) for name in names]
    assert sorted(runs) == sorted(expected)
    assert all(set(score.per_sample) == {f"sample-{i}" for i in labelled.splits["test"]} for score in scores)
    assert all(score.settings["num_epochs"] == 2 and 0 <= score.settings["best_epoch"] < 2 for score in scores)
    kept, facts = read_scores(folder / "scores.json")
    assert kept == scores
    assert facts["set"]["splits"] == {"train": 12, "val": 6, "test": 6}
    assert facts["config"]["finetune"]["epochs"] == 2
    assert facts["preparation"]["statistics"] == "dataset"
    folders = sorted(path.name for path in (folder / "runs").iterdir())
    assert folders == [f"{kind}-labels{share}-seed3" for kind in ("pretrained", "scratch") for share in (100, 50)]
    assert all(len(read_jsonl(path / "metrics.jsonl")) == 2 for path in (folder / "runs").iterdir())
    assert {labelled.reads[int(i)] for i in labelled.splits["test"]} == {1}, "kept in memory from one run to the next"


def test_features_that_nobody_trained_stand_beside_it(tmp_path):
    keys = ["finetune.baselines=[image_statistics, random_convolutions]", "finetune.epochs=1", "output.seeds=[0]"]
    config = load_config(None, [*QUICK, *keys, f"output.dir={tmp_path}", "dataset.label_fractions=[0.5,1]"])
    scores = finetune(config, labelled=bright_bands(sizes=(12, 6, 6), side=16))
    runs = [(score.encoder, score.method, score.label_fraction, score.num_train) for score in scores]
    assert runs[:2] == [("random init", "finetune", 0.5, 6), ("random init", "finetune", 1.0, 12)]
    untrained = [
        (n, "linear-lbfgs", f, round(12 * f)) for f in (0.5, 1.0) for n in ("image statistics", "random convolutions")
    ]
    assert runs[2:] == untrained
    assert read_scores(tmp_path / "scores.json")[0] == scores
    assert "| random convolutions | linear-lbfgs | 50 % |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("kind", ["pretrained", "scratch"])
def test_the_best_weights_load_again(evaluation, tmp_path, kind):
    folder, labelled, _, scores = evaluation
    run = folder / "runs" / f"{kind}-labels100-seed3"
    model = create_encoder("convnextv2_atto", num_classes=3, checkpoint=run).eval()
    mean = torch.tensor([band.mean for band in labelled.task.bands])[:, None, None]
    std = torch.tensor([band.std for band in labelled.task.bands])[:, None, None]
    images = torch.stack([(torch.from_numpy(labelled.image(i)) - mean) / std for i in labelled.splits["test"]])
    with torch.no_grad():
        right = model(images).argmax(1).numpy() == [labelled.label(i) for i in labelled.splits["test"]]
    (score,) = [s for s in scores if s.label_fraction == 1 and (s.encoder == "random init") == (kind == "scratch")]
    ids = [labelled.sample_id(i) for i in labelled.splits["test"]]
    assert {name: float(value) for name, value in zip(ids, right, strict=True)} == score.per_sample
    config = load_export(run)
    assert (config.num_classes, config.bands_in, config.patch_size) == (3, BANDS, 8)
    assert config.statistics is None, "the images were normalised by the set's own"
    assert "fine-tuned on synthetic multiclass" in config.provenance.notes
    assert config.licence == ("CC-BY-4.0" if kind == "pretrained" else None)
    exported = export(run, "hub", tmp_path / "hub")
    assert exported.config.num_classes == 3
    result = json.loads((run / "result.json").read_text())
    assert result["class_names"] == ["class 0", "class 1", "class 2"]


def test_an_evaluation_goes_on_where_it_ended(evaluation):
    _, labelled, config, scores = evaluation
    with pytest.raises(ConfigError, match="holds a run already; pass --resume auto"):
        finetune(config, labelled=labelled)
    labelled.reads.clear()
    _, facts = read_scores(config.output.dir / "scores.json")
    assert finetune(config, resume=True, labelled=labelled) == scores
    assert set(labelled.reads) <= set(labelled.splits["train"]), "nothing is tested again"
    assert sum(labelled.reads.values()) == 1
    assert read_scores(config.output.dir / "scores.json")[1] == facts
    other = config.model_copy(update={"finetune": config.finetune.model_copy(update={"weight_decay": 0.5})})
    with pytest.raises(ConfigError, match=r"finetune.weight_decay was 0.05, now 0.5"):
        finetune(other, resume=True, labelled=labelled)
    moved = copy.copy(labelled)
    moved.splits = {**labelled.splits, "train": labelled.splits["test"], "test": labelled.splits["train"][:6]}
    with pytest.raises(ConfigError, match=r"labels was"):
        finetune(config, resume=True, labelled=moved)


def test_a_frozen_encoder_keeps_its_weights(pretrained, tmp_path):
    labelled = bright_bands("multilabel", sizes=(12, 6, 6), side=8)
    keys = [f"encoder.checkpoint={pretrained}", f"output.dir={tmp_path}", "output.seeds=[0]", "finetune.freeze=true"]
    config = load_config(None, [*QUICK, *keys, "finetune.baselines=[]", "augment.mixup_alpha=0.5"])
    (score,) = finetune(config, labelled=labelled)
    assert (score.method, score.metric) == ("finetune-head", "map_macro")
    before = create_encoder("convnextv2_atto", checkpoint=pretrained).state_dict()
    after = create_encoder("convnextv2_atto", num_classes=3, checkpoint=tmp_path / "runs" / "pretrained-labels100-seed0")
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items() if name in before)
    assert after.head.bias.abs().max() > 1e-4, "the classifier has moved"


def test_settings_that_exclude_each_other(pretrained, tmp_path):
    config = load_config(None, [f"output.dir={tmp_path}", "finetune.freeze=true", "finetune.drop_path=0.1"])
    with pytest.raises(ConfigError, match="a frozen encoder skips no blocks"):
        finetune(config, labelled=bright_bands(sizes=(4, 4, 4)))
    with pytest.raises(ConfigError, match=r"output.device = cuda:99"):
        find_device("cuda:99")
    with pytest.raises(ConfigError, match=r"did you mean finetune.weight_decay"):
        load_config(None, ["finetune.wight_decay=1"])


def test_folds_are_runs_of_their_own(tmp_path):
    labelled = bright_bands(sizes=(12, 6, 6), side=8)
    config = load_config(None, [*QUICK, f"output.dir={tmp_path}", "dataset.num_folds=3", "output.seeds=[0]"])
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"epochs": 1, "keep_weights": False})})
    scores = finetune(config, labelled=labelled)
    assert [(score.fold, score.encoder) for score in scores] == [(fold, "random init") for fold in range(3)]
    tested = [name for score in scores for name in score.per_sample]
    assert sorted(tested) == sorted(labelled.sample_id(i) for i in range(24))
    assert not (tmp_path / "runs" / "scratch-labels100-fold0-seed0" / "model.safetensors").exists()


def test_the_command(repo, tmp_path):
    labelled = bright_bands(sizes=(6, 3, 3), side=8)
    images = (1000 + 100 * np.stack([labelled.image(i) for i in range(12)])).astype(np.uint16)
    labels = np.array([int(labelled.label(i)) for i in range(12)])
    path = write_h5(tmp_path / "set" / "bright.h5", images, labels, bands=list(BANDS), classes=["a", "b", "c"])
    keys = [f"dataset.path={path}", f"output.dir={tmp_path / 'out'}", "output.seeds=[0]", "encoder.bands_in=[B2,B3,B4,B8]"]
    command = [sys.executable, str(repo / "launch" / "finetune.py"), *QUICK, *keys]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gain on random init" in done.stdout, "a table of a log file is as wide as it needs to be"
    assert "images of 8 x 8 px are taken as they are" in done.stderr
    scores, _ = read_scores(tmp_path / "out" / "scores.json")
    assert [score.task for score in scores] == ["bright"]


def test_a_wrong_key_ends_the_command(capsys):
    def run(config, resume):
        raise AssertionError("there is nothing to run")

    level = logging.getLogger("mpmae").level
    assert launch("", FinetuneConfig, run, ["finetune.epochs=0", "--resume", "auto", "dataset.path=x"]) == 2
    assert capsys.readouterr().err.startswith("error: override finetune.epochs=0")
    logging.getLogger("mpmae").setLevel(level)


@pytest.mark.slow
def test_a_killed_command_ends_as_one_left_alone(repo, tmp_path):
    labelled = bright_bands(sizes=(24, 6, 6))
    images = (1000 + 100 * np.stack([labelled.image(i) for i in range(36)])).astype(np.uint16)
    labels = np.array([int(labelled.label(i)) for i in range(36)])
    splits = {name: indices.tolist() for name, indices in labelled.splits.items()}
    path = write_h5(tmp_path / "bright.h5", images, labels, splits=splits, bands=list(BANDS), classes=["a", "b", "c"])
    keys = [f"dataset.path={path}", "output.seeds=[0]", "encoder.bands_in=[B2,B3,B4,B8]", "finetune.epochs=12"]
    keys += ["finetune.save_interval_s=0", "finetune.drop_path=0.2", "augment.mixup_alpha=0.8"]
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    command = [sys.executable, str(repo / "launch" / "finetune.py"), "--resume", "auto", *QUICK, *keys]
    subprocess.run([*command, f"output.dir={whole}"], check=True, timeout=240, cwd=tmp_path)
    curve = parts / "runs" / "scratch-labels100-seed0" / "metrics.jsonl"
    for num_lines in (2, 6):
        process = subprocess.Popen([*command, f"output.dir={parts}"], cwd=tmp_path)
        deadline = time.monotonic() + 120
        while len(read_jsonl(curve)) < num_lines and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert len(read_jsonl(curve)) >= num_lines
    assert not (parts / "scores.json").exists()
    subprocess.run([*command, f"output.dir={parts}"], check=True, timeout=240, cwd=tmp_path)
    assert read_scores(parts / "scores.json")[0] == read_scores(whole / "scores.json")[0]
    weights = [folder / "runs" / "scratch-labels100-seed0" / "model.safetensors" for folder in (whole, parts)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [line["epoch"] for line in read_jsonl(curve)] == list(range(12))


def test_the_shown_configuration_loads(repo):
    config = load_config(repo / "configs" / "eval" / "eurosat_finetune.yaml")
    assert (config.dataset.num_folds, config.finetune.warmup_epochs) == (5, 5)


def test_defaults_are_those_of_the_published_code():
    config = FinetuneConfig()
    section = config.finetune
    assert (section.epochs, section.warmup_epochs, section.blr, section.min_lr) == (100, 20, 5e-4, 1e-6)
    assert (section.weight_decay, section.layer_decay, section.head_init_scale) == (0.05, 1.0, 0.001)
    assert (section.batch_size, config.augment.smoothing) == (64, 0.1)


def test_settings_of_another_kind_of_task_are_refused(tmp_path):
    config = load_config(None, [*QUICK, f"output.dir={tmp_path}", "segmentation.method=linear"])
    with pytest.raises(ConfigError, match=r"segmentation: .* has classes of whole images .* leave the section out"):
        finetune(config, labelled=bright_bands(sizes=(12, 6, 6), side=8))
