"""The probe of a run: real runs with and without it, on one rank and two, several in one start of the processes."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from mpmae.config import load_config
from mpmae.engine import init_world
from mpmae.engine.world import hold_process_group
from mpmae.errors import ConfigError, DatasetError
from mpmae.eval.config import DatasetSection, EncoderSection, ImageSection
from mpmae.eval.encoders import open_encoder
from mpmae.eval.features import image_features
from mpmae.eval.knn import knn_shares
from mpmae.eval.open_set import open_set
from mpmae.eval.prepare import Preparation
from mpmae.probe_record import scores_of
from mpmae.train import dry_run, loop, pretrain
from mpmae.train.compatibility import check_compatible, checkpoint_meta
from mpmae.train.stopping import StopRequests
from tests.engine.spawn import REPO, run_ranks
from tests.eval.labelled_files import write_h5
from tests.train.launches import metrics

STEPS = 5
BANDS = ["B2", "B3", "B4", "B8"]
CLASSES = ["water", "trees", "built"]
NUM = {"train": 60, "val": 24, "test": 6}
SHORT = (
    "model.img_size=16",
    "model.decoder_dim=32",
    "model.bands_in=[B2, B3, B4, B8]",
    "model.modalities_out=[sentinel2, biome]",
    "train.global_batch_size=4",
    "train.val_samples=1",
    f"train.max_steps={STEPS}",
    "optim.warmup_steps=1",
    "optim.lr=1e-2",
    "data.num_workers=1",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
)
SCORES = ("knn_5", "knn_20", "linear")
WITHOUT = "probe.dataset=null"
ON_ONE_RANK = {"with": (), "without": (WITHOUT,), "not kept": ("probe.host_cache_gb=0",)}
ON_TWO_RANKS = {"ddp": (), "fsdp": ("engine.name=fsdp",)}
ZERO = {f"ZeRO-{n}": ("engine.name=deepspeed", f"engine.ds_config=configs/ds/zero{n}.json") for n in range(4)}


def write_set(folder: Path, **attributes) -> Path:
    """Classes whose mean colours lie close together under much noise; labels of the test split are no classes."""
    rng, num = np.random.default_rng(0), sum(NUM.values())
    label = np.arange(num) % len(CLASSES)
    colour = 1500 + 60 * rng.standard_normal((len(CLASSES), len(BANDS), 1, 1))
    image = (colour[label] + 400 * rng.standard_normal((num, len(BANDS), 16, 16))).clip(1, 10_000).astype(np.uint16)
    label[-NUM["test"] :] = 99
    starts = np.cumsum([0, *NUM.values()])
    splits = {name: list(range(first, first + NUM[name])) for name, first in zip(NUM, starts, strict=False)}
    return write_h5(folder / "set.h5", image, label, splits, **{"bands": BANDS, "classes": CLASSES} | attributes)


def started(world_argument: tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]) -> list[tuple | None]:
    """Runs all of them in this process, one of the ranks; how each ended."""
    folder, settings, runs = world_argument
    init_world("toy")
    hold_process_group("test")  # one start for all runs
    return [run_one(Path(folder) / name, (*settings, *extra)) for name, extra in runs.items()]


def run_one(run_dir: Path, settings: tuple[str, ...]):
    return pretrain(load_config(REPO / "configs" / "run" / "demo.yaml", [*settings, f"run.dir={run_dir}"]))


def started_alone(world_argument) -> None:
    """The runs of ON_ONE_RANK, one that is resumed from the middle of "with", and two in which something happens."""
    started(world_argument)
    folder, settings = Path(world_argument[0]), world_argument[1]
    shutil.copytree(folder / "with", folder / "resumed")
    run_one(folder / "resumed", (*settings, f"checkpoint.resume={folder}/resumed/checkpoints/step-00000002"))

    from mpmae.train.probe import Probe

    read, run, num = Probe._read, Probe.run, {"reads": 0, "runs": 0}

    def failing(self, positions):
        num["reads"] += 1
        if num["reads"] == 7:  # the first of the second probe, after three at the start and three of the first
            raise DatasetError("image 5 is gone")
        return read(self, positions)

    class Asked(StopRequests):
        def votes(self) -> list[int]:
            return [0] if num["runs"] >= 2 else []

    def counted(self, stop_asked):
        num["runs"] += 1
        return run(self, stop_asked)

    with mock.patch.object(Probe, "_read", failing):
        run_one(folder / "unreadable", (*settings, "probe.host_cache_gb=0"))
    with mock.patch.object(Probe, "run", counted), mock.patch.object(loop, "StopRequests", Asked):
        run_one(folder / "asked", settings)


@pytest.fixture(scope="module")
def settings(shards_dir, tmp_path_factory):
    path = write_set(tmp_path_factory.mktemp("labelled"))
    return (f"data.shards={shards_dir}", *SHORT, f"probe.dataset={path}", "probe.every_steps=2")


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(started_alone, 1, (str(folder), settings, ON_ONE_RANK), folder / "processes")
    return folder


def probes(run_dir: Path) -> dict[int, dict]:
    """Scores by step."""
    return {line["step"]: scores_of(line) for line in metrics(run_dir) if "probe" in line}


def trained(run_dir: Path) -> list[list]:
    """All that the training computed, by step."""
    keys = ("step", "loss", "losses", "log_variances", "lr", "grad_norm", "epoch")
    return [[line[key] for key in keys] for line in metrics(run_dir) if line["step"]]


def test_what_is_recorded(alone):
    lines = metrics(alone / "with")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert set(lines[0]) == {"step", "probe"}
    assert list(probes(alone / "with")) == [0, 2, 4, 5]
    for line in lines:
        if "probe" in line:
            assert set(line["probe"]) == {*SCORES, "metric", "num_train", "num_val", "elapsed_s"}
            assert (line["probe"]["metric"], line["probe"]["num_train"], line["probe"]["num_val"]) == ("accuracy", 60, 24)
            assert all(1 / 3 < score <= 1 for score in scores_of(line).values())
    assert len({tuple(scores.values()) for scores in probes(alone / "with").values()}) > 1, "it follows the training"
    assert "probe after step 2: kNN-5 " in (alone / "processes" / "rank0.log").read_text()


def test_the_training_is_the_same_bit_by_bit(alone):
    assert trained(alone / "with") == trained(alone / "without")
    assert not probes(alone / "without")
    for step in (2, 5):
        with_probe, without = (alone / name / "checkpoints" / f"step-{step:08d}" for name in ("with", "without"))
        for name in ("model.safetensors", "engine/rng-00000-of-00001.pt"):
            assert (with_probe / name).read_bytes() == (without / name).read_bytes(), name


def test_a_resumed_run_goes_on_with_it(alone):
    assert probes(alone / "resumed") == probes(alone / "with")
    assert [line["step"] for line in metrics(alone / "resumed")] == list(range(STEPS + 1))
    assert trained(alone / "resumed") == trained(alone / "with")


def test_images_that_are_not_kept_are_read_again(alone):
    assert probes(alone / "not kept") == probes(alone / "with")
    assert "probe: 0 of 84 images stay in memory (probe.host_cache_gb = 0)" in (alone / "processes" / "rank0.log").read_text()


def test_a_probe_that_fails_does_not_end_the_run(alone):
    assert list(probes(alone / "unreadable")) == [0, 4, 5]
    assert trained(alone / "unreadable") == trained(alone / "without")
    assert "no probe after step 2: probe.dataset: image 5 is gone" in (alone / "processes" / "rank0.log").read_text()


def test_a_request_to_stop_does_not_wait_for_it(alone):
    assert list(probes(alone / "asked")) == [0]
    stopped = json.loads((alone / "asked" / "stopped.json").read_text())
    assert stopped["step"] == 3
    assert "no probe after step 2: the run is asked to stop" in (alone / "processes" / "rank0.log").read_text()


def test_it_says_what_an_evaluation_of_the_checkpoint_says(alone, settings):
    """The same encoder, bands, statistics, images and neighbours, by the way of a file."""
    path = Path(settings[-2].removeprefix("probe.dataset="))
    labelled = open_set(DatasetSection(path=path, num_folds=2), progress=False)
    encoder = open_encoder(EncoderSection(checkpoint=alone / "with" / "checkpoints" / "step-00000004"))
    prepare = Preparation(labelled.task, encoder.input, ImageSection())
    train, val = (image_features(encoder, prepare, labelled, indices=labelled.splits[name]) for name in ("train", "val"))
    labels = {name: torch.tensor([int(labelled.label(i)) for i in labelled.splits[name]]) for name in ("train", "val")}
    votes = knn_shares(train, torch.eye(len(CLASSES))[labels["train"]], val, 5)
    expected = (votes.argmax(1) == labels["val"]).double().mean()
    assert probes(alone / "with")[4]["knn_5"] == pytest.approx(float(expected), abs=1e-6)


def test_ranks_and_engines_do_not_change_it(alone, settings, tmp_path):
    run_ranks(started, 2, (str(tmp_path), settings, ON_TWO_RANKS), tmp_path / "processes")
    for name in ON_TWO_RANKS:
        assert probes(tmp_path / name) == probes(alone / "with"), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_does_not_change_it(settings, tmp_path, precision):
    settings = (*settings, f"train.precision={precision}")
    run_ranks(started, 2, (str(tmp_path), settings, ON_TWO_RANKS | ZERO), tmp_path / "processes")
    for name in ZERO:
        assert probes(tmp_path / name)[0] == probes(tmp_path / "ddp")[0], name
        if precision == "fp32":
            assert probes(tmp_path / name) == probes(tmp_path / "ddp"), name
