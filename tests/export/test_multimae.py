"""Exports of a MultiMAE: bits unchanged, timm computes the same, and what has no form elsewhere is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpmae.errors import CheckpointError, ConfigError
from mpmae.export import MultiMAEExportConfig, export, load_config
from mpmae.export.cli import main
from mpmae.loader.batch import Batch
from mpmae.models.interop import build_multimae, read_weights
from tests.models.multimae import published, small

STATISTICS = {
    "sentinel2_l1c": {"bands": ["B4", "B3", "B2", "B11", "B12"], "mean": [1.0, 2, 3, 4, 5], "std": [9.0, 8, 7, 6, 5]},
    "sentinel2_l2a": {"bands": ["B12", "B11", "B2", "B3", "B4"], "mean": [11.0, 12, 13, 14, 15], "std": [1.0, 2, 3, 4, 5]},
    "aster": {"bands": ["elevation"], "mean": [100.0], "std": [50.0]},
}
DOMAINS = ("rgb", "depth", "semseg", "sired")
MODEL = {"name": "multimae_tiny", "img_size": small.SIZE, "decoder_num_heads": 2, "num_visible_tokens": 7, "alphas": 0.5}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A complete checkpoint of a small MultiMAE, and its model."""
    model = small.build(torch.float64, domains_in=DOMAINS, domains_out=DOMAINS, loss_weighting="uncertainty")
    folder = tmp_path_factory.mktemp("source") / "run" / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    meta = {
        "step": 7,
        "config": {"model": MODEL, "run": {"dir": "private"}},
        "domains_in": DOMAINS,
        "statistics": STATISTICS,
    }
    files = {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    (folder / "checkpoint.json").write_text(json.dumps(meta | {"format_version": 1, "files": files}))
    return folder.parent.parent, model


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items())


@pytest.mark.parametrize("target", ["safetensors", "multimae"])
def test_the_whole_model_goes_out_and_comes_back(target, source, tmp_path):
    run, model = source
    done = export(run, target, tmp_path / "out", licence="CC-BY-4.0")
    config = load_config(done.folder)
    assert config == done.config
    assert isinstance(config, MultiMAEExportConfig)
    assert (config.architecture.dim, config.architecture.depth, config.num_heads, config.decoder_num_heads) == (192, 2, 3, 2)
    assert config.domains_in["sired"].bands == ("B11", "B12")
    assert config.domains_in["semseg"].num_classes == 12
    assert config.decoders == {"rgb": 3, "depth": 1, "semseg": 12, "sired": 2, "norm_rgb": 3}
    assert config.statistics["sentinel2_l2a"].bands == ("B4", "B3", "B2", "B11", "B12")
    assert config.statistics["sentinel2_l2a"].mean == (15, 14, 13, 12, 11)
    assert (config.img_size, config.num_visible_tokens, config.alphas, config.provenance.step) == (small.SIZE, 7, 0.5, 7)
    assert "private" not in config.dump()
    assert_same(read_weights(done.folder).state, model.state_dict())
    back = build_multimae(done.folder)
    assert (back.img_size, back.num_visible, back.alphas, back.decoders.cross.num_heads) == (small.SIZE, 7, (0.5,) * 4, 2)
    assert_same(read_weights(export(done.folder, "safetensors", tmp_path / "again").folder).state, model.state_dict())


def test_the_published_checkpoint_comes_back_as_it_was(tmp_path):
    """Published -> ours -> published: the model's state dict with its positions, and the log variances beside it."""
    weights, log_vars = published.state(), torch.arange(7.0)
    torch.save(published.checkpoint(weights, log_vars), tmp_path / "checkpoint-9.pth")
    ours = export(tmp_path / "checkpoint-9.pth", "safetensors", tmp_path / "ours")
    assert (ours.config.img_size, ours.config.alphas) == (32, 0.5)
    assert "of the weights in this naming, those of EPFL-VILAB/MultiMAE are CC-BY-NC-4.0" in ours.notices
    assert "num_heads is null: nothing says how many heads an encoder of width 96 has" in ours.notices
    content = torch.load(export(ours.folder, "multimae", tmp_path / "back").folder / "checkpoint.pth", weights_only=True)
    assert_same(content["model"], weights)
    assert torch.equal(content["loss_balancer"]["log_vars"], log_vars)
    with pytest.raises(CheckpointError, match="timm needs the number of heads"):
        export(ours.folder, "timm", tmp_path / "timm")


