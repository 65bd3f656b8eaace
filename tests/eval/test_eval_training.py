"""The fine-tuning loop: what it reads, its schedule, the epoch it chooses, resuming, ranks."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

import mpmae.eval.training as training
from mpmae.engine.world import init_world
from mpmae.errors import ConfigError, TrainingError
from mpmae.eval.training_data import Examples, shuffled, split_steps, stack
from mpmae.files import read_jsonl
from tests.engine.spawn import fork_ranks
from tests.eval.bright_bands import bright_bands
from tests.eval.tuning import ALL_CHANGES, ALONE, ScriptedSetup, run, section, small_setup


def state_of(setup):
    return {name: value.clone() for name, value in setup.model.state_dict().items()}


def assert_same(states):
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own():
    indices = np.arange(100, 137)
    orders = [shuffled(indices, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(indices) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], shuffled(indices, 0, 0))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_ranks_share_out_every_step(world_size, micro_batch_size):
    indices = np.arange(37)
    ranks = [split_steps(indices, 8, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(steps) for steps in ranks} == {5}
    for number in range(5):
        parts = [steps[number] for steps in ranks]
        assert len({len(pieces) for pieces in parts}) == 1, "as many micro steps on every rank"
        taken = sorted(index for pieces in parts for piece in pieces for index in piece)
        assert taken == list(range(8 * number, min(8 * number + 8, 37)))
        assert max(len(piece) for pieces in parts for piece in pieces) <= (micro_batch_size or 8)


def test_what_fits_is_kept():
    labelled = bright_bands(sizes=(4, 4, 4))
    setup = small_setup(labelled)
    size = 4 * 16 * 16 * 4 + 8 + 8
    examples = Examples(labelled, num_workers=2, cache_bytes=2 * size)
    for _ in range(3):
        for piece in examples.read(setup.prepare, [np.array([0, 1, 2]), np.array([], int), np.array([3])]):
            assert all(torch.equal(e.images[0], torch.from_numpy(labelled._images[e.index])) for e in piece)
    assert sorted(labelled.reads.values()) == [1, 1, 3, 3]


def test_the_last_short_batch_counts(tmp_path):
    labelled = bright_bands(sizes=(17, 4, 4))
    setup, seen = small_setup(labelled, epochs=2, batch_size=8), []
    change = setup.augment
    setup.augment = lambda batch, epoch: seen.append((epoch, batch.keys)) or change(batch, epoch)
    run(setup, labelled, tmp_path / "run", num_workers=2)
    assert [len(keys) for _, keys in seen] == [8, 8, 1] * 2
    for epoch in (0, 1):
        keys = np.concatenate([keys for at, keys in seen if at == epoch])
        assert sorted(keys >> 12) == list(range(17))


def test_the_rate_follows_the_schedule(tmp_path, monkeypatch):
    rates, scales = [], set()
    labelled = bright_bands(sizes=(20, 4, 4))
    setup = small_setup(labelled, epochs=4, batch_size=8, lr=None, blr=0.32, warmup_epochs=1, min_lr=0.001, layer_decay=0.5)
    update = training.update

    def spied(optimizer, parameters, norm, clip, lr):
        update(optimizer, parameters, norm, clip, lr)
        rates.append(lr)
        scales.update(group["lr"] / lr for group in optimizer.param_groups if lr)

    monkeypatch.setattr(training, "update", spied)
    run(setup, labelled, tmp_path / "run")
    peak = 0.32 * 8 / 256
    for number, rate in enumerate(rates):
        epoch = number / 3
        cosine = 0.001 + (peak - 0.001) * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 3))
        assert rate == pytest.approx(peak * epoch if epoch < 1 else cosine)
    assert len(rates) == 12
    assert sorted({round(scale, 9) for scale in scales}) == [0.5**depth for depth in (5, 4, 3, 2, 1, 0)]


def test_groups_of_a_frozen_encoder():
    labelled = bright_bands()
    setup = small_setup(labelled, freeze=True, weight_decay=0.3)
    groups = setup.begin_epoch(0)
    assert [(p.shape, g["weight_decay"]) for g in groups for p in g["params"]] == [((3,), 0.0), ((3, 16), 0.3)]
    assert {name for name, p in setup.model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert setup.begin_epoch(1) == []


@pytest.mark.parametrize(("kind", "epochs"), [("multiclass", 6), ("multilabel", 20)])
def test_a_task_with_a_known_answer_is_learned(tmp_path, kind, epochs):
    labelled = bright_bands(kind, sizes=(48, 24, 24), contrast=2.0)
    fitted = run(small_setup(labelled, epochs=epochs), labelled, tmp_path / "run")
    assert fitted.test.metrics[labelled.task.metric] > 0.95
    blind = run(small_setup(labelled, epochs=1, lr=1e-9), labelled, tmp_path / "blind")
    assert blind.test.metrics[labelled.task.metric] < 0.8
    if kind == "multiclass":
        assert set(fitted.test.per_sample) == {f"sample-{index}" for index in labelled.splits["test"]}
        assert np.mean(list(fitted.test.per_sample.values())) == pytest.approx(fitted.test.metrics["accuracy"])


def test_the_epoch_is_chosen_on_validation_and_tested_once(tmp_path):
    labelled = bright_bands(sizes=(4, 10, 10))
    num_right = {"val": [2, 7, 7, 5], "test": [9, 3, 10, 8]}
    setup = ScriptedSetup(labelled, num_right, epochs=4)
    fitted = run(setup, labelled, tmp_path / "run")
    assert (fitted.best_epoch, fitted.num_epochs) == (1, 4)
    assert fitted.val.metrics["accuracy"] == pytest.approx(0.7)
    assert fitted.test.metrics["accuracy"] == pytest.approx(0.3), "of the chosen epoch, not of the best on the test split"
    assert setup.model.epoch == 1, "its weights are left in the model"
    times = {name: {labelled.reads[index] for index in indices} for name, indices in labelled.splits.items()}
    assert times == {"train": {4}, "val": {4}, "test": {1}}
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["val_accuracy"] for record in records] == pytest.approx([0.2, 0.7, 0.7, 0.5])
    assert [record["best_epoch"] for record in records] == [0, 1, 1, 1]


def test_an_epoch_without_a_metric_is_not_the_best(tmp_path, monkeypatch):
    labelled = bright_bands(sizes=(4, 10, 10))
    values = iter([math.nan, 0.2, math.nan, 0.1, 0.4])
    monkeypatch.setattr(training.Metrics, "compute", lambda self: {"accuracy": next(values)})
    fitted = run(ScriptedSetup(labelled, {"val": [1] * 4, "test": [1] * 4}, epochs=4), labelled, tmp_path / "run")
    assert (fitted.best_epoch, fitted.val.metrics["accuracy"], fitted.test.metrics["accuracy"]) == (1, 0.2, 0.4)


def test_patience_ends_a_run(tmp_path):
    labelled = bright_bands(sizes=(4, 10, 10))
    num_right = {"val": [2, 7, 7, 5, 9], "test": [1] * 5}
    fitted = run(ScriptedSetup(labelled, num_right, epochs=5, patience_epochs=2), labelled, tmp_path / "run")
    assert (fitted.best_epoch, fitted.num_epochs) == (1, 4)


OPTIONS = {"augment": ALL_CHANGES, "drop_path": 0.3, "clip_grad_norm": 1.0, "micro_batch_size": 5, "cache_bytes": 1 << 20}


def test_a_resumed_run_ends_as_one_left_alone(tmp_path):
    labelled = bright_bands(sizes=(21, 8, 8))
    whole = small_setup(labelled, **OPTIONS)
    expected = run(whole, labelled, tmp_path / "whole", identity={"encoder": "a"})

    class Killed(BaseException):
        pass

    for last in (1, 3):
        broken = small_setup(labelled, **OPTIONS)
        begin = broken.begin_epoch

        def die(epoch, last=last, begin=begin):
            if epoch == last:
                raise Killed
            return begin(epoch)

        broken.begin_epoch = die
        with pytest.raises(Killed):
            run(broken, labelled, tmp_path / "parts", identity={"encoder": "a"}, resume=last > 1)
        torch.rand(7)  # a resumed process has drawn other numbers
    labelled.reads.clear()
    rest = small_setup(labelled, seed=0, **OPTIONS)
    assert run(rest, labelled, tmp_path / "parts", identity={"encoder": "a"}, resume=True) == expected
    assert_same([state_of(whole), state_of(rest)])
    assert labelled.reads[int(labelled.splits["test"][0])] == 1
    curves = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    for record in (*curves[0], *curves[1]):
        del record["epoch_s"]
    assert curves[0] == curves[1]
    assert not (tmp_path / "parts" / "state.pt").exists()

    again = small_setup(labelled, seed=5, **OPTIONS)
    labelled.reads.clear()
    assert run(again, labelled, tmp_path / "parts", identity={"encoder": "a"}, resume=True) == expected
    assert not labelled.reads, "what has ended is not run again"
    assert_same([state_of(whole), state_of(again)])


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    labelled = bright_bands(sizes=(8, 4, 4))
    run(small_setup(labelled, epochs=1), labelled, tmp_path, identity={"finetune.blr": 0.1, "same": 1})
    with pytest.raises(ConfigError, match=r"finetune.blr was 0.1, now 0.2"):
        run(small_setup(labelled, epochs=1), labelled, tmp_path, identity={"finetune.blr": 0.2, "same": 1}, resume=True)
    with pytest.raises(ConfigError, match="holds a run already; pass --resume auto"):
        run(small_setup(labelled, epochs=1), labelled, tmp_path)


def test_the_callers_random_state_stays(tmp_path):
    labelled = bright_bands(sizes=(8, 4, 4))
    setup = small_setup(labelled, epochs=1, **{k: v for k, v in OPTIONS.items() if k != "cache_bytes"})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(setup, labelled, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_that_diverges_says_so(tmp_path):
    labelled = bright_bands(sizes=(8, 4, 4))
    setup = small_setup(labelled, epochs=1)
    setup.model.head.weight.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"diverged; lower finetune.blr"):
        run(setup, labelled, tmp_path)


def test_splits_that_do_not_do(tmp_path):
    labelled = bright_bands(sizes=(8, 4, 4))
    labelled.splits = {"train": np.arange(8), "test": np.arange(8, 9)}
    world = training.World(0, 0, 2, 2, torch.device("cpu"), "gloo")
    with pytest.raises(ConfigError) as error:
        run(small_setup(labelled, warmup_epochs=4), labelled, tmp_path, world=world)
    assert len(error.value.problems) == 3
    assert "finetune.warmup_epochs = 4 of 4 epochs" in str(error.value)
    assert "split val has no samples" in str(error.value)
    assert "split test has 1 samples for 2 ranks" in str(error.value)


def in_float64(kind, folder, **options):
    """A run in which the order of a sum shows in the last digits alone, and what has become of it."""
    labelled = bright_bands(kind, sizes=(17, 9, 9))
    world = options.pop("world", ALONE)
    setup = small_setup(labelled, dtype=torch.float64, augment={"crop_min_area": 0.5}, **options)
    fitted = run(setup, labelled, folder, world=world, num_workers=1)
    return fitted, {name: value.numpy() for name, value in setup.model.state_dict().items()}, labelled


def on_a_rank(argument):
    kind, folder = argument
    fitted, state, labelled = in_float64(kind, folder, world=init_world(), micro_batch_size=3)
    return fitted, state, dict(labelled.reads)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_two_ranks_train_as_one(tmp_path, kind):
    expected, expected_state, labelled = in_float64(kind, tmp_path / "one")
    ranks = fork_ranks(on_a_rank, 2, (kind, tmp_path / "two"), timeout_s=120)
    for fitted, state, _ in ranks:
        assert fitted.test.metrics == expected.test.metrics
        assert fitted.test.per_sample == expected.test.per_sample
        assert fitted.test.loss == pytest.approx(expected.test.loss, rel=1e-6)
        for name, value in expected_state.items():
            np.testing.assert_allclose(state[name], value, rtol=1e-9, atol=1e-12)
    reads = sum((Counter(reads) for _, _, reads in ranks), Counter())
    assert {reads[int(index)] for index in labelled.splits["test"]} == {1}
    assert {reads[int(index)] for index in labelled.splits["train"]} == {4}
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["test"]["metrics"] == expected.test.metrics
    assert len(read_jsonl(tmp_path / "two" / "metrics.jsonl")) == 4


def test_windows_of_an_image_share_its_target():
    labelled = bright_bands("multilabel", sizes=(2, 1, 1))
    setup = small_setup(labelled)
    setup.preparation = lambda image: torch.from_numpy(image)[None].expand(3, -1, -1, -1)
    examples = next(Examples(labelled, 0).read(setup.prepare, [np.array([0, 1])]))
    batch = stack(examples, ALONE.device)
    assert batch.images.shape == (6, 4, 16, 16)
    assert torch.equal(batch.targets, torch.from_numpy(labelled._labels[[0, 0, 0, 1, 1, 1]]))
    assert batch.keys.tolist() == [0, 1, 2, 4096, 4097, 4098]
    outputs = torch.arange(18.0).reshape(6, 3) / 9 - 1
    ((scores, target),) = setup.predict(outputs, examples)
    torch.testing.assert_close(scores, torch.stack([outputs[:3].sigmoid().mean(0), outputs[3:].sigmoid().mean(0)]))
    assert torch.equal(target, torch.from_numpy(labelled._labels[:2]))


def test_bf16_learns_too(tmp_path):
    labelled = bright_bands(sizes=(24, 12, 12))
    setup = small_setup(labelled, precision="bf16", epochs=6)
    assert run(setup, labelled, tmp_path).test.metrics["accuracy"] > 0.9
    assert section().precision == "fp32"
