"""Engines against plain torch on a toy model, at one and two ranks (real processes over gloo).

Bounds: float32, 10 steps, losses and gradient norms to 1e-6 relative, weights to 1e-6; what is left is the order of sums.
bf16: losses to 5e-3 of the float32 run, gradient norms to 2e-2. Resuming at the same world size: bit by bit.
"""

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch

from mpmae.engine import init_world
from mpmae.errors import ConfigError
from tests.engine.spawn import run_ranks
from tests.engine.toy import PEAK_LR, Case, Toy, make_engine, reference, run_cases, train

ENGINES = [("ddp", None), ("fsdp", None), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
IDS = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
CLIP = 0.5
FP32_BOUND = 1e-6
BF16_BOUND = 5e-3
BF16_GRAD_NORM_BOUND = 2e-2
BAD_STEP = 4


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["1rank", "2ranks"])
def results(request, tmp_path_factory) -> dict[tuple, list[dict[str, Any]]]:
    """Per (engine, kind of case) what each rank returned; all cases in one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {}
    for index, (engine, stage) in enumerate(ENGINES):
        plain = Case(engine, stage or 0)
        saved = dataclasses.replace(plain, num_micro_steps=2, clip=CLIP, save_at=5)
        at = str(folder / f"saved{index}")
        cases[engine, stage, "plain"] = (plain, None)
        cases[engine, stage, "saved"] = (saved, at)
        cases[engine, stage, "loaded"] = (dataclasses.replace(saved, load_from=at), None)
        cases[engine, stage, "bad"] = (Case(engine, stage or 0, num_micro_steps=2, clip=CLIP, bad_step=BAD_STEP), None)
        cases[engine, stage, "scaled"] = (dataclasses.replace(plain, lr_scale=0.25), None)
        for num in (1, 2, 4):
            steps = 10 if num == 4 else 1
            bf16 = Case(engine, stage or 0, num_micro_steps=num, precision="bf16", steps=steps)
            cases[engine, stage, f"bf16 x{num}"] = (bf16, None)
    by_rank = run_ranks(run_cases, request.param, list(cases.values()), folder)
    return {key: [rank[index] for rank in by_rank] for index, key in enumerate(cases)}


def assert_close(got: list[float], expected: list[float], bound: float) -> None:
    assert len(got) == len(expected)
    errors = [abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True)]
    assert max(errors) < bound, f"{max(errors)} at step {errors.index(max(errors))}: {got} and {expected}"


def assert_states_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert list(got) == list(expected)
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32, name
        assert tensor.device.type == "cpu", name
        assert (tensor - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_starts_from_rank_0s_weights(results, engine, stage):
    ranks = results[engine, stage, "plain"]
    assert_states_close(ranks[0]["initial"], reference(None)["initial"], 0.0)
    assert all(rank["initial"] is None and rank["state"] is None for rank in ranks[1:])


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_same_curve_as_plain_torch(results, engine, stage):
    expected = reference(None)
    for rank in results[engine, stage, "plain"]:
        assert_close(rank["loss"], expected["loss"], FP32_BOUND)
        assert_close(rank["grad_norm"], expected["grad_norm"], FP32_BOUND)
    assert_states_close(results[engine, stage, "plain"][0]["state"], expected["state"], FP32_BOUND)


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_same_curve_with_accumulation_and_clipping(results, engine, stage):
    expected = reference(CLIP)
    assert min(expected["grad_norm"]) > CLIP, "the case has to clip, and the reported norm is the one before"
    for rank in results[engine, stage, "saved"]:
        assert_close(rank["loss"] + rank["rest_loss"], expected["loss"], FP32_BOUND)
        assert_close(rank["grad_norm"] + rank["rest_grad_norm"], expected["grad_norm"], FP32_BOUND)
    assert_states_close(results[engine, stage, "saved"][0]["state"], expected["state"], FP32_BOUND)


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_a_group_with_a_scaled_rate(results, engine, stage):
    expected = reference(None, lr_scale=0.25)
    for rank in results[engine, stage, "scaled"]:
        assert_close(rank["loss"], expected["loss"], FP32_BOUND)
    assert_states_close(results[engine, stage, "scaled"][0]["state"], expected["state"], FP32_BOUND)
    unscaled = reference(None)["state"]
    assert max((expected["state"][name] - unscaled[name]).abs().max() for name in unscaled) > 1e-3


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_resumes_bit_by_bit(results, engine, stage):
    for saved, loaded in zip(results[engine, stage, "saved"], results[engine, stage, "loaded"], strict=True):
        for key in ("loss", "grad_norm", "draw"):
            assert loaded[key] == saved["rest_" + key], key
    assert_states_close(results[engine, stage, "loaded"][0]["state"], results[engine, stage, "saved"][0]["state"], 0.0)


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_step_with_a_nan_on_one_rank_changes_nothing_on_any(results, engine, stage):
    expected = reference(CLIP, skip=BAD_STEP)
    for rank in results[engine, stage, "bad"]:
        assert not math.isfinite(rank["grad_norm"].pop(BAD_STEP))
        assert not math.isfinite(rank["loss"].pop(BAD_STEP))
        assert_close(rank["loss"], expected["loss"], FP32_BOUND)
        assert_close(rank["grad_norm"], expected["grad_norm"], FP32_BOUND)
    assert_states_close(results[engine, stage, "bad"][0]["state"], expected["state"], FP32_BOUND)


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_bf16_stays_near_fp32(results, engine, stage):
    expected = reference(None)
    for rank in results[engine, stage, "bf16 x4"]:
        assert_close(rank["loss"], expected["loss"], BF16_BOUND)
        assert_close(rank["grad_norm"], expected["grad_norm"], BF16_GRAD_NORM_BOUND)
        assert rank["loss"] != expected["loss"]
    state = results[engine, stage, "bf16 x4"][0]["state"]
    assert any((t != t.bfloat16().float()).any() for t in state.values()), "the float32 masters, not the bf16 weights"


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_bf16_gradients_do_not_depend_on_accumulation(results, engine, stage):
    """DeepSpeed missed the output's tensors in a dataclass, and then the norm grew with the number of micro steps."""
    expected = reference(None)["grad_norm"][:1]
    for num_micro_steps in (1, 2, 4):
        for rank in results[engine, stage, f"bf16 x{num_micro_steps}"]:
            assert_close(rank["grad_norm"][:1], expected, BF16_GRAD_NORM_BOUND)


