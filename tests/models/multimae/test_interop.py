"""Checkpoints of MultiMAE: the published names and ours, what they are of, and what is refused."""

import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import mpmae
from mpmae.errors import CheckpointError, ConfigError
from mpmae.models.interop import (
    Weights,
    build_multimae,
    describe,
    load_encoder,
    load_reference,
    read_weights,
)
from mpmae.models.interop.multimae import published_state
from tests.models import schemes
from tests.models.multimae import published, small

RGB, SEMSEG = "input_adapters.rgb.proj.weight", "input_adapters.semseg.class_emb.weight"


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


def small_state(**options):
    return state_of(small.build(torch.float32, **options))


@pytest.mark.parametrize("order", [published.DECODERS, published.DECODERS[::-1]], ids=["as published", "reversed"])
def test_published_to_ours_and_back_keeps_every_bit(order):
    """Whatever order a file lists its decoders in: their names say which is which."""
    source, model = published.state(order), published.model()
    report = load_reference(model, source)
    assert set(report.loaded) == {name for name, _ in model.named_parameters()}
    assert (report.unused, report.fresh, report.scheme) == ((), (), "multimae-published")
    assert_same(published_state(state_of(model)), source)
    own = torch.stack([source[f"output_adapters.{name}.mlp.fc1.bias"] for name in published.DECODERS])
    assert torch.equal(model.decoders.mlp.fc1.bias, own)


def test_what_a_checkpoint_is_of(tmp_path):
    torch.save(published.checkpoint(published.state()), tmp_path / "checkpoint-3.pth")
    weights = read_weights(tmp_path / "checkpoint-3.pth")
    found = describe(weights.state)
    assert (found.dim, found.depth, found.patch_size, found.size, found.num_heads) == (96, 3, 8, None, None)
    assert found.domains_in == {"rgb": 3, "depth": 1, "semseg": 12, "ired": 3, "sired": 2, "ebands": 2}
    assert found.decoders == {**found.domains_in, "norm_rgb": 3}
    assert (found.decoder_dim, found.decoder_depth, found.has_log_vars) == (64, 2, False)
    assert (weights.family, weights.domains_in, weights.img_size) == ("multimae", tuple(found.domains_in), 32)
    assert (weights.option("alphas"), weights.option("num_visible_tokens"), weights.bands_in) == (0.5, 9, None)
    base = {"global_tokens": torch.zeros(1, 1, 768), RGB: torch.zeros(768, 3, 16, 16)}
    base |= {f"encoder.{number}.norm1.weight": torch.ones(768) for number in range(12)}
    assert (describe(base).size, describe(base).num_heads, describe(base).decoders) == ("base", 12, {})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["bare", "wrapped", "safetensors"])
def test_files(tmp_path, form, prefix):
    source = {prefix + name: value for name, value in published.state().items()}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(source, path)
    else:
        torch.save(published.checkpoint(source) if form == "wrapped" else source, path)
    assert_same(read_weights(path).state, read_weights(published.state()).state)


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_distributed_checkpoints(tmp_path, prefix):
    state = small_state(loss_weighting="uncertainty")
    content = {f"{prefix}{name}": value for name, value in state.items()}
    dcp.save(content | {"optim.state.step": torch.zeros(3)} if prefix else content, checkpoint_id=tmp_path, no_dist=True)
    assert_same(read_weights(tmp_path).state, state)


@pytest.mark.parametrize(
    ("command_line", "order"),
    [
        ("", ["rgb", "depth", "semseg", "ired"]),
        ("semseg", ["rgb", "depth", "ired", "semseg"]),
        ("semseg-rgb", ["depth", "ired", "semseg", "rgb"]),
    ],
)
def test_log_variances_follow_the_predictions(command_line, order):
    """The published program weighs its predictions in the order in which they are made: those in float32 come last."""
    left_out = tuple(f"output_adapters.{name}." for name in ("sired", "ebands", "norm_rgb"))
    values = {name: float(number) for number, name in enumerate(order)}
    log_vars = torch.tensor(list(values.values()))
    content = published.checkpoint(published.state(without=left_out), log_vars, fp32_output_adapters=command_line)
    weights = read_weights(content)
    assert weights.state["log_vars"].tolist() == [values[name] for name in ("rgb", "depth", "semseg", "ired")]
    content["loss_balancer"] = {"module.log_vars": log_vars[:3]}
    with pytest.raises(CheckpointError, match=r"3 log variances for 4 decoders \(rgb, depth, semseg, ired\)"):
        read_weights(content)


