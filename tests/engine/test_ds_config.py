import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpmae.config import validate
from mpmae.engine import create_engine, load_ds_config, resolve_ds_config
from mpmae.engine.ds_config import uses_nvme, without_nvme_path
from mpmae.engine.world import current_world
from mpmae.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ds"


def config_of(precision="fp32", clip=None, **engine):
    train, optim = {"precision": precision}, {"clip_grad_norm": clip}
    return validate({"train": train, "optim": optim, "engine": {"name": "deepspeed", **engine}}, "test")


def resolve(raw, config=None, **arguments):
    return resolve_ds_config(raw, config or config_of(), 4, 8, 2, **arguments)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_files_resolve(stage, precision):
    raw = load_ds_config(FOLDER / f"zero{stage}.json")
    resolved = resolve(raw, config_of(precision, 3.0))
    assert resolved["train_batch_size"] == 64
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 3.0
    assert resolved["bf16"]["enabled"] is (precision == "bf16" and stage >= 1)
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["zero_optimization"]["stage"] == stage
    assert "auto" not in json.dumps(resolved)
    assert raw["train_batch_size"] == "auto", "the file's content is left alone"
    assert resolve(resolved, config_of(precision, 3.0)) == resolved


def test_shipped_offloads_resolve():
    for precision in ("fp32", "bf16"):
        resolved = resolve(load_ds_config(FOLDER / "zero3_offload.json"), config_of(precision))
        assert resolved["zero_force_ds_cpu_optimizer"] is False
        assert uses_nvme(resolved) is None
    raw = load_ds_config(FOLDER / "zero3_nvme.json")
    resolved = resolve(raw, config_of("bf16", nvme_path="/scratch"))
    assert "auto" not in json.dumps(resolved)
    assert uses_nvme(resolved) == Path("/scratch")
    with pytest.raises(ConfigError, match=r"offload_optimizer goes to nvme.* set engine\.nvme_path") as caught:
        resolve(raw, config_of("bf16"))
    assert len(caught.value.problems) == 2


def test_the_folder_of_nvme_is_not_part_of_what_fits_a_checkpoint():
    raw = load_ds_config(FOLDER / "zero3_nvme.json")
    one, other = (resolve(raw, config_of("bf16", nvme_path=path))["zero_optimization"] for path in ("/job1", "/job2"))
    assert one != other
    assert without_nvme_path(one) == without_nvme_path(other)
    assert one["offload_param"]["nvme_path"] == "/job1", "a copy is what is returned"


@pytest.mark.parametrize(
    ("stage", "offload", "nvme_path", "message"),
    [
        (3, {"offload_param": {"device": "nvme", "nvme_path": "/a"}}, "/b", 'nvme_path = "/a", but engine.nvme_path = /b'),
        (3, {"offload_param": {"device": "nvme"}}, "/b", "writes float32 weights to nvme as bfloat16"),
        (3, {"offload_param": {"device": "cpu"}}, "/b", "nothing is offloaded to nvme"),
        (2, {"offload_param": {"device": "cpu"}}, None, "offload_param: stage 2 keeps whole weights"),
        (2, {"offload_optimizer": {"device": "nvme"}}, "/b", "offload_optimizer: stage 2 cannot use nvme"),
        (0, {"offload_optimizer": {"device": "cpu"}}, None, "stage 0 offloads nothing"),
    ],
)
def test_offload_that_deepspeed_would_ignore(stage, offload, nvme_path, message):
    with pytest.raises(ConfigError) as caught:
        resolve({"zero_optimization": {"stage": stage, **offload}}, config_of(nvme_path=nvme_path))
    assert message in str(caught.value)


def test_what_is_left_out_is_written():
    resolved = resolve({})
    assert resolved["gradient_clipping"] == 0.0, "deepspeed clips at 1.0 if it is not told"
    assert resolved["train_batch_size"] == 64
    assert resolved["bf16"] == {"enabled": False}


def test_offload_with_torchs_optimizer():
    resolved = resolve({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert resolved["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in resolve({"zero_optimization": {"offload_optimizer": {"device": "none"}}})


def test_all_problems_at_once():
    raw = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "fp16": {"enabled": True},
        "train_batch_size": 63,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimisation": {"stage": 2},
        "zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": "auto"},
        "comms_logger": {"prof_ops": ["all_reduce", "auto"]},
        "gradient_allreduce_op": "sum",
        "checkpoint": {"writer": {"type": "fast"}},
    }
    with pytest.raises(ConfigError) as caught:
        resolve(raw, where="my.json")
    text = str(caught.value)
    for expected in (
        "section optimizer is refused",
        "section scheduler is refused",
        "section fp16 is refused",
        "train_batch_size = 63, but 8 samples x 2 micro steps x 4 ranks gives 64",
        "gradient_clipping = 1.0, but optim.clip_grad_norm=None gives 0.0",
        "bf16.enabled = true, but train.precision=fp32 at ZeRO stage 2 gives false",
        "unknown key zero_optimisation, which DeepSpeed would ignore; did you mean zero_optimization?",
        'zero_optimization.stage3_prefetch_bucket_size is "auto"',
        'comms_logger.prof_ops[1] is "auto"',
        'optimizer.params.lr is "auto"',
        'gradient_allreduce_op = "sum"',
        "checkpoint.writer",
    ):
        assert expected in text
    assert len(caught.value.problems) == 12
    assert all(problem.startswith("my.json: ") for problem in caught.value.problems)


def test_bf16_at_stage_0_is_autocast_only():
    with pytest.raises(ConfigError, match=r"bf16\.enabled = true, but train\.precision=bf16 at ZeRO stage 0 gives false"):
        resolve({"bf16": {"enabled": True}}, config_of("bf16"))


@pytest.mark.parametrize("stage", [4, -1, "2", True, None])
def test_bad_stage(stage):
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage"):
        resolve({"zero_optimization": {"stage": stage}})


def test_section_that_is_none():
    with pytest.raises(ConfigError, match="bf16 = true: expected a section with enabled"):
        resolve({"bf16": True})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no DeepSpeed configuration"),
        ("{", "is not JSON"),
        ("[]", "top level is a list"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "given twice in one section: stage"),
    ],
)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_ds_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "ds_config", "message"),
    [
        ("fsdp", {}, "would ignore the DeepSpeed configuration"),
        ("ddp", {}, "would ignore the DeepSpeed configuration"),
        ("deepspeed", None, "add --ds-config"),
    ],
)
def test_engine_and_configuration_have_to_fit(name, ds_config, message):
    config = validate({"engine": {"name": name}}, "test")
    with pytest.raises(ConfigError, match=message):
        create_engine(config, None, current_world(), ds_config, 1, 1)


def test_deepspeed_is_imported_only_when_an_engine_needs_it():
    code = (
        "import sys, mpmae.engine, mpmae.engine.ddp, mpmae.engine.deepspeed; "
        "assert not [m for m in sys.modules if m.startswith('mpmae.loader')]; "
        "import mpmae.train.checkpoint; "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'deepspeed']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
