"""From a real run to a folder for others: nothing has to be told twice."""

import json

import pytest
import torch

from mpmae.checkpoint_tools.cli import main as checkpoint_tool
from mpmae.export import export
from mpmae.modalities import spec_of
from mpmae.models.interop import build_multimae, read_weights
from mpmae.shard_files import load_manifest
from tests.train.launches import launch_ok

SETTINGS = {
    "data.num_workers": 1,
    "model.img_size": 32,
    "model.decoder_dim": 16,
    "train.max_steps": 1,
    "train.global_batch_size": 4,
    "train.val_samples": 4,
    "optim.warmup_steps": 0,
}


def run(folder, shards_dir, **settings):
    """A run of one step."""
    settings = SETTINGS | {"data.shards": shards_dir} | {f"model.{name}": value for name, value in settings.items()}
    launch_ok("python", 1, folder, *(f"{key}={value}" for key, value in settings.items()))
    return folder


def test_a_run_folder_knows_its_bands_and_statistics(shards_dir, tmp_path):
    folder = run(tmp_path / "run", shards_dir, modalities_out="[sentinel2, month]")
    done = export(folder, "hf", tmp_path / "out", licence="CC-BY-4.0")
    config, manifest = done.config, load_manifest(shards_dir)
    assert config.bands_in == spec_of("sentinel2").model_bands
    expected = manifest.input_statistics(config.bands_in)
    assert {key: entry.model_dump() for key, entry in config.statistics.items()} == {
        key: {name: tuple(values) for name, values in entry.items()} for key, entry in expected.items()
    }
    facts = config.provenance
    assert (config.img_size, facts.step, facts.shards_fingerprint) == (32, 1, manifest.fingerprint)
    assert facts.run_config["model"]["decoder_dim"] == 16
    assert str(tmp_path) not in (done.folder / "config.json").read_text() + (done.folder / "README.md").read_text()
    parts, norm = done.notices
    assert parts.endswith("left out: decoder, heads, log_vars")
    assert norm.startswith("the pretraining has no final norm")


@pytest.fixture(scope="module")
def multimae_run(shards_dir, tmp_path_factory):
    options = {"name": "multimae_tiny", "domains_in": "[rgb, depth, semseg, sentinel1]", "decoder_num_heads": 2}
    return run(tmp_path_factory.mktemp("multimae") / "run", shards_dir, **options)


def test_a_run_of_multimae_knows_its_domains_and_statistics(multimae_run, shards_dir, tmp_path):
    done = export(multimae_run, "safetensors", tmp_path / "out")
    config, manifest = done.config, load_manifest(shards_dir)
    assert (config.architecture.name, config.num_heads, config.decoder_num_heads) == ("multimae_tiny", 3, 2)
    assert list(config.domains_in) == ["rgb", "depth", "semseg", "sentinel1"]
    expected = manifest.statistics_of("sentinel2", ("B4", "B3", "B2")) | manifest.statistics_of("aster", ("elevation",))
    expected |= manifest.statistics_of("sentinel1", spec_of("sentinel1").model_bands)
    assert {key: entry.model_dump() for key, entry in config.statistics.items()} == {
        key: {name: tuple(values) for name, values in entry.items()} for key, entry in expected.items()
    }
    facts = config.provenance
    assert (config.img_size, facts.step, facts.shards_fingerprint) == (32, 1, manifest.fingerprint)
    assert str(tmp_path.parent) not in (done.folder / "config.json").read_text()
    assert done.notices == ("licence is null: state one with --licence, such as --licence CC-BY-4.0",)
    one, other = build_multimae(multimae_run), build_multimae(done.folder)
    assert one.bands_available == other.bands_available
    assert (one.img_size, one.num_visible, one.decoders.cross.num_heads) == (32, 4 * 16 // 6, 2)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_checkpoint_tools_take_a_run_of_multimae(multimae_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert checkpoint_tool(["inspect", str(multimae_run)]) == 0
    text = capsys.readouterr().out
    assert "multimae_tiny, " in text
    assert "rgb, depth, semseg, sentinel1" in text
    assert checkpoint_tool(["inspect", str(multimae_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["newest"]["inputs"] == ["rgb", "depth", "semseg", "sentinel1"]
    state = read_weights(multimae_run).state
    for target, name in (("weights", "w.safetensors"), ("portable", "portable")):
        assert checkpoint_tool(["convert", str(multimae_run), "--to", target, "-o", str(tmp_path / name)]) == 0
        weights = read_weights(tmp_path / name)
        assert weights.domains_in == ("rgb", "depth", "semseg", "sentinel1")
        assert all(torch.equal(value, state[key]) for key, value in weights.state.items())
        assert weights.state.keys() == state.keys()
    assert checkpoint_tool(["prune", str(multimae_run), "--keep", "1"]) == 0
