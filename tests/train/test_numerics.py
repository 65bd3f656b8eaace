"""What happens when losses or gradients are not finite, and what is noticed when they jump."""

import json
import math

import pytest
import torch

from mpmae.config import GuardSection
from mpmae.cost import Cost
from mpmae.engine import init_world
from mpmae.loader import BatchPlan
from mpmae.train.meter import Meter
from mpmae.train.numerics import MIN_STEPS, NumericsGuard, RecentSamples, with_loud_gradient
from mpmae.train.speed import Speed
from tests.engine.spawn import run_ranks
from tests.engine.toy import Case, global_batch, make_engine
from tests.train.launches import launch, metrics


def record(step=1, grad_norm=1.0, **losses) -> dict:
    return {"step": step, "epoch": 0, "loss": sum(v for v in losses.values() if v is not None), "losses": losses} | {
        "grad_norm": grad_norm
    }


def guard(clip=None, state=None, **settings) -> NumericsGuard:
    return NumericsGuard(GuardSection(**settings), clip, state)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_quiet_gradient(value):
    weight = torch.ones(3, requires_grad=True)
    with_loud_gradient(weight.sum() + value).backward()
    assert weight.grad.isnan().all()


def test_a_finite_loss_and_its_gradient_stay_as_they_are():
    weight = torch.tensor([0.1, 1e15], requires_grad=True)
    loss = weight.square().mul(0.3).sum()
    assert with_loud_gradient(loss) == loss
    (loud,) = torch.autograd.grad(with_loud_gradient(loss), weight, retain_graph=True)
    assert torch.equal(loud, torch.autograd.grad(loss, weight)[0])


def test_counts_survive_a_resume():
    first = guard(max_skipped_steps=3)
    notes = [first.check(record(step, biome=value)) for step, value in enumerate([1.0, math.nan, 1.0, math.nan], 1)]
    assert [len(each) for each in notes] == [0, 1, 0, 1]
    assert "step 2: skipped" in notes[1][0]
    assert "(biome)" in notes[1][0]
    second = guard(max_skipped_steps=3, state=json.loads(json.dumps(first.state())))
    bad = record(5, grad_norm=math.inf, biome=1.0)
    second.check(bad)
    assert (bad["skipped_steps"], bad["skipped_in_a_row"], second.is_exhausted) == (3, 2, False)
    second.check(record(6, biome=math.inf))
    assert second.is_exhausted
    assert second.state()["skipped_steps"] == 4


def losses_of(step: int, scale: float = 1.0) -> dict:
    wave = 1 + 0.3 * math.sin(step)
    return {"sentinel2": 500 * wave * scale, "biome": 0.01 * wave * scale, "era5": None if step % 3 else wave}


def test_a_spike_is_measured_by_each_modalitys_own_past():
    watch = guard(spike_factor=3.0)
    for step in range(60):
        quiet = record(step, **losses_of(step))
        assert watch.check(quiet) == []
        assert quiet["spike"] is False
    spike = record(60, **losses_of(60, scale=5.0))
    (note,) = watch.check(spike)
    assert spike["spike"] is True
    assert "step 60" in note
    assert "sentinel2" in note
    small = record(61, **losses_of(61) | {"biome": 0.04})
    assert watch.check(small) == [], "one small modality does not rule, and no spike stays in the median"
    resumed = guard(spike_factor=3.0, state=watch.state())
    assert resumed.check(record(62, **losses_of(62, scale=5.0)))
    assert guard(spike_factor=None, state=watch.state()).check(record(62, **losses_of(62, scale=5.0))) == []


def test_no_spike_before_there_is_a_past():
    watch = guard()
    assert all(watch.check(record(step, biome=10.0**step)) == [] for step in range(MIN_STEPS))


def test_the_share_of_clipped_steps():
    watch, percents = guard(clip=2.0), []
    for grad_norm in (1.0, 3.0, math.nan, 3.0, 4.0):
        percents.append(record(1, grad_norm, biome=1.0))
        watch.check(percents[-1])
    assert [each["clipped_percent"] for each in percents] == [0, 50, 50, pytest.approx(200 / 3), 75]
    without = record(1, biome=1.0)
    guard().check(without)
    assert without["clipped_percent"] is None


