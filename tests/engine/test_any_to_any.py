"""A checkpoint of any engine and world size continues under any other, as if nothing had happened.

Bounds, against plain torch without an interruption, 10 steps, saved after 5: those of test_engines.py (float32: losses and
gradient norms to 1e-6 relative, weights to 1e-6; bf16: 5e-3 and 2e-2). What was read is bit by bit what was saved.
"""

import dataclasses
import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpmae.checkpoint_tools.convert import convert
from mpmae.engine import init_world
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.compatibility import checkpoint_meta
from mpmae.train.engine_state import load_engine, write_engine
from tests.engine.spawn import fork_ranks, run_ranks
from tests.engine.test_engines import BF16_BOUND, BF16_GRAD_NORM_BOUND, CLIP, FP32_BOUND, assert_close, assert_states_close
from tests.engine.toy import DS_FOLDER, Case, make_engine, reference, run_config, train

ENGINES = {
    "ddp": Case("ddp"),
    "fsdp": Case("fsdp"),
    **{f"zero{stage}": Case("deepspeed", stage) for stage in range(4)},
    "ddp-bf16": Case("ddp", precision="bf16"),
    "fsdp-bf16": Case("fsdp", precision="bf16"),
    **{f"zero{stage}-bf16": Case("deepspeed", stage, precision="bf16") for stage in range(4)},
}
FP32 = [name for name in ENGINES if "bf16" not in name]
WORLD_SIZES = (1, 2, 3, 4)
SAVED_AT, STEPS = 5, 10
Source = tuple[str, int]  # engine and world size
Pair = tuple[Source, Source]


def case_of(name: str) -> Case:
    return dataclasses.replace(ENGINES[name], clip=CLIP)


