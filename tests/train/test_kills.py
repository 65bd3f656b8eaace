"""Killed at any writing call, a save, a conversion and a clean-up leave whole checkpoints behind.

Real SIGKILL of a process at each of its calls for one rank; for two ranks, whose start costs seconds, the disk is kept as it
is before each call of either rank, which is what a kill there leaves.
"""

import functools
import itertools
import json
import shutil
from pathlib import Path

import pytest

from mpmae.checkpoint_format import find_problems, newest_checkpoint
from mpmae.checkpoint_tools.cli import main
from mpmae.checkpoint_tools.readers import open_state
from mpmae.engine import init_world
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.compatibility import checkpoint_meta
from mpmae.train.engine_state import write_engine
from mpmae.train.saving import Saver
from tests.engine.spawn import run_ranks
from tests.engine.toy import Case, make_engine, run_config, train
from tests.train.write_calls import Tree, dies_at, restore, states_during, tree_of

OLD, NEW = "step-00000002", "step-00000004"
CASES = {"ddp": Case("ddp"), "fsdp": Case("fsdp"), **{f"zero{n}": Case("deepspeed", n) for n in (1, 2, 3)}}


def meta_of(case: Case, step: int, world_size: int) -> dict:
    return checkpoint_meta(run_config(case), 0, step, "f" * 64, world_size, None)


def saver_of(folder: Path, engine, world, in_background: bool) -> Saver:
    return Saver(engine, Checkpoints(folder, 1, world), in_background)


def kill_single_rank(folder: str) -> dict[str, tuple[list[str], int]]:
    """For saves at once and in the background: what is newest after a kill at each call."""
    world, outcomes = init_world("toy"), {}
    engine = make_engine(CASES["ddp"], world)
    train(engine, CASES["ddp"], 0, 2)
    before = Path(folder) / "before"
    Checkpoints(before, 1, world).save(2, write_engine(engine), meta_of(CASES["ddp"], 2, 1))
    for in_background in (False, True):

        def save_in(here: Path, in_background=in_background) -> None:
            shutil.copytree(before, here)
            saver = saver_of(here, engine, world, in_background)
            return functools.partial(saver.save, 4, meta_of(CASES["ddp"], 4, 1), is_last=True)

        here = Path(folder) / f"{in_background}"
        calls, found = list(states_during(save_in(here), here)), []
        for call in calls:
            here = Path(folder) / f"{in_background}-{call}"
            died = dies_at(call, save_in(here))
            assert died or call >= calls[-1], call
            found.append(newest_after(here))
            shutil.rmtree(here)
        outcomes[str(in_background)] = found
    engine.close()
    world.close()
    return outcomes


def newest_after(folder: Path) -> str:
    """The newest checkpoint, once it was found whole and readable, and another save has worked."""
    newest = newest_checkpoint(folder)
    assert newest is not None, f"nothing is left in {folder}"
    assert find_problems(newest) == []
    state = open_state(newest)
    assert all(part.isfinite().all() for part in state.read(next(iter(state.shapes))).values())
    Checkpoints(folder, 1).save(6, lambda partial: (partial / "file").write_text("x"), {})
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000006"]
    return newest.name


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return run_ranks(kill_single_rank, 1, str(folder), folder / "processes")[0]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_rank_killed_at_every_call_of_a_save(single, in_background):
    outcomes = single[str(in_background)]
    assert len(outcomes) > 30
    assert set(outcomes) == {OLD, NEW}
    assert outcomes == sorted(outcomes), "once there, the new checkpoint has to stay"


def watch_two_ranks(argument: tuple[str, list[tuple[str, bool]]]) -> list[list[Tree]]:
    folder, cases = argument
    world, trees = init_world("toy"), []
    for name, in_background in cases:
        here = Path(folder) / f"{name}-{in_background}"
        case = CASES[name]
        engine = make_engine(case, world)
        train(engine, case, 0, 2)
        Checkpoints(here, 1, world).save(2, write_engine(engine), meta_of(case, 2, 2))
        saver = saver_of(here, engine, world, in_background)
        world.barrier()
        save = functools.partial(saver.save, 4, meta_of(case, 4, 2), is_last=True)
        trees.append(list(states_during(save, here).values()))
        world.barrier()
        engine.close()
    world.close()
    return trees


