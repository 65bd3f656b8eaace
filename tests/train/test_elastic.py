"""A run whose number of ranks, and engine, changes in the middle of an epoch goes on as if nothing had happened.

Bound: losses within 1e-5 (relative, float32) of a run on one rank without an interruption; the sample ids of each global
batch are the same.
"""

import functools

import numpy as np
import pytest

from mpmae.config import load_config
from mpmae.loader import plan_batches
from mpmae.shard_files import load_manifest
from mpmae.train.compatibility import CURVE_BOUND
from mpmae.train.data import cpu_loader, open_reader
from mpmae.train.plan import make_order
from tests.train.launches import REPO, kill_after_step, launch, launch_ok, metrics
from tests.train.test_parity import COMMON, SYSTEMS, curve

pytestmark = pytest.mark.timeout(900)
STEPS, EVERY = 9, 3
CHEAP = ("train.val_samples=1", f"checkpoint.every_steps={EVERY}")
CHEAP_MODEL = {"mpmae": "model.modalities_out=[sentinel2, biome]", "multimae": "model.domains_out=[rgb, depth]"}
DDP = ("engine.name=ddp",)
FSDP = ("engine.name=fsdp",)
ZERO2 = ("--ds-config", "configs/ds/zero2.json")
HOPS = {
    "ddp": ((3, DDP), (2, DDP)),
    "zero2": ((4, ZERO2), (2, ZERO2), (3, ZERO2)),
    "fsdp": ((4, FSDP), (2, FSDP), (3, FSDP)),
    "ddp, zero2, fsdp": ((3, DDP), (2, ZERO2), (3, FSDP)),
}


@pytest.fixture(scope="module")
def settings(shards_dir):
    return (f"data.shards={shards_dir}", *COMMON, f"train.max_steps={STEPS}", *CHEAP)


def model_of(system: str) -> tuple[str, ...]:
    return (*SYSTEMS[system], CHEAP_MODEL[system])


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A function: the losses of a system's run on one rank without an interruption."""

    @functools.cache
    def run(system: str) -> np.ndarray:
        lines = launch_ok("python", 1, tmp_path_factory.mktemp("whole") / "run", *settings, *model_of(system))
        return curve(lines)[:, 0]

    return run


DEFAULT = {("mpmae", "ddp")}


@pytest.mark.parametrize(
    ("system", "hops"),
    [
        pytest.param(system, hops, marks=() if (system, hops) in DEFAULT else pytest.mark.slow)
        for system in SYSTEMS
        for hops in HOPS
    ],
)
def test_ranks_change_in_the_middle_of_an_epoch(system, hops, settings, whole, tmp_path):
    settings = (*settings, *model_of(system))
    run_dir, stages = tmp_path / "run", HOPS[hops]
    for stage, (num_ranks, extra) in enumerate(stages[:-1]):  # killed a step after its own checkpoint
        arguments = (*settings, *extra, "--resume", "auto")
        kill_after_step(EVERY * (stage + 1) + 1, "torchrun", num_ranks, run_dir, *arguments)
        assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{EVERY * (stage + 1):08d}\n"
    num_ranks, extra = stages[-1]
    done = launch("torchrun", num_ranks, f"run.dir={run_dir}", *settings, *extra, "--resume", "auto")
    assert done.returncode == 0, done.stdout[-4000:]
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(curve(lines)[:, 0], whole(system), rtol=CURVE_BOUND)
    text = " ".join(done.stdout.split())
    assert f"world size {stages[-2][0]} in the checkpoint, {num_ranks} now: the same global batches" in text
    reads = stages[-2][1] != extra or extra == ZERO2
    assert ("weights, moments and step count are those saved" in text) == reads


def test_global_batches_do_not_depend_on_the_number_of_ranks(settings):
    """What the ranks read from step 3 on, in the middle of an epoch."""
    config = load_config(REPO / "configs" / "run" / "demo.yaml", settings)
    manifest = load_manifest(config.data.shards)
    order = make_order(config, manifest)
    assert 3 % order.steps_per_epoch, "the middle of an epoch"
    by_world = []
    for world_size in (1, 2, 3, 4):
        plan = plan_batches(config.train.global_batch_size, None, world_size)
        ids = []
        for rank in range(world_size):
            loader = cpu_loader(config, open_reader(config, config.data.train_split), training=True)
            batches = loader.training(order, plan, rank, 3)
            ids.append([next(batches)[1].sample_ids for _ in range(2 * plan.num_micro_steps)])
            batches.close()
        by_world.append([np.sort(np.concatenate([rank[step] for rank in ids])).tolist() for step in range(2)])
    assert all(batches == by_world[0] for batches in by_world)
    assert len(set(by_world[0][0])) == config.train.global_batch_size
