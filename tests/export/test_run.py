"""From a real run to a folder for others: nothing has to be told twice."""

from mpmae.export import export
from mpmae.modalities import spec_of
from mpmae.shard_files import load_manifest
from tests.train.launches import launch_ok


def test_a_run_folder_knows_its_bands_and_statistics(shards_dir, tmp_path):
    settings = {
        "data.shards": shards_dir,
        "data.num_workers": 1,
        "model.img_size": 32,
        "model.modalities_out": "[sentinel2, month]",
        "model.decoder_dim": 16,
        "train.max_steps": 1,
        "train.global_batch_size": 4,
        "train.val_samples": 4,
        "optim.warmup_steps": 0,
    }
    launch_ok("python", 1, tmp_path / "run", *(f"{key}={value}" for key, value in settings.items()))
    done = export(tmp_path / "run", "hf", tmp_path / "out", licence="CC-BY-4.0")
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