def session(argument: tuple[str, list[tuple[str, Source]], list[str]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """In one world: continue each source under its target engine, then train and save under each engine of a list.

    Per continuation what `train` gave, the weights as read and at the end, and the notes; per engine saved its weights.
    """
    folder, pairs, names = argument
    world = init_world("toy")
    continued, saved = [], {}
    for name, (source, source_size) in pairs:
        engine = make_engine(case_of(name), world)
        checkpoint = Checkpoints(Path(folder) / f"{source}-{source_size}", 1, world).latest()
        notes = load_engine(engine, checkpoint)
        read = engine.full_state_dict()
        record = train(engine, case_of(name), SAVED_AT, STEPS)
        continued.append({**record, "read": read, "state": engine.full_state_dict(), "notes": notes})
        engine.close()
    for name in names:
        engine = make_engine(case_of(name), world)
        train(engine, case_of(name), 0, SAVED_AT)
        checkpoints = Checkpoints(Path(folder) / f"{name}-{world.world_size}", 1, world)
        checkpoints.save(SAVED_AT, write_engine(engine), {})
        saved[name] = engine.full_state_dict()
        engine.close()
    world.close()
    return continued, saved


def run(folder: Path, size: int, pairs: list[Pair], saved: dict[Source, dict], names: list[str] = ()) -> None:
    """Continue the pairs whose target has `size` ranks, and check them; save `names` there, which `saved` gets."""
    wanted = [(target, source) for source, (target, target_size) in pairs if target_size == size]
    by_rank = fork_ranks(session, size, (str(folder), wanted, names), timeout_s=900)
    for index, (target, source) in enumerate(wanted):
        try:
            check([rank[0][index] for rank in by_rank], saved[source], target, source, size)
        except AssertionError as error:
            raise AssertionError(f"{source[0]} on {source[1]} ranks to {target} on {size}: {error}") from error
    saved |= {(name, size): by_rank[0][1][name] for name in names}


def matrix(argument: tuple[str, list[Pair]]) -> None:
    """Save every source, then continue every pair."""
    import_engines()
    folder, pairs = Path(argument[0]), argument[1]
    saved: dict[Source, dict] = {}
    for size in WORLD_SIZES:
        run(folder, size, [], saved, sorted({name for (name, source_size), _ in pairs if source_size == size}))
    for size in WORLD_SIZES:
        run(folder, size, pairs, saved)


def check(ranks: list[dict], saved: dict[str, torch.Tensor], target: str, source: Source, size: int) -> None:
    exact = "bf16" not in target or target.startswith(("ddp", "fsdp", "zero0"))
    for name, tensor in ranks[0]["read"].items():
        frozen = name in ("frozen", "offset")  # those a bf16 ZeRO engine holds in bf16
        assert (frozen and not exact) or torch.equal(tensor, saved[name]), name
    expected = reference(CLIP)
    is_bf16 = "bf16" in target + source[0]
    bound, norm_bound = (BF16_BOUND, BF16_GRAD_NORM_BOUND) if is_bf16 else (FP32_BOUND, FP32_BOUND)
    for rank in ranks:
        assert_close(rank["loss"], expected["loss"][SAVED_AT:], bound)
        assert_close(rank["grad_norm"], expected["grad_norm"][SAVED_AT:], norm_bound)
    if not is_bf16:
        assert_states_close(ranks[0]["state"], expected["state"], FP32_BOUND)
    freely = {"ddp", "fsdp"} & {target.split("-")[0]} & {source[0].split("-")[0]}
    assert len(ranks[0]["notes"]) == (0 if freely or (target, size) == source else 1)


def relay(folder: str) -> None:
    import_engines()
    sizes, saved = (2, 3, 4, 1, 2), {}
    halves = (FP32[0::2], FP32[1::2])
    bf16 = [(("zero2-bf16", 2), ("fsdp-bf16", 3)), (("zero2", 2), ("zero1-bf16", 3)), (("zero2-bf16", 2), ("ddp", 3))]
    run(Path(folder), 2, [], saved, ["zero2-bf16", *halves[0]])
    for hop, (before, size) in enumerate(itertools.pairwise(sizes)):
        names = halves[hop % 2]
        targets = [FP32[(FP32.index(name) + 2 * hop + 1) % len(FP32)] for name in names]
        pairs = [((name, before), (target, size)) for name, target in zip(names, targets, strict=True)]
        run(Path(folder), size, pairs + (bf16 if hop == 0 else []), saved, halves[(hop + 1) % 2] if hop < 3 else [])


def import_engines() -> None:
    """Once, before the ranks are forked."""
    importlib.import_module("mpmae.engine.fsdp")
    importlib.import_module("mpmae.engine.deepspeed")._import_deepspeed()


def test_a_relay_over_engines_and_world_sizes(tmp_path):
    """2 -> 3 -> 4 -> 1 -> 2 ranks: every engine and world size is a source and a target, and every hop changes both."""
    run_ranks(relay, 1, str(tmp_path), tmp_path / "relay")


def resume_portable(folder: str) -> dict[str, tuple[dict, dict, dict]]:
    """Per engine the weights that were converted, those that were read and what `train` gave."""
    world, found = init_world("toy"), {}
    engine = make_engine(case_of("ddp"), world)
    train(engine, case_of("ddp"), 0, SAVED_AT)
    meta = checkpoint_meta(run_config(case_of("ddp")), 0, SAVED_AT, "f" * 64, world.world_size, None)
    checkpoint = Checkpoints(Path(folder) / "ddp", 1, world).save(SAVED_AT, write_engine(engine), meta)
    saved = engine.full_state_dict()
    engine.close()
    portable = Path(folder) / "portable"
    if world.rank == 0:
        convert(checkpoint, "portable", portable)
    world.barrier()
    shipped = json.loads((DS_FOLDER / "zero3.json").read_text())["zero_optimization"]  # which keeps small weights whole
    targets = {"fsdp": {}, "zero2": {}, "zero3": {"ds_extra": {"zero_optimization": shipped}}}
    for name, change in targets.items():
        case = dataclasses.replace(case_of(name), **change)
        engine = make_engine(case, world)
        load_engine(engine, portable)
        found[name] = saved, engine.full_state_dict(), train(engine, case, SAVED_AT, STEPS)
        engine.close()
    world.close()
    return found


def test_a_portable_checkpoint_is_resumed_from(tmp_path):
    for name, (saved, read, record) in run_ranks(resume_portable, 2, str(tmp_path), tmp_path / "processes")[0].items():
        assert all(torch.equal(read[key], value) for key, value in saved.items()), name
        assert_close(record["loss"], reference(CLIP)["loss"][SAVED_AT:], FP32_BOUND)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source_size", WORLD_SIZES)
def test_the_whole_matrix(tmp_path, source_size):
    targets = [(name, size) for name in FP32 for size in WORLD_SIZES]
    pairs = [((name, source_size), target) for name in FP32 for target in targets]
    run_ranks(matrix, 1, (str(tmp_path), pairs), tmp_path / "matrix", timeout_s=3000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bf16_and_between_precisions(tmp_path):
    pairs = [((a, 2), (b, 3)) for a in ENGINES for b in ENGINES if "bf16" in a + b]
    run_ranks(matrix, 1, (str(tmp_path), pairs), tmp_path / "matrix", timeout_s=3000)
