"""The loss curve does not depend on engine, ranks or accumulation, and a killed run continues as if nothing had happened."""

from collections.abc import Container, Iterable

import numpy as np
import pytest

from tests.train.launches import kill_after_step, launch_ok

pytestmark = pytest.mark.timeout(900)
STEPS = 20
COMMON = (
    "model.name=mpmae_atto",
    "model.img_size=32",
    "train.global_batch_size=12",
    f"train.max_steps={STEPS}",
    "train.seed=7",
    "train.val_samples=2",
    "optim.lr=1e-3",
    "optim.warmup_steps=5",
    "data.num_workers=1",
    "checkpoint.every_steps=5",
)
CASES = {
    "1 rank": ("python", 1, ()),
    "1 rank, 4 micro steps": ("python", 1, ("train.micro_batch_size=3",)),
    "2 ranks": ("torchrun", 2, ()),
    "2 ranks, 2 micro steps": ("torchrun", 2, ("train.micro_batch_size=3",)),
    "fsdp": ("torchrun", 2, ("engine.name=fsdp",)),
    "3 ranks": ("torchrun", 3, ()),
    **{f"ZeRO-{n}": ("deepspeed", 2, ("--ds-config", f"configs/ds/zero{n}.json")) for n in range(4)},
    "ZeRO-2, 2 micro steps": ("deepspeed", 2, ("--ds-config", "configs/ds/zero2.json", "train.micro_batch_size=3")),
}


@pytest.fixture(scope="module")
def settings(shards_dir):
    return (f"data.shards={shards_dir}", *COMMON)


@pytest.fixture(scope="module")
def lines_of(settings, tmp_path_factory):
    """A function that gives the metrics of an uninterrupted run of a case; each case runs once."""
    done = {}

    def run(case: str) -> list[dict]:
        if case not in done:
            launcher, ranks, extra = CASES[case]
            done[case] = launch_ok(launcher, ranks, tmp_path_factory.mktemp("whole") / "run", *settings, *extra)
        return done[case]

    return run


def curve(lines: list[dict]) -> np.ndarray:
    """Total loss, every modality's loss and gradient norm per step."""
    rows = [[line["loss"], *line["losses"].values(), line["grad_norm"]] for line in lines]
    return np.array(rows, float)  # an absent modality's None becomes NaN


def test_the_reference_run_learns(lines_of):
    lines = lines_of("1 rank")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == 0.0


def log_variances(lines: list[dict]) -> np.ndarray:
    return np.array([list(line["log_variances"].values()) for line in lines])


SLOW = {"2 ranks, 2 micro steps", "ZeRO-0", "ZeRO-1"}  # tests/engine has every engine, on a smaller model


def marked(names: Iterable[str], slow: Container[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("case", marked(list(CASES)[1:], SLOW))
def test_same_curve(case, lines_of):
    expected = log_variances(lines_of("1 rank"))
    assert np.abs(expected[-1]).min() > 1e-4, "they are trained"
    np.testing.assert_allclose(log_variances(lines_of(case)), expected, atol=1e-5)
    np.testing.assert_allclose(curve(lines_of(case))[:, 0], curve(lines_of("1 rank"))[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    marked(("ZeRO-2", "2 ranks", "fsdp", "ZeRO-0", "ZeRO-1", "ZeRO-3"), {"2 ranks", "fsdp", "ZeRO-0", "ZeRO-1", "ZeRO-3"}),
)
def test_killed_and_resumed_equals_uninterrupted(case, settings, lines_of, tmp_path):
    """Bit by bit: `kill -9` after a step between two checkpoints, then --resume auto, in the middle of an epoch."""
    launcher, ranks, extra = CASES[case]
    kill_after_step(8, launcher, ranks, tmp_path / "run", *settings, *extra)
    resumed = launch_ok(launcher, ranks, tmp_path / "run", *settings, *extra, "--resume", "auto")
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert np.array_equal(curve(resumed), curve(lines_of(case)), equal_nan=True)