def test_samples_of_the_last_steps():
    samples = RecentSamples(num_steps=2)
    for step in (1, 2, 3):
        for start in (0, 2):
            samples.add(step, torch.arange(start, start + 2) + 10 * step)
    assert samples.of(2) == [[20, 21], [22, 23]]
    assert samples.of(3) == [[30, 31], [32, 33]]


CASES = (Case("ddp"), Case("deepspeed", 0), Case("deepspeed", 1), Case("deepspeed", 3), Case("fsdp"))


def on_two_ranks(_) -> list:
    """Per engine: whether weights outlive an infinite loss of rank 1 whose gradient is finite; the step's numbers."""
    world = init_world("toy")
    speed = Speed(Cost({}, "fp32", 0), BatchPlan(16, 8, 1, world.world_size), None, 1, False)
    outcomes = []
    for case in CASES:
        engine = make_engine(case, world)
        meter = Meter(engine, ("a", "b"), speed, 1, num_choices=3)
        before = engine.full_state_dict()
        batch = {key: value[world.rank * 8 : world.rank * 8 + 8] for key, value in global_batch(0).items()}
        out = engine.forward(**batch, num_b=5)
        loss = out.loss + (torch.inf if world.rank == 1 else 0)
        engine.backward(with_loud_gradient(loss))
        log_vars = {"a": torch.tensor(0.5), "b": torch.tensor(0.25)}
        meter.add(loss, out.losses, log_vars, {"a": 16, "b": 0})
        meter.finish_step(1, 0, 0.1, engine.step(0.1), votes=[2] if world.rank == 1 else [])
        after = engine.full_state_dict()
        (finished,) = meter.ready()
        same = before is None or all(torch.equal(before[name], after[name]) for name in before)
        outcomes.append((same, finished))
        engine.close()
    world.close()
    return outcomes


def test_every_engine_skips_a_step_with_an_infinite_loss(tmp_path):
    for rank, outcomes in enumerate(run_ranks(on_two_ranks, 2, None, tmp_path, timeout_s=120)):
        for case, (same, finished) in zip(CASES, outcomes, strict=True):
            assert same, case.label
            assert finished.num_votes == [0, 0, 1]
            assert not math.isfinite(finished.record["grad_norm"])
            assert finished.record["loss"] == math.inf
            assert finished.record["losses"]["b"] is None
            assert finished.record["log_variances"] == {"a": 0.5, "b": 0.25}
            assert math.isfinite(finished.own_loss) == (rank == 0)


def test_a_run_without_finite_losses_ends_and_writes_the_batch_down(shards_dir, tmp_path):
    run_dir = tmp_path / "run"
    settings = ("train.global_batch_size=8", "train.max_steps=50", "optim.warmup_steps=1", "data.num_workers=1")
    settings += ("model.modalities_out=[biome, era5]", "guard.max_skipped_steps=2", "train.micro_batch_size=2")
    done = launch("torchrun", 2, f"run.dir={run_dir}", f"data.shards={shards_dir}", *settings, fault="infinite_loss 1 2")
    assert done.returncode == 1
    assert done.stdout.count("2 steps in a row without a finite loss and gradient") == 2, "every rank says so"
    assert "modalities: biome, ranks: 1;" in done.stdout
    assert "note: step 3: skipped" in done.stdout
    lines = metrics(run_dir)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2]
    assert lines[0]["log_variances"] == {"biome": 0.0, "era5": 0.0}
    assert lines[-1]["log_variances"] == lines[2]["log_variances"] != lines[0]["log_variances"], (
        "skipped steps change nothing"
    )
    bad = json.loads((run_dir / "bad_batch.json").read_text())
    assert (bad["step"], bad["bad_ranks"], bad["loss"]) == (4, [1], math.inf)
    assert [len(each["sample_ids"]) for each in bad["ranks"]] == [2, 2], "two micro steps"
    ids = [number for each in bad["ranks"] for micro in each["sample_ids"] for number in micro]
    assert len(set(ids)) == 8
    assert bad["ranks"][0]["keys"][0][0] == f"{bad['ranks'][0]['sample_ids'][0][0]:08d}"
    assert math.isfinite(bad["ranks"][1]["losses"]["era5"])
