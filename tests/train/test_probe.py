"""The probe of a run: real runs with and without it, on one rank and two, several in one start of the processes."""

import json
import re
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
from mpmae.eval.features import Source, image_features
from mpmae.eval.knn import knn_shares
from mpmae.eval.open_set import open_set
from mpmae.eval.prepare import Preparation
from mpmae.probe_record import percent, scores_of
from mpmae.train import dry_run, loop, pretrain
from mpmae.train.compatibility import check_compatible, checkpoint_meta
from mpmae.train.stopping import StopRequests
from tests.engine.spawn import REPO, run_ranks
from tests.eval.labelled_files import write_h5
from tests.train.launches import metrics

STEPS = 4
SIDE = 8
BANDS = ["B2", "B3", "B4", "B8", "elevation"]
CLASSES = ["water", "trees", "built"]
NUM = {"train": 60, "val": 24, "test": 6}
SHORT = (
    "model.img_size=16",
    "model.decoder_dim=32",
    "train.global_batch_size=4",
    "train.val_samples=1",
    f"train.max_steps={STEPS}",
    "optim.warmup_steps=1",
    "optim.lr=1e-2",
    "data.num_workers=1",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
)
SYSTEMS = {
    "mpmae": ("model.name=mpmae_atto", "model.bands_in=[B2, B3, B4, B8]", "model.modalities_out=[sentinel2, biome]"),
    "multimae": (
        "model.name=multimae_tiny",
        "model.domains_in=[rgb, depth, semseg, ebands]",
        "model.domains_out=[rgb]",
        "model.loss_weighting=uncertainty",
        "optim.lr=1e-3",
    ),
}
SCORES = ("knn_5", "knn_20", "linear")
WITHOUT = "probe.dataset=null"
ON_ONE_RANK = {"with": (), "without": (WITHOUT,)}
FSDP = {"fsdp": ("engine.name=fsdp",)}
ZERO = {f"ZeRO-{n}": ("engine.name=deepspeed", f"engine.ds_config=configs/ds/zero{n}.json") for n in range(4)}


def write_set(folder: Path, **attributes) -> Path:
    """Classes whose mean colours lie close together under much noise; labels of the test split are no classes."""
    rng, num = np.random.default_rng(0), sum(NUM.values())
    label = np.arange(num) % len(CLASSES)
    colour = 1500 + 150 * rng.standard_normal((len(CLASSES), len(BANDS), 1, 1))
    image = (colour[label] + 400 * rng.standard_normal((num, len(BANDS), SIDE, SIDE))).clip(1, 10_000).astype(np.uint16)
    label[-NUM["test"] :] = 99
    starts = np.cumsum([0, *NUM.values()])
    splits = {name: list(range(first, first + NUM[name])) for name, first in zip(NUM, starts, strict=False)}
    return write_h5(folder / "set.h5", image, label, splits, **{"bands": BANDS, "classes": CLASSES} | attributes)


def started(world_argument: tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]) -> None:
    """Runs all of them for each system in this process, one of the ranks."""
    folder, settings, runs = world_argument
    init_world("toy")
    hold_process_group("test")  # one start for all runs
    for system, model in SYSTEMS.items():
        for name, extra in runs.items():
            run_one(Path(folder) / system / name, (*settings, *model, *extra))


def run_one(run_dir: Path, settings: tuple[str, ...]):
    return pretrain(load_config(REPO / "configs" / "run" / "demo.yaml", [*settings, f"run.dir={run_dir}"]))


def started_alone(world_argument) -> None:
    """The runs of ON_ONE_RANK; of MP-MAE one resumed from the middle of "with", and two in which something happens."""
    started(world_argument)
    folder, settings = Path(world_argument[0]) / "mpmae", (*world_argument[1], *SYSTEMS["mpmae"])
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


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_recorded(system, alone):
    lines = metrics(alone / system / "with")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert set(lines[0]) == {"step", "probe"}
    assert list(probes(alone / system / "with")) == [0, 2, 4]
    for line in lines:
        if "probe" in line:
            assert set(line["probe"]) == {*SCORES, "metric", "num_train", "num_val", "elapsed_s"}
            assert (line["probe"]["metric"], line["probe"]["num_train"], line["probe"]["num_val"]) == ("accuracy", 60, 24)
            assert all(1 / 3 < score <= 1 for score in scores_of(line).values())
    assert len({tuple(scores.values()) for scores in probes(alone / system / "with").values()}) > 1, (
        "it follows the training"
    )
    assert "probe after step 2: kNN-5 " in (alone / "processes" / "rank0.log").read_text()


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_training_is_the_same_bit_by_bit(system, alone):
    folder = alone / system
    assert trained(folder / "with") == trained(folder / "without")
    assert not probes(folder / "without")
    for step in (2, 4):
        with_probe, without = (folder / name / "checkpoints" / f"step-{step:08d}" for name in ("with", "without"))
        for name in ("model.safetensors", "engine/rng-00000-of-00001.pt"):
            assert (with_probe / name).read_bytes() == (without / name).read_bytes(), name


