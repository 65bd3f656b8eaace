"""What a user does wrong: one clear message, status 2, nothing lost."""

import json
import runpy
import sys

import pytest

from tests.train.launches import launch, launch_ok, metrics

SHORT = (
    "train.global_batch_size=8",
    "train.max_steps=2",
    "optim.warmup_steps=1",
    "data.num_workers=1",
    "model.modalities_out=[sentinel2, biome]",
)


@pytest.fixture(scope="module")
def run_dir(shards_dir, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("short") / "run"
    launch_ok("python", 1, folder, f"data.shards={shards_dir}", *SHORT)
    return folder


@pytest.fixture
def refused(monkeypatch, capfd, repo):
    """A function that runs launch/pretrain.py in this process, which must end with status 2 and an error with `words`."""
    monkeypatch.chdir(repo)

    def run(*arguments: str, words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("launch/pretrain.py", run_name="__main__")
        shown = capfd.readouterr().err
        assert end.value.code == 2, shown
        assert shown.startswith("error: ")
        assert all(word in shown for word in words), shown

    return run


def test_a_run_writes_what_it_promises(run_dir):
    lines = metrics(run_dir)
    keys = {"step", "epoch", "loss", "losses", "lr", "grad_norm", "images_per_s", "data_wait_percent", "memory_bytes"}
    assert [line["step"] for line in lines] == [1, 2]
    assert all(keys <= set(line) for line in lines)
    assert set(lines[0]["losses"]) == {"sentinel2", "biome"}
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config"]["train"]["max_steps"] == 2
    assert {"environment", "commit", "ds_config", "shards_fingerprint"} <= set(record)
    validation = json.loads((run_dir / "validation.jsonl").read_text())
    assert set(validation["losses"]) == set(validation["trivial"]) == {"sentinel2", "biome"}
    assert (run_dir / "checkpoints" / "step-00000002" / "model.safetensors").is_file()


def test_output_folder_not_empty(refused, run_dir, shards_dir):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    refused(f"run.dir={run_dir}", f"data.shards={shards_dir}", *SHORT, words=[f"{run_dir} is not empty", "--resume auto"])
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_complete_run_says_so(run_dir, shards_dir):
    done = launch("python", 1, f"run.dir={run_dir}", f"data.shards={shards_dir}", *SHORT, "--resume", "auto")
    assert done.returncode == 0
    assert "complete" in done.stdout


def test_another_model_cannot_continue_the_run(refused, run_dir, shards_dir):
    changed = ("--resume", "auto", "model.patch_size=16", "model.img_size=64", "train.max_steps=4")
    refused(f"run.dir={run_dir}", f"data.shards={shards_dir}", *SHORT, *changed, words=["patch_size", "8", "16"])


def test_changed_shards_cannot_continue_the_run(refused, run_dir, shards_dir, mmearth_dir, tmp_path):
    from mpmae.shard_tools.build import build

    build(mmearth_dir, tmp_path / "other", codec="raw", progress=False)
    refused(
        f"run.dir={run_dir}", f"data.shards={tmp_path / 'other'}", *SHORT, "--resume", "auto", words=["shards", "changed"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("data.shards=absent/folder",), ["absent/folder does not exist", "mpmae-shards build"]),
        (("train.global_batch_size=7", "train.micro_batch_size=2"), ["micro_batch_size = 2", "use 1 or 7"]),
        (("train.global_batch_size=100000",), ["100000", "48 samples"]),
        (("train.max_step=3",), ["did you mean train.max_steps?"]),
        (("model.modalities_out=[sentinel3]",), ["sentinel3"]),
        (("model.bands_in=[B2, B77]",), ["B77"]),
        (("model.name=mpmae_ato",), ["mpmae_ato", "mpmae_atto"]),
        (("model.img_size=60",), ["60", "patch"]),
        (("model.name=multimae_tny",), ["multimae_tny", "multimae_tiny"]),
        (("model.name=multimae_tiny", "model.domains_in=[rgb, dept]"), ["dept", "did you mean depth?"]),
        (("model.name=multimae_tiny", "model.num_visible_tokens=295"), ["num_visible_tokens = 295", "the 294 tokens"]),
        (("model.name=multimae_tiny", "model.alphas={rgb: -1}"), ["model.alphas", "above 0"]),
        (("model.name=multimae_tiny", "model.img_size=60"), ["60", "patch"]),
        (("model.name=multimae_tiny", "model.bands_in=[B2]"), ["model.bands_in", "no key of multimae models"]),
        (("model.name=multimae_tiny", "model.domains_in=[depth]"), ["samples", "have none of aster"]),
        (("engine.name=fsdp", "engine.shard_size=2"), ["shard_size = 2", "the 1 ranks"]),
        (("engine.name=deepspeed",), ["--ds-config"]),
        (("--ds-config", "configs/ds/absent.json"), ["configs/ds/absent.json"]),
        (("--ds-config", "configs/ds/zero2.json", "engine.name=ddp"), ["engine.name = ddp", "DeepSpeed configuration"]),
        (("--config", "absent.yaml"), ["absent.yaml"]),
    ],
)
def test_refused_before_the_first_step(refused, arguments, words, shards_dir, tmp_path):
    run_dir = tmp_path / "run"
    refused(f"data.shards={shards_dir}", *SHORT[:1], f"run.dir={run_dir}", *arguments, words=words)
    assert not run_dir.exists()


def test_dry_run_writes_nothing(shards_dir, tmp_path):
    done = launch("python", 1, "--dry-run", f"data.shards={shards_dir}", *SHORT, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout
    assert all(word in done.stdout for word in ("parameters", "ZeRO stage", "8 = 8 per micro step", "steps", "peak lr"))
    assert not (tmp_path / "run").exists()
