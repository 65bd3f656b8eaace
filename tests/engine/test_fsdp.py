"""FSDP2 beyond what every engine does (test_engines.py): uneven shards, HSDP, host memory, scalars, DCP at other sizes.

One journey crosses three worlds: 2 x 2 ranks (HSDP) save, 1 rank goes on, then 3 (uneven shards).
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpmae.engine import init_world
from mpmae.errors import CheckpointError
from tests.engine.spawn import run_ranks
from tests.engine.test_engines import CLIP, FP32_BOUND, assert_close, assert_states_close
from tests.engine.toy import Case, Toy, make_engine, reference, run_case, train

HSDP = {"shard_size": 2}
LEGS = ((4, 0, 3, HSDP), (1, 3, 6, None), (3, 6, 10, None))  # ranks, first step, last step, options
BAD_STEP = 4


class ScalarToy(Toy):
    """With a parameter of no dimension, which cannot be sharded."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, *args, **kwargs):
        return super().forward(x * self.temperature, *args, **kwargs)


class WiderToy(Toy):
    """With a head that the checkpoint of a Toy does not have."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(3, 3)


def leg_of(argument) -> dict:
    """One leg of the journey, then the other cases of its world."""
    folder, (_, first, last, options), extra = argument
    world = init_world("toy")
    case = Case("fsdp", num_micro_steps=2, clip=CLIP, options=options)
    engine = make_engine(case, world)
    if first:
        engine.load(Path(folder) / str(first))
    record = train(engine, case, first, last)
    engine.save(Path(folder) / str(last))
    world.barrier()
    sizes = [(p.to_local().numel(), p.numel()) for p in engine.module.parameters() if isinstance(p, DTensor)]
    result = {"record": record, "state": engine.full_state_dict(), "sizes": sizes}
    engine.close()
    if world.world_size == 1:
        result["refused"] = [refused_load(world, folder, last, *trouble) for trouble in TROUBLES]
        result["syncs"] = syncs_of_a_step(world)
        result["snapshots"] = snapshots(world)
    if not options:
        result["scalars"] = [scalar_run(name, world) for name in ("ddp", "fsdp")]
    result["cases"] = [run_case(world, *each) for each in extra]
    world.close()
    return result


def scalar_run(name: str, world) -> tuple:
    case = Case(name, num_micro_steps=2, clip=CLIP)
    engine = make_engine(case, world, ScalarToy)
    record, state = train(engine, case, 0, 4), engine.full_state_dict()
    engine.close()
    return record, state


def torn(folder: Path) -> None:
    path = sorted((folder / "dcp").glob("*.distcp"))[0]
    path.write_bytes(path.read_bytes()[:2000])


def without_metadata(folder: Path) -> None:
    (folder / "dcp" / ".metadata").unlink()


def torn_metadata(folder: Path) -> None:
    path = folder / "dcp" / ".metadata"
    path.write_bytes(path.read_bytes()[:100])


def untouched(folder: Path) -> None:
    pass


TROUBLES = (
    (torn, Toy, "cannot be read"),
    (without_metadata, Toy, "is absent: the checkpoint is of another engine, or incomplete"),
    (torn_metadata, Toy, "cannot be read"),
    (untouched, WiderToy, "extra"),
    (untouched, ScalarToy, "temperature"),
)


def refused_load(world, folder: str, step: int, damage, module, words: str) -> str:
    copy = Path(folder) / "damaged"
    shutil.copytree(Path(folder) / str(step), copy)
    damage(copy)
    engine = make_engine(Case("fsdp"), world, module)
    try:
        engine.load(copy)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
        shutil.rmtree(copy)
    return "nothing was raised"


class CountSyncs(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def syncs_of_a_step(world) -> int:
    case = Case("fsdp", clip=CLIP)
    engine = make_engine(case, world)
    train(engine, case, 0, 1)
    original, mode = engine.step, CountSyncs()

    def watched(lr):
        with mode:
            return original(lr)

    engine.step = watched
    train(engine, case, 1, 2)
    engine.close()
    return mode.num


def snapshots(world) -> list:
    """A copied snapshot of before a step: its names, and whether the step changed it; the same for a live one."""
    case = Case("fsdp", clip=CLIP)
    engine = make_engine(case, world)
    train(engine, case, 0, 1)
    found = []
    for on_cpu in (True, False):
        state = engine.snapshot(on_cpu=on_cpu)
        weight, moment = state["module"]["conv.weight"], state["optimizer"]["state"]["conv.weight"]["exp_avg"]
        before = [each.to_local().clone() for each in (weight, moment)]
        train(engine, case, 1, 2)
        changed = [not torch.equal(each.to_local(), old) for each, old in zip((weight, moment), before, strict=True)]
        optimised = [name for group in state["optimizer"]["param_groups"] for name in group["params"]]
        found.append((list(state["module"]), optimised, changed))
    engine.close()
    return found


@pytest.fixture(scope="module")
def journey(tmp_path_factory) -> list[list[dict]]:
    """Per leg what each rank returned."""
    folder = tmp_path_factory.mktemp("journey")
    bad = Case("fsdp", num_micro_steps=2, clip=CLIP, bad_step=BAD_STEP)
    offloaded = Case("fsdp", num_micro_steps=2, clip=CLIP, options={"cpu_offload": True}, save_at=5)
    back = Case(
        "fsdp", num_micro_steps=2, clip=CLIP, options={"cpu_offload": True}, save_at=5, load_from=str(folder / "off")
    )
    hsdp_bad = Case("fsdp", num_micro_steps=2, clip=CLIP, bad_step=BAD_STEP, options=HSDP)
    extras = {4: [(hsdp_bad, None)], 3: [(bad, None), (offloaded, str(folder / "off")), (back, None)]}
    return [
        run_ranks(leg_of, leg[0], (str(folder), leg, extras.get(leg[0], [])), folder / f"world{leg[0]}", timeout_s=120)
        for leg in LEGS
    ]


def test_one_curve_over_three_worlds(journey):
    expected = reference(CLIP)
    for (_, first, last, _), ranks in zip(LEGS, journey, strict=True):
        for rank in ranks:
            assert_close(rank["record"]["loss"], expected["loss"][first:last], FP32_BOUND)
            assert_close(rank["record"]["grad_norm"], expected["grad_norm"][first:last], FP32_BOUND)
    assert_states_close(journey[-1][0]["state"], expected["state"], FP32_BOUND)


def test_each_rank_holds_its_shard(journey):
    for (num_ranks, _, _, options), ranks in zip(LEGS, journey, strict=True):
        num_copies = num_ranks // (options or {}).get("shard_size", num_ranks)
        for parameter in zip(*(rank["sizes"] for rank in ranks), strict=True):
            assert sum(local for local, _ in parameter) == num_copies * parameter[0][1]
        if num_ranks == 3:
            assert any(local == 0 for rank in ranks for local, _ in rank["sizes"]), "the case needs a shard of nothing"


@pytest.mark.parametrize("leg", [0, 2], ids=["HSDP", "3 ranks"])
def test_step_with_a_nan_changes_nothing(journey, leg):
    expected = reference(CLIP, skip=BAD_STEP)
    for rank in journey[leg]:
        result = rank["cases"][0]
        assert result["loss"].pop(BAD_STEP) != expected["loss"][BAD_STEP]
        assert_close(result["loss"], expected["loss"], FP32_BOUND)
    assert_states_close(journey[leg][0]["cases"][0]["state"], expected["state"], FP32_BOUND)


def test_host_memory_gives_the_same_curve_and_resumes_bit_by_bit(journey):
    expected = reference(CLIP)
    for rank in journey[-1]:
        _, saved, loaded = rank["cases"]
        assert_close(saved["loss"] + saved["rest_loss"], expected["loss"], FP32_BOUND)
        assert loaded["loss"] == saved["rest_loss"]
        assert loaded["grad_norm"] == saved["rest_grad_norm"]
    assert_states_close(journey[-1][0]["cases"][2]["state"], expected["state"], FP32_BOUND)


@pytest.mark.parametrize("leg", [1, 2], ids=["1 rank", "3 ranks"])
def test_a_scalar_parameter(journey, leg):
    for rank in journey[leg]:
        (ddp, ddp_state), (fsdp, fsdp_state) = rank["scalars"]
        assert_close(fsdp["loss"], ddp["loss"], FP32_BOUND)
        assert_close(fsdp["grad_norm"], ddp["grad_norm"], FP32_BOUND)
        if ddp_state:
            assert_states_close(fsdp_state, ddp_state, FP32_BOUND)
            assert abs(fsdp_state["temperature"].item() - 0.9) > 1e-3


def test_what_cannot_be_loaded_is_said(journey):
    for (_, _, words), message in zip(TROUBLES, journey[1][0]["refused"], strict=True):
        assert words in message


def test_a_step_does_not_wait_for_the_device(journey):
    assert journey[1][0]["syncs"] == 0


def test_a_snapshot_has_the_modules_names_and_a_copy_stays(journey):
    copied, live = journey[1][0]["snapshots"]
    assert copied[2] == [False, False]
    assert live[2] == [True, True]
    toy = Toy()
    assert copied[0] == live[0] == list(toy.state_dict())
    assert sorted(copied[1]) == sorted(name for name, p in toy.named_parameters() if p.requires_grad)