def test_a_resumed_run_goes_on_with_it(alone):
    folder = alone / "mpmae"
    assert probes(folder / "resumed") == probes(folder / "with")
    assert [line["step"] for line in metrics(folder / "resumed")] == list(range(STEPS + 1))
    assert trained(folder / "resumed") == trained(folder / "with")


def test_many_windows_go_through_the_encoder_in_turns():
    from mpmae.eval.windows import MAX_WINDOWS, window_means

    sizes, weight = [], torch.zeros(1)
    encoder = mock.Mock(side_effect=lambda x: sizes.append(len(x)) or x.mean((2, 3)), parameters=lambda: iter([weight]))
    images = [torch.rand(25, 2, 4, 4) for _ in range(4)] + [torch.rand(1, 2, 8, 8)]
    expected = torch.stack([image.mean((0, 2, 3)) for image in images])
    torch.testing.assert_close(window_means(encoder, images, "cpu"), expected)
    assert sizes == [MAX_WINDOWS, 100 - MAX_WINDOWS, 1]


def test_a_score_that_is_no_number_is_told_as_none():
    assert [percent(score) for score in (0.5, None, float("nan"))] == ["50.0 %", "-", "-"]


def test_a_probe_that_fails_does_not_end_the_run(alone):
    folder = alone / "mpmae"
    expected = probes(folder / "with")
    assert probes(folder / "unreadable") == {step: expected[step] for step in (0, 4)}, "images not kept are read again"
    assert trained(folder / "unreadable") == trained(folder / "without")
    told = (alone / "processes" / "rank0.log").read_text()
    assert "no probe after step 2: probe.dataset: image 5 is gone" in told
    assert "probe: 0 of 84 images stay in memory (probe.host_cache_gb = 0)" in told


def test_a_request_to_stop_does_not_wait_for_it(alone):
    assert list(probes(alone / "mpmae" / "asked")) == [0]
    stopped = json.loads((alone / "mpmae" / "asked" / "stopped.json").read_text())
    assert stopped["step"] == 3
    assert "no probe after step 2: the run is asked to stop" in (alone / "processes" / "rank0.log").read_text()


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_says_what_an_evaluation_of_the_checkpoint_says(system, alone, settings):
    """The same encoder, bands or domains, statistics, images and neighbours, by the way of a file."""
    path = Path(settings[-2].removeprefix("probe.dataset="))
    labelled = open_set(DatasetSection(path=path, num_folds=2), progress=False)
    checkpoint = alone / system / "with" / "checkpoints" / "step-00000004"
    encoder = open_encoder(EncoderSection(checkpoint=checkpoint), task=labelled.task)
    source = Source(encoder, Preparation(labelled.task, encoder.input, ImageSection()))
    train, val = (image_features(source, labelled, indices=labelled.splits[name]) for name in ("train", "val"))
    labels = {name: torch.tensor([int(labelled.label(i)) for i in labelled.splits[name]]) for name in ("train", "val")}
    votes = knn_shares(train, torch.eye(len(CLASSES))[labels["train"]], val, 5)
    expected = (votes.argmax(1) == labels["val"]).double().mean()
    assert probes(alone / system / "with")[4]["knn_5"] == pytest.approx(float(expected), abs=1e-6)


def test_weights_cut_over_two_ranks_say_the_same(alone, settings, tmp_path):
    run_ranks(started, 2, (str(tmp_path), settings, FSDP), tmp_path / "processes")
    for system in SYSTEMS:
        assert probes(tmp_path / system / "fsdp") == probes(alone / system / "with"), system


def told_to_each(world_argument: tuple[str, tuple[str, ...]]) -> tuple[list[dict], str]:
    """What a run's probes gave this rank, and the error of a run whose second rank has no probe."""
    from mpmae.train.probe import Probe

    folder, settings = world_argument
    rank = init_world("toy").rank
    hold_process_group("test")
    given, run = [], Probe.run

    def noted(self, stop_asked):
        given.append(scores_of({"probe": run(self, stop_asked)}))
        return None

    with mock.patch.object(Probe, "run", noted):
        run_one(Path(folder) / "run", (*settings, "engine.name=ddp"))
    try:
        run_one(Path(folder) / "unlike", (*settings, *[WITHOUT] * rank))
    except ConfigError as error:
        return given, str(error)
    return given, "nothing was raised"


def test_all_ranks_wait_for_the_scores_and_have_the_same_set(alone, settings, tmp_path):
    (first, told), (second, told_again) = run_ranks(
        told_to_each, 2, (str(tmp_path), (*settings, *SYSTEMS["mpmae"])), tmp_path / "processes"
    )
    assert first == second
    assert all(score is not None for scores in second for score in scores.values())
    assert len(second) == 3
    assert told == told_again
    assert re.search(r"images and labels of probe.dataset differs: \w{16} on rank 0, \(absent\) on rank 1", told)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_engine_says_the_same(settings, tmp_path, precision):
    settings = (*settings, f"train.precision={precision}")
    run_ranks(started, 2, (str(tmp_path), settings, {"ddp": ()} | FSDP | ZERO), tmp_path / "processes")
    for folder in (tmp_path / system for system in SYSTEMS):
        expected = probes(folder / "ddp")
        for name in (*FSDP, *ZERO):
            if precision == "fp32":
                assert probes(folder / name) == expected, folder / name
            assert probes(folder / name)[0] == expected[0], folder / name