MORE = [("ddp", True), ("zero1", False), ("zero3", False), ("fsdp", False), ("fsdp", True)]


@pytest.mark.parametrize("cases", [[("zero2", False)], pytest.param(MORE, marks=pytest.mark.slow)])
def test_two_ranks_killed_at_every_call_of_a_save(cases, tmp_path):
    by_rank = run_ranks(watch_two_ranks, 2, (str(tmp_path / "watched"), cases), tmp_path / "processes")
    for (rank, by_case), case in itertools.product(enumerate(by_rank), range(len(cases))):
        found = []
        for index, tree in enumerate(by_case[case]):
            folder = tmp_path / f"{rank}-{case}-{index}"
            restore(tree, folder)
            found.append(newest_after(folder))
            shutil.rmtree(folder)
        assert len(found) >= (10 if rank == 0 else 2), "ddp's rank 1 writes its random state only"
        assert found == sorted(found)
        assert found[0] == OLD
        assert rank or found[-1] == NEW


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run folder with three checkpoints of one rank, one abandoned and one unfinished."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(make_run, 1, str(run), run.parent / "processes")
    return run


def make_run(run: str) -> None:
    world = init_world("toy")
    case = CASES["ddp"]
    engine = make_engine(case, world)
    train(engine, case, 0, 2)
    folder = Path(run) / "checkpoints"
    for step in (2, 4, 6):
        Checkpoints(folder, 9, world).save(step, write_engine(engine), meta_of(case, step, 1))
    shutil.copytree(folder / OLD, folder / "step-00000009.abandoned")
    shutil.copytree(folder / OLD, folder / "step-00000008.partial")
    engine.close()
    world.close()


def kill_at_every_call(arguments: list[str], run: Path, tmp_path: Path) -> list[Tree]:
    """What is left after a kill of the command at each call; {} in `arguments` is a folder with a copy of the run."""

    def command_in(here: Path):
        shutil.copytree(run, here / "run")
        return functools.partial(main, [text.format(here) for text in arguments])

    trees = []
    for call in states_during(command_in(tmp_path / "all"), tmp_path / "all"):
        here = tmp_path / str(call)
        command = command_in(here)
        died = dies_at(call, command)
        trees.append(tree_of(here))
        if not (here / "out").exists():
            assert not died or command() == 0, "the same command again"
        shutil.rmtree(here)
    return trees


def test_a_conversion_killed_at_every_call(whole_run, tmp_path):
    before = tree_of(whole_run)
    trees = kill_at_every_call(["convert", "{}/run", "--to", "portable", "-o", "{}/out"], whole_run, tmp_path)
    assert len(trees) > 8
    for tree in trees:
        assert {name.removeprefix("run/"): tree[name] for name in tree if name.startswith("run/")} == before
        files = {name.removeprefix("out/") for name in tree if name.startswith("out/") and tree[name] is not None}
        if files:
            assert files == {"checkpoint.json", *json.loads(tree["out/checkpoint.json"])["files"]}
    assert "out/checkpoint.json" in trees[-1]


def test_a_prune_killed_at_every_call(whole_run, tmp_path):
    trees = kill_at_every_call(["prune", "{}/run", "--keep", "1", "--abandoned"], whole_run, tmp_path)
    assert len(trees) > 8
    newest = {name: content for name, content in trees[0].items() if "/step-00000006/" in name}
    assert newest
    for tree in trees:
        assert newest.items() <= tree.items()
    last = {name.split("/")[2] for name in trees[-1] if name.startswith("run/checkpoints/")}
    assert last == {"latest", "step-00000006"}