@pytest.mark.parametrize("options", [{}, {"loss_weighting": "uncertainty"}, {"domains_in": ["rgb", "sentinel1"]}], ids=str)
def test_the_model_of_our_own_state_dict(options):
    state = small_state(**options)
    built = build_multimae(state, img_size=small.SIZE)
    assert not built.training
    assert_same(state_of(built), state)
    assert (built.img_size, built.encoder[0].attn.num_heads) == (small.SIZE, 3)
    assert list(built.domains_in) == options.get("domains_in", list(mpmae.create_model("multimae_tiny").domains_in))


def test_what_stands_beside_the_weights_decides(caplog):
    caplog.set_level(logging.INFO)
    model = {"img_size": small.SIZE, "num_visible_tokens": 11, "alphas": {"rgb": 2.0}, "decoder_num_heads": 2}
    weights = read_weights(small_state())
    recorded = Weights(
        weights.state, weights.scheme, "run", {"config": {"model": model}, "domains_in": list(weights.domains_in)}
    )
    built = build_multimae(recorded)
    assert (built.img_size, built.num_visible, built.alphas[:2]) == (small.SIZE, 11, (2.0, 1.0))
    assert built.decoders.cross.num_heads == 2
    assert "assumed as usual: sample_domains_uniformly = False, reference_quirks = False" in caplog.text
    assert build_multimae(recorded, img_size=40).num_visible == 6 * 25 // 6
    assert build_multimae(recorded, bands_available={"aster": ["elevation"]}).select_depth is None
    with pytest.raises(ConfigError, match="img_size = 41 is not a multiple"):
        build_multimae(recorded, img_size=41)
    other = Weights(weights.state, weights.scheme, "run", {"domains_in": ["rgb", "depth"]})
    with pytest.raises(
        CheckpointError, match="config names the input domains rgb, depth, its weights read rgb, depth, semseg"
    ):
        build_multimae(other)


def test_the_published_command_line_builds_the_model():
    """EPFL's own layout: larger decoders, classes of its own; what fits ours loads."""
    source = small_state(domains_in=["rgb", "depth"], domains_out=["rgb", "depth"])
    content = published.checkpoint(published_state(source))
    built = build_multimae(content)
    assert_same(state_of(built), source)
    assert (built.img_size, built.num_visible, built.alphas, built.decoders.cross.num_heads) == (32, 9, (0.5, 0.5), 8)


def test_what_the_published_program_computes_otherwise_is_told(caplog):
    model, content = published.model(), published.checkpoint(published.state(), standardize_depth=False)
    assert load_reference(model, content).other_geometry == ("standardize_depth = False, here True",)
    assert "trained with standardize_depth = False, here True: features will differ" in caplog.text


def test_class_maps_of_other_classes_are_refused():
    source = published.state()
    source[SEMSEG] = torch.zeros(133, 64)
    for leaf, shape in (("weight", (532, 64)), ("bias", (532,))):
        source[f"output_adapters.semseg.out_proj.{leaf}"] = torch.zeros(shape)
    assert describe(read_weights(source).state).domains_in["semseg"] == 133
    with pytest.raises(CheckpointError) as caught:
        load_reference(published.model(), source)
    text = str(caught.value)
    assert "class_emb.weight has shape [133, 64], expected [12, 64]" in text
    assert "decoders.heads.semseg.weight has shape [532, 64], expected [48, 64]" in text


