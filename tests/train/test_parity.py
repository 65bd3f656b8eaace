"""The loss curve does not depend on engine, ranks or accumulation, and a killed run continues as if nothing had happened."""

from collections.abc import Container, Iterable, Mapping

import numpy as np
import pytest

from tests.train.launches import kill_after_step, launch_ok

pytestmark = pytest.mark.timeout(900)
STEPS = 12
COMMON = (
    "model.img_size=32",
    "model.loss_weighting=uncertainty",
    "train.global_batch_size=12",
    f"train.max_steps={STEPS}",
    "train.seed=7",
    "train.val_samples=2",
    "optim.lr=1e-3",
    "optim.warmup_steps=3",
    "data.num_workers=1",
    "checkpoint.every_steps=3",
)
SYSTEMS = {
    "mpmae": ("model.name=mpmae_atto",),
    "multimae": ("model.name=multimae_tiny", "model.decoder_dim=32", "model.domains_in=[rgb,depth,semseg,sentinel1]"),
}
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
    """A function that gives the metrics of an uninterrupted run of a system and case; each runs once."""
    done = {}

    def run(system: str, case: str) -> list[dict]:
        if (system, case) not in done:
            launcher, ranks, extra = CASES[case]
            folder = tmp_path_factory.mktemp("whole") / "run"
            done[system, case] = launch_ok(launcher, ranks, folder, *settings, *SYSTEMS[system], *extra)
        return done[system, case]

    return run


def curve(lines: list[dict]) -> np.ndarray:
    """Total loss, every modality's loss and gradient norm per step."""
    rows = [[line["loss"], *line["losses"].values(), line["grad_norm"]] for line in lines]
    return np.array(rows, float)  # an absent modality's None becomes NaN


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_reference_run_learns(system, lines_of):
    lines = lines_of(system, "1 rank")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == 0.0


def log_variances(lines: list[dict]) -> np.ndarray:
    return np.array([list(line["log_variances"].values()) for line in lines])


# what runs by default: each engine with one of the systems; tests/engine has every engine, on a smaller model
DEFAULT = {
    "mpmae": ("1 rank, 4 micro steps", "2 ranks", "ZeRO-2"),
    "multimae": ("3 ranks", "fsdp", "ZeRO-3"),
}


def pairs(cases: Iterable[str], default: Mapping[str, Container[str]]) -> list:
    """(system, case) of both systems, those that are not in `default` as slow ones."""
    return [
        pytest.param(system, case, marks=() if case in default[system] else pytest.mark.slow, id=f"{system}, {case}")
        for system in SYSTEMS
        for case in cases
    ]


@pytest.mark.parametrize(("system", "case"), pairs(list(CASES)[1:], DEFAULT))
def test_same_curve(system, case, lines_of):
    expected, found = lines_of(system, "1 rank"), lines_of(system, case)
    assert np.abs(log_variances(expected)).max(0).min() > 1e-4, "they are trained"
    np.testing.assert_allclose(log_variances(found), log_variances(expected), atol=1e-5)
    np.testing.assert_allclose(curve(found)[:, 0], curve(expected)[:, 0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ZeRO-3", "fsdp"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_engines_agree_in_bf16(system, case, settings, tmp_path):
    """With weights kept or gathered in bf16, the parameters outside the blocks and the tables of positions among them."""
    curves = []
    for launcher, ranks, extra in (CASES["1 rank"], CASES[case]):
        options = (*SYSTEMS[system], "train.max_steps=4", "train.precision=bf16", *extra)
        curves.append(curve(launch_ok(launcher, ranks, tmp_path / str(ranks), *settings, *options))[:, 0])
    np.testing.assert_allclose(*curves, rtol=0.02)


@pytest.mark.parametrize(
    ("system", "case"),
    pairs(("ZeRO-2", "2 ranks", "fsdp", "ZeRO-0", "ZeRO-1", "ZeRO-3"), {"mpmae": {"ZeRO-2"}, "multimae": {"fsdp"}}),
)
def test_killed_and_resumed_equals_uninterrupted(system, case, settings, lines_of, tmp_path):
    """Bit by bit: `kill -9` after a step between two checkpoints, then --resume auto, in the middle of an epoch."""
    launcher, ranks, extra = CASES[case]
    options = (*settings, *SYSTEMS[system], *extra)
    kill_after_step(8, launcher, ranks, tmp_path / "run", *options)
    resumed = launch_ok(launcher, ranks, tmp_path / "run", *options, "--resume", "auto")
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert np.array_equal(curve(resumed), curve(lines_of(system, case)), equal_nan=True)