@pytest.mark.parametrize(("engine", "stage"), ENGINES, ids=IDS)
def test_first_bf16_step_has_the_right_size(results, engine, stage):
    """Adam's first update is the rate in size, whatever the gradient; a step counter that starts at 1 gives 0.73 of it."""
    expected = reference(None)
    result = results[engine, stage, "bf16 x4"][0]
    update, wanted = (
        torch.cat([(run["state_after_first"][name] - run["initial"][name]).flatten() for name in run["initial"]])
        for run in (result, expected)
    )
    lr = PEAK_LR / 3
    assert abs(wanted.abs().median().item() / lr - 1) < 0.05
    differs = (update - wanted).abs() > 0.02 * lr
    assert differs.float().mean() < 0.05, "only tiny gradients may round to another sign"


@dataclasses.dataclass
class Opaque:
    """An output into which DeepSpeed does not look."""

    loss: torch.Tensor


class OpaqueToy(Toy):
    """Returns a dataclass."""

    def forward(self, *args, **kwargs):
        return Opaque(super().forward(*args, **kwargs).loss)


def deepspeeds_refusals(case: Case) -> tuple[str, str]:
    """What is said of an output that it cannot look into, and of a disk that it cannot reach."""
    world = init_world("toy")
    engine = make_engine(case, world, OpaqueToy)
    with pytest.raises(TypeError) as output:
        train(engine, case, 0, 1)
    engine.close()
    to_disk = Case("deepspeed", 3, precision="bf16", ds_file="zero3_nvme", options={"nvme_path": "absent/disk"})
    without_libaio = mock.patch("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", return_value=False)
    with without_libaio, pytest.raises(ConfigError) as disk:
        make_engine(to_disk, world)
    world.close()
    return str(output.value), str(disk.value)


def test_what_deepspeed_cannot_do_is_refused(tmp_path):
    output, disk = run_ranks(deepspeeds_refusals, 1, Case("deepspeed", 1, precision="bf16"), tmp_path)[0]
    assert all(words in output for words in ("OpaqueToy.forward returned a Opaque", "NamedTuple", "tuples"))
    assert all(
        words in disk for words in ("libaio-dev", "zero3_offload.json", "engine.nvme_path = absent/disk is no folder")
    )


def two_worlds(case: Case) -> list[dict[str, Any]]:
    return [run_cases([(case, None)])[0] for _ in range(2)]


@pytest.mark.parametrize("case", [Case("deepspeed", 2, steps=2), Case("fsdp", steps=2)], ids=["zero2", "fsdp"])
def test_one_process_can_run_twice(tmp_path, case):
    first, second = run_ranks(two_worlds, 1, case, tmp_path)[0]
    assert first["loss"] == second["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_whole_matrix(tmp_path, num_ranks):
    cases = [
        Case(engine, stage or 0, num_micro_steps, clip, precision)
        for engine, stage in ENGINES
        for num_micro_steps in (1, 2, 4)
        for clip in (None, CLIP)
        for precision in ("fp32", "bf16")
    ]
    for stage in (1, 2, 3):
        offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        cases.append(Case("deepspeed", stage, 2, CLIP, ds_extra={"zero_optimization": offload}))
    by_rank = run_ranks(run_cases, num_ranks, [(case, None) for case in cases], tmp_path, timeout_s=500)
    for case, result in zip(cases, by_rank[0], strict=True):
        expected = reference(case.clip)
        bound = FP32_BOUND if case.precision == "fp32" else BF16_BOUND
        print(case.label)
        assert_close(result["loss"], expected["loss"], bound)
        assert_close(result["grad_norm"], expected["grad_norm"], bound if case.precision == "fp32" else BF16_GRAD_NORM_BOUND)
        assert_states_close(result["state"], expected["state"], bound)
