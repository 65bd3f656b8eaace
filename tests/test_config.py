"""Configuration: layers, close matches, all problems at once."""

import pytest
import yaml

from mpmae.config import RunConfig, known_keys, load_config
from mpmae.errors import ConfigError


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
        (["model.mask_ratio=1.5"], ["model.mask_ratio = 1.5", "less than 1"]),
        (["engine.name=horovod"], ["engine.name", "'ddp', 'deepspeed' or 'fsdp'"]),
        (["train.seed=[1"], ["not YAML"]),
    ],
)
def test_bad_overrides(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


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