def test_every_problem_is_named_and_nothing_changes():
    model, source = published.model(), published.state()
    before = state_of(model)
    del source["output_adapters.ired.mlp.fc1.bias"], source["output_adapters.sired.task_embeddings.rgb"]
    source["output_adapters.depth.query_norm.weight"] = torch.zeros(63)
    source["output_adapters.rgb.task_embeddings.weather"] = torch.zeros(1, 1, 64)
    with pytest.raises(CheckpointError) as caught:
        load_reference(model, source)
    text = str(caught.value)
    assert "missing output_adapters.ired.mlp.fc1.bias [256]" in text
    assert "missing output_adapters.sired.task_embeddings.rgb [1, 1, 64]" in text
    assert "output_adapters.depth.query_norm.weight is [63] torch.float32, in other decoders [64]" in text
    assert "output_adapters.*.task_embeddings.weather is of no input domain" in text
    assert_same(state_of(model), before)
    ours = state_of(published.model(1))
    del ours["encoder.1.attn.qkv.bias"]
    ours["encoder.9.mlp.fc3.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load_reference(model, ours)
    assert "missing encoder.1.attn.qkv.bias [288]" in str(caught.value)
    assert "unexpected encoder.9.mlp.fc3.weight" in str(caught.value)
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s | {RGB: torch.full_like(s[RGB], torch.nan)}, f"{RGB} holds NaN or inf"),
        (lambda s: s | {RGB: s[RGB].to(torch.int8)}, f"{RGB} is torch.int8, expected floating-point"),
        (lambda s: s | {"input_adapters.rgb.pos_emb": torch.randn(1, 96, 28, 28)}, "off the fixed sin-cos positions"),
        (
            lambda s: s | {"output_adapters.rgb.pos_emb": s["output_adapters.rgb.pos_emb"][0]},
            r"pos_emb has shape \[64, 28, 28\], expected \[1, D, G, G\]",
        ),
        (
            lambda s: s | {"input_adapters.rgb.pos_emb": published.sincos_table(96, 48)},
            "rgb.pos_emb is made for images of 384 px, expected 224 px",
        ),
        (
            lambda s: s | {RGB: s["input_adapters.sired.proj.weight"], "input_adapters.sired.proj.weight": s[RGB]},
            rf"{RGB} has shape \[96, 2, 8, 8\], expected \[96, 3, 8, 8\]",
        ),
        (
            lambda s: {n: v for n, v in s.items() if n != "input_adapters.rgb.pos_emb"} | {RGB: torch.zeros(96, 3, 16, 16)},
            r"different patch sizes \(rgb 16, depth 8, semseg 8,",
        ),
        (lambda s: {n: v for n, v in s.items() if not n.startswith("encoder.1.")}, "missing encoder.1.norm1.weight"),
        (lambda s: {n: v for n, v in s.items() if n != "global_tokens"}, "missing global_tokens"),
        (
            lambda s: s | {"output_adapters.cls.head.weight": torch.zeros(10, 96)},
            "unexpected output_adapters.cls.head.weight",
        ),
        (lambda s: {n: v for n, v in s.items() if ".norm_rgb." not in n}, "missing decoder norm_rgb, which the model has"),
        (
            lambda s: s | {n.replace("rgb", "normal", 1): v for n, v in s.items() if n.startswith("output_adapters.rgb")},
            "unexpected decoder normal; the model has none",
        ),
    ],
)
def test_what_is_refused(change, problem):
    model = published.model()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=problem):
        load_reference(model, change(published.state()))
    assert_same(state_of(model), before)


def test_a_domain_that_we_do_not_know_is_described_and_not_built():
    source = {name.replace(".ired", ".nir"): value for name, value in published.state().items()}
    weights = read_weights(source)
    assert list(describe(weights.state).domains_in) == ["rgb", "depth", "semseg", "sired", "ebands", "nir"]
    assert list(describe(weights.state).decoders)[-2:] == ["nir", "norm_rgb"]
    with pytest.raises(CheckpointError, match="unknown domain 'nir'"):
        build_multimae(weights)


def test_families_are_told_apart():
    multimae, convnext = published.state(), schemes.mmearth()
    with pytest.raises(CheckpointError, match=r"holds a MultiMAE.*here a ConvNeXt V2 is needed\. .*build_multimae"):
        mpmae.create_encoder("convnextv2_atto", checkpoint=multimae)
    with pytest.raises(CheckpointError, match="which is a ConvNeXt V2 or MP-MAE"):
        load_reference(mpmae.create_model("mpmae_atto"), multimae)
    with pytest.raises(CheckpointError, match="which is a MultiMAE"):
        load_reference(published.model(), convnext)
    with pytest.raises(CheckpointError, match="no MultiMAE"):
        build_multimae(convnext)


def test_the_encoder_alone(caplog):
    """Adapters that both have and the blocks; the decoders stay, even where another model's have the same shapes."""
    source = small_state(domains_out=["depth", "ired"], extra_norm_rgb=False)
    model = small.build(torch.float32, domains_in=["rgb", "sentinel1"], domains_out=["rgb", "sired"], extra_norm_rgb=False)
    before = state_of(model)
    report = load_encoder(model, source)
    after = state_of(model)
    for name, value in after.items():
        is_shared = name.startswith(("encoder.", "global_tokens", "input_adapters.rgb"))
        assert torch.equal(value, (source if is_shared else before)[name]), name
    assert "input_adapters.sired.proj.weight" in report.unused
    assert "input_adapters.sentinel1.proj.weight" in report.fresh
    assert "initial values kept: input_adapters (2), decoders" in caplog.text
    with pytest.raises(CheckpointError, match="no domain in common"):
        load_encoder(small.build(torch.float32, domains_in=["sentinel1"]), source)


def test_an_encoder_without_decoders_gets_fresh_ones(caplog):
    source = {name: value for name, value in small_state().items() if not name.startswith("decoders.")}
    built = build_multimae(source, img_size=small.SIZE)
    assert torch.equal(built.encoder[1].mlp.fc1.weight, source["encoder.1.mlp.fc1.weight"])
    assert "initial values kept: decoders" in caplog.text


def test_domains_in_another_order_than_ours_are_refused():
    model = published.model()
    adapters = dict(model.input_adapters.items())
    model.input_adapters = torch.nn.ModuleDict({name: adapters[name] for name in reversed(adapters)})
    with pytest.raises(CheckpointError, match="the model's input domains are ebands, sired"):
        load_reference(model, published.state())