def images(model, domain):
    """A batch that has only this domain's modality, and the images as a ViT takes them."""
    one, generator = model.domains_in[domain], torch.Generator().manual_seed(3)
    dtype = model.global_tokens.dtype
    whole = torch.randn(
        2, len(model.bands_available[one.modality]), small.SIZE, small.SIZE, generator=generator, dtype=dtype
    )
    valid = torch.ones_like(whole, dtype=torch.bool)
    batch = Batch({one.modality: whole}, {one.modality: valid}, torch.arange(2), {one.modality: 2}, 2)
    return batch, model._view(batch, one).values


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("domain", ["rgb", "depth", "sired"])
def test_timm_computes_the_same(domain, dtype, within, source, tmp_path, timm):
    run, model = source[0], source[1]
    folder = export(run, "timm", tmp_path / "out", domain=domain).folder
    model = build_multimae(run).to(dtype)
    batch, image = images(model, domain)
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    if dtype == torch.float64:
        vit = timm.models.vision_transformer.VisionTransformer(**arguments, num_classes=0).double()
        vit.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with torch.no_grad():
        ours, theirs = model.eval().encode(batch, [domain]), vit.eval().forward_features(image)
        pooled = vit(image)
    torch.testing.assert_close(theirs[:, 0], ours.summary, rtol=0, atol=within)
    torch.testing.assert_close(theirs[:, 1:], ours.patches[domain], rtol=0, atol=within)
    torch.testing.assert_close(pooled, ours.summary, rtol=0, atol=within)


def test_a_vit_of_timm_at_another_size(source, tmp_path, timm):
    folder = export(source[0], "hf", tmp_path / "out", domain="rgb", licence="MIT").folder
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=48, num_classes=5)
    assert vit(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    assert (vit.pretrained_cfg["license"], vit.pretrained_cfg["mean"]) == ("MIT", [15, 14, 13])
    text = (folder / "README.md").read_text()
    assert "library_name: timm" in text
    assert "| 0 | B4 | 1 | 9 | 15 | 5 |" in text


def test_a_vit_of_timm_comes_back_as_an_encoder(source, tmp_path, caplog):
    run, model = source
    done = export(run, "timm", tmp_path / "out", domain="depth")
    assert done.config.domains_in.keys() == {"depth"}
    assert done.config.statistics.keys() == {"aster"}
    assert "left out: decoders, input_adapters, log_vars" in " ".join(done.notices)
    assert "depth is standardised per image" in " ".join(done.notices)
    kept = ("encoder.", "global_tokens", "input_adapters.depth.")
    state = {name: value for name, value in model.state_dict().items() if name.startswith(kept)}
    assert_same(read_weights(done.folder).state, state)
    built = build_multimae(done.folder).double()
    assert "initial values kept: decoders" in caplog.text
    model = build_multimae(run).double()
    batch, _ = images(model, "depth")
    with torch.no_grad():
        expected, got = model.encode(batch, ["depth"]), built.encode(batch)
    torch.testing.assert_close(got.summary, expected.summary, rtol=0, atol=1e-5)
    (done.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="only one that mpmae-export wrote can be read"):
        read_weights(done.folder)


def test_tuned_positions_have_no_place(source, tmp_path):
    folder = export(source[0], "timm", tmp_path / "out").folder
    state = load_file(folder / "model.safetensors")
    save_file(state | {"pos_embed": state["pos_embed"] + 0.1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tuned ones have no place"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("target", "domain", "problem"),
    [
        ("mmearth", None, "--to mmearth: .* holds a MultiMAE, .* can go out as safetensors, multimae, timm, hf"),
        ("hub", None, "--to hub: .* can go out as safetensors"),
        ("timm", "semseg", r"no ViT that embeds class ids; choose one of rgb, depth, sired"),
        ("timm", "ired", "--domain ired: no input domain of this model"),
        ("safetensors", "rgb", "--to safetensors keeps all domains"),
    ],
)
def test_what_has_no_form_is_refused(target, domain, problem, source, tmp_path, capsys):
    with pytest.raises(ConfigError, match=problem):
        export(source[0], target, tmp_path / "out", domain=domain)
    asked = ["--domain", domain] if domain else []
    assert main([str(source[0]), "--to", target, "--output", str(tmp_path / "out"), *asked]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_maps_alone_have_no_vit(tmp_path):
    model = small.build(torch.float32, domains_in=["semseg"], domains_out=["semseg"])
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="no domain chosen; those that timm has a form for: none"):
        export(tmp_path / "w.safetensors", "timm", tmp_path / "out")


def test_parts_of_two_models_are_told(source, tmp_path):
    run, _ = source
    done = export(run, "safetensors", tmp_path / "out")
    path = done.folder / "config.json"
    tree = json.loads(path.read_text())
    del tree["domains_in"]["sired"]
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="config names the input domains rgb, depth, semseg, its weights read"):
        export(done.folder, "multimae", tmp_path / "again")
    path.write_text(json.dumps(tree | {"colour": "blue"}))
    with pytest.raises(CheckpointError, match="colour"):
        load_config(done.folder)


def test_an_encoder_alone_is_no_published_checkpoint(source, tmp_path):
    vit = export(source[0], "timm", tmp_path / "vit").folder
    with pytest.raises(CheckpointError, match="these weights have no decoders"):
        export(vit, "multimae", tmp_path / "out")
