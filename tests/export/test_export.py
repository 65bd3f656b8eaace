"""Exports: files whole or absent, bits unchanged, config.json complete."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpmae
from mpmae.errors import CheckpointError, ConfigError
from mpmae.export import export, layouts, load_config
from mpmae.export.cli import main
from mpmae.export.facts_shared import FACEBOOK_LICENCE
from mpmae.modalities import TARGETS, spec_of
from mpmae.models.interop import read_weights, to_timm
from mpmae.shard_files import load_manifest
from tests.models import schemes

CASES = [
    ("safetensors", "mmearth", 16),
    ("safetensors", "convnext", 8),
    ("mmearth", "mmearth", 8),
    ("mmearth", "mmearth", 16),
    ("mmearth", "convnext", 32),
    ("hub", "mmearth", 16),
    ("hub", "convnext", 16),
    ("hf", "mmearth", 8),
    ("hf", "convnext", 8),
    ("timm", "convnext", 32),
]
WHOLE = ("safetensors", "mmearth")


@pytest.mark.parametrize(("target", "stem", "patch_size"), CASES)
def test_bits_survive_the_way_out_and_back(target, stem, patch_size, make_source, tmp_path):
    source, state = make_source(stem=stem, patch_size=patch_size)
    done = export(source, target, tmp_path / "out")
    back = read_weights(done.folder).state
    kept = {name: value for name, value in state.items() if target in WHOLE or name.startswith("encoder.")}
    assert set(back) - set(kept) <= {"norm.weight", "norm.bias"}
    assert set(kept) <= set(back)
    for name, value in kept.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name
    assert not list(tmp_path.glob("*.mpmae-tmp"))


def test_back_to_the_published_layout_of_the_golden_case(make_source, tmp_path, repo):
    source, _ = make_source(modalities_out=TARGETS, decoder_dim=512)
    export(source, "mmearth", tmp_path / "out")
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    manifest = json.loads((repo / "tests/golden/manifest.json").read_text())
    listed = {name: tuple(shape) for name, shape, *_ in manifest["cases"]["fcmae_p8_56"]["params"]}
    expected = {name: shape for name, shape in listed.items() if not name.startswith("decoder_dict.")}
    one_decoder = {name.split(".", 2)[2]: shape for name, shape in listed.items() if name.startswith("decoder_dict.")}
    for modality in TARGETS:
        expected |= {f"decoder_dict.{modality}.{rest}": shape for rest, shape in one_decoder.items()}
    assert {name: tuple(value.shape) for name, value in content["model"].items()} == expected


PUBLISHED = {
    "mmearth all_mod": lambda: schemes.mmearth(decoder_dim=16),
    "mmearth rgb": lambda: schemes.mmearth(variant="S2", bands=3, uncertainty=False, decoder_dim=16),
    "mmearth 112-16": lambda: schemes.mmearth(patch=16, variant="S2", decoder_dim=16),
    "mmearth imagenet": lambda: schemes.mmearth(patch=32, variant="S2", bands=3, original_stem=True, decoder_dim=16),
    "mmearth dense": lambda: schemes.mmearth(variant="img_mod", sparse=False, decoder_dim=16),
    "facebook": lambda: schemes.facebook(),
    "facebook fine-tuned": lambda: schemes.facebook(num_classes=10),
    "timm": lambda: schemes.timm(num_classes=10),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_scheme_passes_through(name, tmp_path):
    published = PUBLISHED[name]()
    torch.save({"model": published}, tmp_path / "checkpoint.pth")
    done = export(tmp_path / "checkpoint.pth", "safetensors", tmp_path / "out")
    expected, state = read_weights(published).state, load_file(done.folder / "model.safetensors")
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    config = done.config
    assert config.licence == (None if name.startswith("mmearth") else FACEBOOK_LICENCE)
    assert (config.stem_padding, config.grn_eps) == (("reference", 1e-4) if "dense" in name else ("same", 1e-6))
    if config.in_chans == 12:
        assert config.bands_in == spec_of("sentinel2").model_bands
    else:
        assert config.bands_in == (("B2", "B3", "B4") if name == "mmearth rgb" else None)
    if name.startswith("mmearth") and "dense" not in name:
        back = export(done.folder, "mmearth", tmp_path / "back").folder / "checkpoint.pth"
        content = torch.load(back, weights_only=True)["model"]
        assert set(content) == set(published)
        assert all(torch.equal(content[key], value) for key, value in published.items())
    if not name.startswith("mmearth"):
        back = read_weights(export(done.folder, "timm", tmp_path / "back").folder).state
        assert all(torch.equal(back[key], value) for key, value in expected.items())


def test_config_is_read_back_as_written_and_checked(make_source, tmp_path):
    for target in ("safetensors", "timm"):
        source, _ = make_source(stem="convnext")
        done = export(source, target, tmp_path / target, licence="CC-BY-4.0", name="mine")
        assert load_config(done.folder) == done.config
    config = done.config
    assert (config.name, config.licence, config.in_chans, config.grn_eps) == ("mine", "CC-BY-4.0", 12, 1e-6)
    assert config.modalities_out == {"sentinel2": 12, "biome": 14}
    assert config.provenance.source == source.name
    path = tmp_path / "safetensors" / "config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"colour": "blue"}))
    with pytest.raises(CheckpointError, match="colour"):
        load_config(path.parent)
    path.write_text(json.dumps(tree | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="update mpmae"):
        load_config(path.parent)
    path.write_text(json.dumps({"architecture": "resnet18"}))
    assert load_config(path.parent) is None


def test_statistics_and_bands_of_the_shard_set(make_source, shards_dir, tmp_path):
    _, state = make_source()
    meta = {
        "step": 7,
        "config": {"model": {"bands_in": None, "img_size": 24}, "run": {"dir": "private"}},
        "shards_fingerprint": load_manifest(shards_dir).fingerprint,
    }
    checkpoint = make_checkpoint(tmp_path / "step-00000007", state, meta)
    done = export(checkpoint, "safetensors", tmp_path / "a", shards=shards_dir)
    stats = done.config.statistics["sentinel2_l1c"]
    manifest = load_manifest(shards_dir)
    bands = next(entry.bands for entry in manifest.pixels if entry.name == "sentinel2")
    assert done.config.bands_in == tuple(band for band in bands if band != "B10")
    raw = manifest.band_stats["sentinel2_l1c"]
    assert stats.mean == tuple(raw.mean[bands.index(band)] for band in done.config.bands_in)
    assert done.config.img_size == 24
    assert done.config.provenance.step == 7
    assert "private" not in done.config.dump()
    other = make_checkpoint(tmp_path / "step-00000008", state, meta | {"shards_fingerprint": "0" * 64})
    with pytest.raises(CheckpointError, match="fingerprint"):
        export(other, "safetensors", tmp_path / "b", shards=shards_dir)

    carried = {"bands_in": ["B4"] * 12, "statistics": {"sentinel2_l2a": {"mean": [1.0] * 12, "std": [2.0] * 12}}}
    done = export(make_checkpoint(tmp_path / "step-00000009", state, meta | carried), "hf", tmp_path / "c")
    assert done.config.statistics["sentinel2_l2a"].std == (2.0,) * 12
    again = export(done.folder, "safetensors", tmp_path / "d")
    assert again.config.statistics == done.config.statistics
    assert again.config.provenance.step == 7
    assert "| 0 | B4 | 1 | 2 |" in (tmp_path / "c" / "README.md").read_text()


def make_checkpoint(folder, state, meta):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    content = {**meta, "format_version": 1, "files": {"model.safetensors": size}}
    (folder / "checkpoint.json").write_text(json.dumps(content))
    return folder


def test_weights_of_another_band_count_than_their_config(make_source, tmp_path):
    _, state = make_source()
    checkpoint = make_checkpoint(tmp_path / "step-00000001", state, {"step": 1, "config": {}, "bands_in": ["B2", "B3"]})
    with pytest.raises(CheckpointError, match=r"2 input bands .* reads 12"):
        export(checkpoint, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_licence_of_facebooks_weights_stays(make_source, tmp_path):
    _, state = make_source(stem="convnext", patch_size=32)
    save_file(to_timm({k: v for k, v in state.items() if k.startswith("encoder.")}), tmp_path / "timm.safetensors")
    first = export(tmp_path / "timm.safetensors", "hub", tmp_path / "a")
    assert first.config.licence == FACEBOOK_LICENCE
    second = export(first.folder, "safetensors", tmp_path / "b")
    assert second.config.licence == FACEBOOK_LICENCE
    third = export(second.folder, "hf", tmp_path / "c", licence="MIT")
    assert third.config.licence == "MIT"
    assert any(FACEBOOK_LICENCE in note for note in third.config.provenance.notes)
    assert any(FACEBOOK_LICENCE in notice for notice in third.notices)
    # our own weights in timm's naming are not facebook's
    source, _ = make_source(stem="convnext")
    own = export(source, "timm", tmp_path / "d")
    assert export(own.folder, "safetensors", tmp_path / "e").config.licence is None


def test_timm_is_refused_where_it_computes_something_else(make_source, tmp_path):
    for stem, patch_size, words in (("mmearth", 8, "stem mmearth"), ("convnext", 16, "patch size 16")):
        source, _ = make_source(stem=stem, patch_size=patch_size)
        with pytest.raises(CheckpointError, match=f"{words}.*--to hub"):
            export(source, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_alone_cannot_become_a_pretraining_checkpoint(make_source, tmp_path):
    source, _ = make_source()
    encoder = export(source, "hub", tmp_path / "hub").folder
    with pytest.raises(CheckpointError, match="decoder and heads"):
        export(encoder, "mmearth", tmp_path / "out")


def test_output_is_new_and_whole_or_absent(make_source, tmp_path, monkeypatch):
    source, _ = make_source()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export(source, "safetensors", taken)
    with pytest.raises(CheckpointError, match="is a file"):
        export(source, "safetensors", taken / "note.txt")
    with pytest.raises(ConfigError, match="onnx"):
        export(source, "onnx", tmp_path / "new")

    def half(state, config, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(layouts.WRITERS, "safetensors", half)
    with pytest.raises(CheckpointError, match="No space left"):
        export(source, "safetensors", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_command(make_source, tmp_path, capsys):
    source, state = make_source()
    assert main([str(source), "--to", "safetensors", "--output", str(tmp_path / "out"), "--licence", "MIT"]) == 0
    out, err = capsys.readouterr()
    assert "model.safetensors" in out
    assert "notice: statistics are null" in err
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(state)
    assert main([str(tmp_path / "absent"), "--to", "hub", "--output", str(tmp_path / "no")]) == 2
    assert "error: no checkpoint" in capsys.readouterr().err


def test_the_layout_of_mmearth_keeps_what_the_config_says(make_source, tmp_path):
    source, _ = make_source(bands_in=("B4", "B3", "B2"))
    config = export(source, "safetensors", tmp_path / "a", licence="MIT").config.model_copy(
        update={"bands_in": ("B4", "B3", "B2")}
    )
    (tmp_path / "a" / "config.json").write_text(config.dump())
    export(tmp_path / "a", "mmearth", tmp_path / "b")
    for source in (tmp_path / "b", tmp_path / "b" / "checkpoint.pth"):
        back = export(source, "hub", tmp_path / f"to {source.name}").config
        assert (back.bands_in, back.licence) == (("B4", "B3", "B2"), "MIT")


@pytest.mark.parametrize("content", ["[1]", '"x"', '{"mpmae": "x"}', "null"])
def test_a_config_of_another_program_says_nothing(content, make_source, tmp_path):
    folder = export(make_source()[0], "safetensors", tmp_path / "a").folder
    (folder / "config.json").write_text(content)
    assert read_weights(folder).stem_padding == "same"


@pytest.mark.parametrize("target", ["timm", "hub", "hf", "mmearth"])
def test_a_unet_goes_out_whole_only(target, tmp_path):
    state = mpmae.create_unet("convnextv2_atto", num_classes=3, stem="convnext").state_dict()
    save_file(state, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match=r"U-Net; use --to safetensors|whole pretraining model"):
        export(tmp_path / "unet.safetensors", target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = export(tmp_path / "unet.safetensors", "safetensors", tmp_path / "out")
    back = mpmae.create_unet("convnextv2_atto", num_classes=3, checkpoint=done.folder).state_dict()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_output_is_the_empty_working_folder_or_a_link(make_source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export(make_source()[0], "hub", tmp_path / "link")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (export(make_source()[0], "hub", ".").folder, tmp_path / "empty"):
        assert (folder / "hubconf.py").is_file()


def test_the_dense_layout_of_mmearth_stays_dense(tmp_path):
    source = schemes.mmearth(variant="S2", sparse=False, decoder_dim=16)
    torch.save({"model": source}, tmp_path / "w.pth")
    export(tmp_path / "w.pth", "mmearth", tmp_path / "out")
    content = torch.load(tmp_path / "out" / "checkpoint.pth")["model"]
    assert content.keys() == source.keys()
    for name, value in content.items():
        assert torch.equal(value, source[name]), name
