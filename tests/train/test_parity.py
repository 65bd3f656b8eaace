"""The loss curve does not depend on engine, ranks or accumulation, and a killed run continues as if nothing had happened."""

import numpy as np
import pytest

from tests.train.launches import kill_after_step, launch_ok

pytestmark = pytest.mark.timeout(900)
STEPS = 20
COMMON = (
    "model.name=mpmae_atto",
    "train.global_batch_size=12",
    f"train.max_steps={STEPS}",
    "train.seed=7",
    "optim.lr=1e-3",
    "optim.warmup_steps=5",
    "data.num_workers=1",
)
CASES = {
    "1 rank": ("python", 1, ()),
    "1 rank, 2 micro steps": ("python", 1, ("train.micro_batch_size=6",)),
    "1 rank, 4 micro steps": ("python", 1, ("train.micro_batch_size=3",)),
    "2 ranks": ("torchrun", 2, ()),
    "2 ranks, 2 micro steps": ("torchrun", 2, ("train.micro_batch_size=3",)),
    "3 ranks": ("torchrun", 3, ()),
    **{f"ZeRO-{n}": ("deepspeed", 2, ("--ds-config", f"configs/ds/zero{n}.json")) for n in range(4)},
    "ZeRO-2, 2 micro steps": ("deepspeed", 2, ("--ds-config", "configs/ds/zero2.json", "train.micro_batch_size=3")),
}


@pytest.fixture(scope="module")
def settings(shards_dir):
    return (f"data.shards={shards_dir}", *COMMON)


@pytest.fixture(scope="module")
def reference(settings, tmp_path_factory):
    launcher, ranks, extra = CASES["1 rank"]
    return launch_ok(launcher, ranks, tmp_path_factory.mktemp("reference") / "run", *settings, *extra)


def curve(lines: list[dict]) -> np.ndarray:
    """Total loss, every modality's loss and gradient norm per step."""
    rows = [[line["loss"], *line["losses"].values(), line["grad_norm"]] for line in lines]
    return np.array(rows, float)  # an absent modality's None becomes NaN


def test_the_reference_run_learns(reference):
    assert [line["step"] for line in reference] == list(range(1, STEPS + 1))
    assert reference[-1]["loss"] < reference[0]["loss"]
    assert reference[0]["lr"] == 0.0


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_same_curve(case, settings, reference, tmp_path):
    launcher, ranks, extra = CASES[case]
    got = launch_ok(launcher, ranks, tmp_path / "run", *settings, *extra)
    np.testing.assert_allclose(curve(got)[:, 0], curve(reference)[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("torchrun", ()), *(("deepspeed", ("--ds-config", f"configs/ds/zero{n}.json")) for n in (1, 2, 3))],
    ids=["ddp", "zero1", "zero2", "zero3"],
)
def test_killed_and_resumed_equals_uninterrupted(launcher, extra, settings, tmp_path):
    """Bit by bit: `kill -9` after a step between two checkpoints, then --resume auto, in the middle of an epoch."""
    every = "checkpoint.every_steps=5"
    whole = launch_ok(launcher, 2, tmp_path / "whole" / "run", *settings, *extra, every)
    run_dir = tmp_path / "killed" / "run"
    run_dir.parent.mkdir()
    kill_after_step(8, launcher, 2, run_dir, *settings, *extra, every)
    resumed = launch_ok(launcher, 2, run_dir, *settings, *extra, every, "--resume", "auto")
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert np.array_equal(curve(resumed), curve(whole), equal_nan=True)