@pytest.fixture
def plan(shards_dir, tmp_path, capsys):
    """A function that gives what --dry-run prints for a labelled set."""

    def show(path: Path, *extra: str, system: str = "mpmae") -> str:
        settings = (f"data.shards={shards_dir}", f"run.dir={tmp_path}/run", *SHORT, *SYSTEMS[system])
        dry_run(load_config(None, [*settings, f"probe.dataset={path}", *extra]))
        return " ".join(capsys.readouterr().out.split())

    return show


def test_the_plan_tells_of_it(plan, tmp_path):
    shown = plan(write_set(tmp_path), "probe.every_steps=50")
    assert "probe set: 3 classes, 60 images to train on, 24 to judge by; every 50 steps" in shown
    assert "8 x 8 px; statistics of dataset: the set's product level is not known (probe.product_level)" in shown
    shown = plan(write_set(tmp_path, bands=["B2", "B3", "B4", "B8A", "VV"]), "probe.product_level=l1c", "probe.size=16")
    assert "8 x 8 px scaled to 16 px; B8A stands in for B8; statistics of pretraining" in shown
    assert "probe" not in plan("null")


def test_the_plan_tells_what_a_multimae_reads(plan, tmp_path):
    shown = plan(write_set(tmp_path), system="multimae")
    assert (
        "the encoder reads rgb, depth (not semseg, ebands: the set lacks their bands); features are the mean over" in shown
    )
    assert "sentinel2 by statistics of dataset: the set's product level is not known (probe.product_level)" in shown
    assert "aster by statistics of pretraining: the checkpoint has those of aster" in shown


def test_images_that_judge_are_taken_from_train_where_there_is_no_val(plan, tmp_path):
    path = write_set(tmp_path)
    path.with_suffix(".json").write_text(json.dumps({"splits": {"train": list(range(60))}}))
    assert "48 images to train on, 12 to judge by" in plan(path)
    assert "32 images to train on, 8 to judge by" in plan(path, "probe.max_samples=40")


@pytest.mark.parametrize(
    ("attributes", "settings", "message"),
    [
        ({"bands": ["a", "b", "c", "d", "e"]}, (), r"no stored band can stand for B2, B3, B4, B8"),
        ({"classes": ["water", "trees"]}, (), r"label\[2\]: label 2; expected one of the classes 0..1 of set"),
        ({}, ("probe.size=20",), r"probe.size = 20: expected a multiple of the encoder's patch size 8, such as 16 or 24"),
        ({}, ("probe.format=geobench",), r"expected one GEO-Bench task"),
        ({}, ("probe.max_samples=2",), r"none of \d+ images can be held out|are of 1 class"),
    ],
)
def test_a_set_that_does_not_fit(plan, tmp_path, attributes, settings, message):
    with pytest.raises(DatasetError, match=rf"probe.dataset = .*set.h5: .*{message}") as error:
        plan(write_set(tmp_path, **attributes), *settings)
    assert not re.search(r"(?<!probe\.)\b(dataset|image)\.(?!h5)", str(error.value)), "the keys of an evaluation"


def test_a_set_without_bands_for_any_domain(plan, tmp_path):
    with pytest.raises(DatasetError, match=r"its bands B2, B3, B5, B8, VV make up no input domain") as error:
        plan(write_set(tmp_path, bands=["B2", "B3", "B5", "B8", "VV"]), system="multimae")
    assert "encoder." not in str(error.value)


def test_a_set_that_is_absent_or_of_another_kind(plan, tmp_path):
    with pytest.raises(DatasetError, match=r"probe.dataset = .*nowhere: probe.dataset: nothing at .*nowhere"):
        plan(tmp_path / "nowhere")
    image, label = np.ones((4, len(BANDS), 8, 8), np.uint16), np.zeros((4, 8, 8), np.int64)
    path = write_h5(tmp_path / "maps.h5", image, label, {"train": [0, 1], "val": [2, 3]}, bands=BANDS)
    with pytest.raises(ConfigError, match=r"maps is a segmentation task; the probe takes images with classes"):
        plan(path)


def test_it_needs_torchmetrics(plan, tmp_path):
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(ConfigError, match=r"needs the package torchmetrics: pip install mpmae\[eval\]"),
    ):
        plan(write_set(tmp_path))


def test_a_run_from_before_there_were_probes_goes_on():
    config = load_config(None, [])
    meta = checkpoint_meta(config, 0, 3, "fingerprint", 1, None)
    del meta["config"]["probe"]
    assert check_compatible(meta, config, "fingerprint", 1) == []
