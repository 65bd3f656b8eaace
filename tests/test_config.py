"""Configuration: layers, close matches, all problems at once."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mpmae.config import RunConfig, known_keys, load_config
from mpmae.errors import ConfigError
from mpmae.train.compatibility import checkpoint_meta
from mpmae.train.record import write_run_json


def test_layers_stack(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  seed: 5\n  epochs: 7\n")
    config = load_config(path, ["train.seed=9", "model.bands_in=[B2, B3]", "optim.clip_grad_norm=null"])
    assert (config.train.seed, config.train.epochs, config.train.global_batch_size) == (9, 7, 4096)
    assert config.model.bands_in == ("B2", "B3")
    assert config.optim.clip_grad_norm is None


def test_scientific_notation_is_a_number():
    assert load_config(None, ["optim.lr=1e-3"]).optim.lr == 1e-3


def test_the_promised_keys_exist():
    promised = (
        "data.shards model.name model.img_size model.patch_size train.max_steps train.epochs train.global_batch_size "
        "train.micro_batch_size train.seed train.precision optim.blr checkpoint.every_steps run.dir engine.name"
    )
    assert set(promised.split()) <= set(known_keys())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.max_step=3"], ["unknown key train.max_step", "did you mean train.max_steps?"]),
        (["trian.seed=3"], ["unknown key trian", "train"]),
        (["train.seed=x", "train.precision=fp16"], ["train.seed", "integer", "train.precision", "'fp32' or 'bf16'"]),
        (["train.seed"], ["'train.seed' is not of the form key=value"]),
        (["train.seed.deep=1"], ["train.seed"]),
        (["model.mask_ratio=1.5"], ["override model.mask_ratio=1.5: ", "less than 1"]),
        (["engine.name=horovod"], ["engine.name", "'ddp', 'deepspeed' or 'fsdp'"]),
        (["train.seed=[1"], ["not YAML"]),
        (["optim.betas=[0.9, 1.0]"], ["override optim.betas=[0.9, 1.0] at optim.betas[1]", "less than 1"]),
        (["optim.betas=[true, 0.9]"], ["optim.betas[0]", "expected a number, not true or false"]),
        (["optim.weight_decay=.nan"], ["override optim.weight_decay=.nan: ", "finite"]),
        (["optim.warmup_epochs=.inf"], ["finite"]),
        (["optim.eps=inf"], ["finite"]),
        (["train.seed=9223372036854775808"], ["less than 9223372036854775808"]),
        (["train.max_steps=true"], ["override train.max_steps=true: expected a number, not true or false"]),
        (["optim.lr=true"], ["override optim.lr=true: expected a number, not true or false"]),
        (["optim.lr=0.1", "optim.min_lr=0.2"], ["override optim.min_lr=0.2: expected at most optim.lr = 0.1"]),
        (["model.modalities_out=[1]"], ["override model.modalities_out=[1]: expected names, as in [sentinel2, biome]"]),
        (["model.modalities_out={biome: 3}"], ["override model.modalities_out={biome: 3}: expected names"]),
        (["data.order=windows"], ["override data.order=windows: ", "'exact' or 'window'"]),
        (["data.window_shards=4"], ["override data.window_shards=4: data.order = exact has no window"]),
        (["data.order=window"], ["the configuration: data.window_shards = None: ", "needs a number of shards, such as 16"]),
        (["data.order=window", "data.window_shards=0"], ["override data.window_shards=0: ", "greater than or equal to 1"]),
        (["data.cache_dir=/scratch"], ["override data.cache_dir=/scratch: expected none: data.shards is a folder"]),
        (
            ["data.cache_size_gb=5", "data.shards=file:///tiles"],
            ["override data.cache_size_gb=5: expected none: data.shards is a folder"],
        ),
        (["data.storage_options={anon: true}"], ["expected none: data.shards is a folder"]),
        (["data.shards=s3://b/x", "data.cache_size_gb=0"], ["override data.cache_size_gb=0: ", "greater than 0"]),
        (["data.device_cache_gb=2"], ["override data.device_cache_gb=2: data.loader = cpu cannot use it"]),
        (["data.host_cache_gb=-1"], ["greater than or equal to 0"]),
        (["data.loader=gpu"], ["'cpu' or 'dali'"]),
        (
            ["data.window_shards=4", "data.cache_dir=x", "data.device_cache_gb=1"],
            ["has no window", "data.shards is a folder", "cannot use it"],
        ),
        (
            ["model.modalities_out.biome=3"],
            ["override model.modalities_out.biome=3 at model.modalities_out: expected names"],
        ),
    ],
)
def test_bad_overrides(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "nullable" not in str(caught.value), "pydantic's own words"
    assert len(caught.value.problems) <= len(overrides)


def test_each_error_names_where_its_value_came_from(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  epochs: -1\n  seed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["train.seed=-2", "train.max_step=3"])
    assert caught.value.problems == [
        f"{path}: train.epochs = -1: input should be greater than 0",
        "override train.seed=-2: input should be greater than or equal to 0",
        "override train.max_step=3: unknown key train.max_step; did you mean train.max_steps?",
    ]


@pytest.mark.parametrize("text", ["2024", "2024_01", "1.50", "2024-01-05", "007", "yes"])
def test_a_text_that_looks_like_something_else_in_yaml(text):
    assert load_config(None, [f"run.dir={text}"]).run.dir == Path(text)
    assert load_config(None, [f"run.name={text}"]).run.name == text


def test_an_override_can_take_a_path_away():
    assert load_config(None, ["engine.ds_config=a.json", "engine.ds_config=null"]).engine.ds_config is None


def test_numbers_and_dates_in_a_file_are_path_texts(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  dir: 2024\ndata:\n  shards: 2024-01-05\n")
    config = load_config(path)
    assert (config.run.dir, config.data.shards) == (Path("2024"), Path("2024-01-05"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/tiles", "s3://bucket/tiles"),
        ("https://host/a//b?c=1", "https://host/a//b?c=1"),
        ("file:///data/tiles", Path("/data/tiles")),
        ("data/tiles", Path("data/tiles")),
        ("2024_01", Path("2024_01")),
    ],
)
def test_shards_are_a_folder_or_a_url(text, expected):
    found = load_config(None, [f"data.shards={text}"]).data.shards
    assert found == expected  # a path never equals a text


def test_everything_about_remote_shards_at_once(tmp_path):
    keys = ["data.shards=s3://bucket/tiles", "data.order=window", "data.window_shards=16", "data.cache_dir=/scratch/shards"]
    keys += ["data.cache_size_gb=200", "data.storage_options.anon=true", "data.storage_options.endpoint_url=http://host"]
    config = load_config(None, keys)
    assert config.data.storage_options == {"anon": True, "endpoint_url": "http://host"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


@pytest.mark.parametrize(
    "options",
    [
        "{key: AKIA1, secret: hunter2}",
        "{client_kwargs: {aws_secret_access_key: hunter2}}",
        "{token: hunter2}",
        "{headers: {Authorization: Bearer hunter2}}",
        "{headers: {X-Api-Key: hunter2}}",
        "{accountKey: hunter2}",
        "{SASToken: hunter2}",
    ],
)
def test_secrets_stay_out_of_the_configuration_and_of_messages(options, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"data:\n  shards: s3://bucket/tiles\n  storage_options: {options}\n")
    for arguments in ((path,), (None, ["data.shards=s3://bucket/tiles", f"data.storage_options={options}"])):
        with pytest.raises(ConfigError, match=r"data.storage_options: .*would be written to run.json") as caught:
            load_config(*arguments)
        assert "hunter2" not in str(caught.value)


def test_a_token_in_the_url_is_used_and_not_recorded(tmp_path, monkeypatch):
    url = "https://user:hunter2@host/tiles?sig=hunter2"
    config = load_config(None, [f"data.shards={url}", f"run.dir={tmp_path}"])
    assert config.data.shards == url
    monkeypatch.setattr("sys.argv", ["pretrain.py", f"data.shards={url}", "train.seed=1"])
    write_run_json(config, None, {}, None, 0)
    record = (tmp_path / "run.json").read_text()
    assert "hunter2" not in record
    assert json.loads(record)["command"] == ["pretrain.py", "data.shards=https://host/tiles", "train.seed=1"]
    meta = checkpoint_meta(config, 0, 0, "", 1, None)
    assert meta["config"]["data"]["shards"] == "https://host/tiles"


def test_shards_that_are_no_place(tmp_path):
    with pytest.raises(ConfigError, match=r"^override data.shards=: expected a folder, or a URL such as s3"):
        load_config(None, ["data.shards="])
    path = tmp_path / "run.yaml"
    path.write_text("data: {shards: [a, b]}")
    with pytest.raises(ConfigError, match=r"data.shards = \['a', 'b'\]: expected a folder, or a URL such as s3"):
        load_config(path)


def test_the_public_tokens_are_no_secrets():
    options = {"token": "anon", "config_kwargs": {"signature_version": "s3v4"}}
    config = load_config(None, ["data.shards=gs://bucket/tiles", f"data.storage_options={options}"])
    assert config.data.storage_options == options


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("train: [")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML"):
        load_config(path)
    path.write_text("- train")
    with pytest.raises(ConfigError, match=r"top level is a list"):
        load_config(path)
    path.write_text("train: 3")
    with pytest.raises(ConfigError, match=r"bad.yaml: train = 3"):
        load_config(path)


def test_a_config_survives_the_trip_through_yaml(tmp_path):
    config = load_config(None, ["model.modalities_out={sentinel2: [B4, B3], biome: null}"])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


@pytest.mark.parametrize("name", ["demo", "mpmae_atto_mmearth64", "mpmae_tiny_mmearth128"])
def test_the_shipped_configurations_load(repo, name):
    assert isinstance(load_config(repo / "configs" / "run" / f"{name}.yaml"), RunConfig)


def test_the_section_model_is_of_the_family_that_its_name_says():
    config = load_config(None, ["model.name=multimae_tiny", "model.domains_in=[rgb, depth]", "model.alphas={rgb: 0.5}"])
    assert config.model.domains_in == ("rgb", "depth")
    assert config.model.alphas == {"rgb": 0.5}
    assert config.model.modalities == ("sentinel2", "aster", "esa_worldcover")
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=multimae_tiny", "model.mask_ratio=0.5"], "unknown key model.mask_ratio: no key of multimae models"),
        (["model.domains_in=[rgb]"], "unknown key model.domains_in: no key of mpmae models"),
        (["model.name=multimae_tiny", "model.domain_in=[rgb]"], "did you mean model.domains_in"),
        (["model.name=multimae_tiny", "model.alphas=0"], "model.alphas=0: expected a number above 0"),
        (["model.name=multimae_tiny", "model.num_visible_tokens=0"], "model.num_visible_tokens=0"),
    ],
)
def test_keys_of_one_family(overrides, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(None, overrides)
