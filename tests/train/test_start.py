"""What is settled before the first step: ranks that agree, determinism, and advice for when memory runs out."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from mpmae.config import RunConfig, load_config
from mpmae.engine import current_world, init_world
from mpmae.errors import ConfigError, TrainingError
from mpmae.loader import plan_batches
from mpmae.shard_files import load_manifest
from mpmae.train import pretrain
from mpmae.train.determinism import deterministic
from mpmae.train.out_of_memory import advice_on_out_of_memory
from mpmae.train.start_checks import check_same, differences, facts_of, source_digest
from tests.engine.spawn import run_ranks
from tests.train.launches import launch, metrics


def test_what_differs_is_named_with_its_ranks():
    same = {"train.seed": "7", "torch": "2.13"}
    assert differences([same, same]) == []
    other = [same] * 12 + [{"train.seed": "8"}]
    problems = differences(other)
    assert problems[0].startswith("torch differs: 2.13 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more, (absent) on rank 12")
    assert problems[1].endswith("8 on rank 12")
    assert len(problems) == 2


def test_facts_are_of_the_run_and_not_of_the_node(shards_dir):
    manifest = load_manifest(shards_dir)
    here = facts_of(
        load_config(None, ["data.shards=/scratch/a", "data.cache_dir=null", "probe.dataset=/scratch/a.h5"]), None, manifest
    )
    there = facts_of(load_config(None, ["data.shards=/scratch/b", "probe.dataset=/scratch/b.h5"]), None, manifest)
    assert here == there
    assert here["the manifest of data.shards"] == manifest.fingerprint[:16]
    assert source_digest() in here["the code of mpmae"]
    assert facts_of(RunConfig(), {"zero_optimization": {"stage": 2}}, manifest)["ds_config.zero_optimization.stage"] == "2"


def disagree(shards_dir: str) -> str:
    world = init_world()
    config = load_config(None, [f"train.seed={world.rank}", f"run.name=node{world.rank}"])
    facts = facts_of(config, None, load_manifest(shards_dir))
    check_same(facts | {"train.seed": "0", "run.name": ""}, world)  # equal: nothing is raised
    try:
        check_same(facts, world)
    except ConfigError as error:
        return str(error)
    finally:
        world.close()
    return "nothing was raised"


def test_ranks_that_differ_are_refused_on_all_of_them(shards_dir, tmp_path):
    first, second = run_ranks(disagree, 2, str(shards_dir), tmp_path)
    assert first == second
    assert "train.seed differs: 0 on rank 0, 1 on rank 1" in first
    assert "run.name differs: node0 on rank 0, node1 on rank 1" in first
    assert "the same command, configuration, code and shards" in first


def train_twice(arguments: tuple[str, str]) -> list[bool]:
    """Two whole runs in one process; whether torch was deterministic in the end of each, and afterwards."""
    folder, shards = arguments
    for name in ("first", "second"):
        overrides = [f"run.dir={folder}/{name}", f"data.shards={shards}", "train.deterministic=true", "train.max_steps=3"]
        overrides += ["train.global_batch_size=4", "optim.warmup_steps=1", "train.val_samples=2", "data.num_workers=2"]
        overrides += ["model.modalities_out=[sentinel2, era5]"]
        pretrain(load_config(None, overrides))
    return [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic]


def test_deterministic_runs_have_the_same_bits(shards_dir, tmp_path):
    assert run_ranks(train_twice, 2, (str(tmp_path), str(shards_dir)), tmp_path / "processes") == [[False, False]] * 2
    first, second = tmp_path / "first", tmp_path / "second"
    numbers = ("step", "loss", "losses", "log_variances", "lr", "grad_norm")
    lines = [[{name: line[name] for name in numbers} for line in metrics(each)] for each in (first, second)]
    assert len(lines[0]) == 3
    assert lines[0] == lines[1]
    weights = [load_file(each / "checkpoints" / "step-00000003" / "model.safetensors") for each in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert json.loads((first / "run.json").read_text())["environment"]["torch_threads"] == 1


def test_determinism_is_switched_on_and_off(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:0:0; unset it"), deterministic(True):
        pass


def advice(allocate, engine="ddp", stage=None, ranks=4, global_batch=64, micro=8, **engine_settings) -> str:
    config = RunConfig.model_validate({"engine": {"name": engine, **engine_settings}})
    plan = plan_batches(global_batch, micro, ranks)
    with (
        pytest.raises(TrainingError) as raised,
        advice_on_out_of_memory(config, plan, torch.nn.Linear(2500, 4000, bias=False), stage, current_world()),
    ):
        allocate()
    return str(raised.value)


def too_much_on_the_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), too_much_on_the_gpu, lambda: bytearray(2**62)])
def test_every_allocator_is_understood(allocate):
    text = advice(allocate)
    assert "rank 0 (cpu): out of memory at 8 samples a micro step: " in text
    assert "train.micro_batch_size=4 holds fewer samples at a time, in 4 micro steps" in text
    assert "engine.activation_checkpointing=true" in text
    assert "take 160.0 MB of a rank (by ZeRO stage 0: 160.0 MB, 1: 100.0 MB, 2: 70.0 MB, 3: 40.0 MB)" in text
    assert "--ds-config configs/ds/zero1.json, or engine.name=fsdp" in text


def test_advice_depends_on_what_is_used_already():
    fail = too_much_on_the_gpu
    assert "configs/ds/zero3.json" in advice(fail, "deepspeed", 2, ds_config="configs/ds/zero2.json")
    assert "take 40.0 MB of a rank" in advice(fail, "fsdp")
    assert "engine.cpu_offload=true" in advice(fail, "fsdp")
    assert "zero3_offload.json" in advice(fail, "deepspeed", 3, ds_config="configs/ds/zero3.json")
    assert "train.micro_batch_size" not in advice(fail, global_batch=4, micro=1)
    assert "train.micro_batch_size=3" in advice(fail, ranks=1, global_batch=9, micro=9)
    assert "activation_checkpointing" not in advice(fail, activation_checkpointing=True)


def test_other_errors_pass():
    arguments = RunConfig(), plan_batches(8, 8, 1), torch.nn.Linear(1, 1), None, current_world()
    with pytest.raises(RuntimeError, match="shapes"), advice_on_out_of_memory(*arguments):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "num_tell", "words"),
    [
        ("other_code 1 0", 2, "the code of mpmae differs: "),
        ("out_of_memory 1 1", 1, "rank 1 (cpu): out of memory at 2 samples a micro step"),
        ("raise_an_error 1 1", 1, "ValueError: a bug of this rank alone"),
    ],
)
def test_what_one_rank_alone_finds_ends_both(shards_dir, tmp_path, fault, num_tell, words):
    settings = ("train.global_batch_size=4", "train.max_steps=3", "optim.warmup_steps=1", "data.num_workers=1")
    settings += (f"run.dir={tmp_path / 'run'}", f"data.shards={shards_dir}", "model.modalities_out=[biome]")
    done = launch("torchrun", 2, *settings, fault=fault)
    assert done.returncode == 1, "torchrun's own"
    assert done.stdout.count(words) == num_tell, done.stdout[-3000:]
    assert len(metrics(tmp_path / "run")) == int(fault.split()[2])
