"""The dense ConvNeXt V2: equal to the sparse encoder where both see everything, and callable as timm's models are.

Shapes: N images, C channels, G patches on a side.
"""

import ast
import inspect
import re

import pytest
import torch

import mpmae
from mpmae.models import dense
from mpmae.models.dense import ConvNeXtV2, grid_side
from mpmae.models.encoder import SparseEncoder

DIMS, DEPTHS = (6, 8, 10, 12), (1, 2, 1, 1)


def build(patch_size=8, stem="mmearth", seed=0, **options):
    torch.manual_seed(seed)
    model = ConvNeXtV2(DIMS, DEPTHS, in_chans=3, patch_size=patch_size, stem=stem, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_equals_the_sparse_encoder_that_sees_everything(patch_size, stem):
    side, grid = 3 * patch_size, 3
    sparse = SparseEncoder(
        DIMS, DEPTHS, num_bands=3, img_size=side, patch_size=patch_size, stem=stem, grn_scope="sample"
    ).double()
    model = build(patch_size, stem).double()
    sparse.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("norm.")})
    image = torch.randn(2, 3, side, side, dtype=torch.float64)
    visible = torch.arange(grid * grid).expand(2, -1)
    tokens = sparse(image, torch.ones(2, side, side, dtype=torch.bool), visible)
    features = model.forward_features(image)
    torch.testing.assert_close(features, tokens.transpose(1, 2).unflatten(2, (grid, grid)), rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(features)
    ours = torch.autograd.grad(
        (features * probe).sum(), [p for n, p in model.named_parameters() if not n.startswith("norm.")]
    )
    theirs = torch.autograd.grad(
        (tokens.transpose(1, 2).unflatten(2, (grid, grid)) * probe).sum(), list(sparse.parameters())
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
def test_names_are_the_sparse_encoder_s(stem):
    sparse = mpmae.create_model("mpmae_atto", stem=stem).encoder
    encoder = mpmae.create_encoder("convnextv2_atto", stem=stem, num_classes=5)
    own = {name: value.shape for name, value in encoder.named_parameters()}
    extra = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert own == {name: value.shape for name, value in sparse.named_parameters()} | {key: own[key] for key in extra}
    assert list(own) == [*dict(sparse.named_parameters()), *extra]
    missing, unexpected = encoder.load_state_dict(sparse.state_dict(), strict=False)
    assert (missing, unexpected) == (extra, [])


@pytest.mark.parametrize("patch_size", [8, 16, 32])
@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
@pytest.mark.parametrize("stem_padding", ["same", "reference"])
def test_grid_side_says_what_comes_out(patch_size, stem, stem_padding):
    model = build(patch_size, stem, stem_padding=stem_padding)
    side = 2 * patch_size
    expected = grid_side(side, patch_size, stem, stem_padding)
    assert model.forward_features(torch.zeros(1, 3, side, side)).shape == (1, DIMS[-1], expected, expected)
    assert expected == (1 if (patch_size, stem, stem_padding) == (8, "mmearth", "reference") else 2)


def test_only_the_padding_and_epsilon_differ_with_the_reference_stem():
    same, reference = build(), build(stem_padding="reference")
    assert [block.grn.eps for stage in same.stages for block in stage] == [1e-6] * sum(DEPTHS)
    assert [block.grn.eps for stage in reference.stages for block in stage] == [1e-4] * sum(DEPTHS)
    assert build(grn_eps=1e-3).stages[0][0].grn.eps == 1e-3
    image = torch.randn(1, 3, 24, 24)
    torch.testing.assert_close(reference.forward_stem(image)[-1], same.forward_stem(image)[-1][:, :, 1:-1, 1:-1])


@pytest.mark.parametrize(
    ("indices", "stages"),
    [(None, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), ([0, 2], [0, 2]), ((-1, 1), [1, 3]), ([2, -2], [2])],
    ids=str,
)
def test_pyramid(indices, stages):
    model, image = build(), torch.randn(2, 3, 16, 24)
    final, maps = model.forward_intermediates(image, indices)
    assert torch.equal(final, model.forward_features(image))
    for stage, x in zip(stages, maps, strict=True):
        info = model.feature_info[stage]
        assert x.shape == (2, info["num_chs"], 16 // info["reduction"], 24 // info["reduction"])
    early, same_maps = model.forward_intermediates(image, indices, stop_early=True)
    alone = model.forward_intermediates(image, indices, intermediates_only=True, norm=True)
    assert torch.equal(early, maps[-1])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(maps, same_maps, alone, strict=True))


def test_stop_early_computes_no_more_than_is_asked_for():
    model, ran = build(), []
    for number, stage in enumerate(model.stages):
        stage[0].register_forward_hook(lambda *_, number=number: ran.append(number))
    model.forward_intermediates(torch.zeros(1, 3, 8, 8), [1], stop_early=True)
    assert ran == [0, 1]


def test_head():
    model, image = build(num_classes=5), torch.randn(2, 3, 16, 16)
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    expected = torch.nn.functional.layer_norm(features.mean((2, 3)), (12,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(pooled, expected)
    assert torch.equal(model(image), model.get_classifier()(pooled))
    assert (model.num_classes, model.num_features, model.head_hidden_size, model.in_chans) == (5, 12, 12, 3)
    model.reset_classifier(0)
    assert torch.equal(model(image), pooled)
    assert model.double().num_classes == 0
    model.reset_classifier(7)
    assert model(image.double()).shape == (2, 7)
    assert model.head.weight.std() < 0.1


@pytest.mark.parametrize(("patch_size", "stem"), [(8, "mmearth"), (16, "mmearth"), (32, "convnext")])
def test_feature_info(patch_size, stem):
    info = build(patch_size, stem).feature_info
    assert [entry["reduction"] for entry in info] == [patch_size // 8, patch_size // 4, patch_size // 2, patch_size]
    assert [entry["num_chs"] for entry in info] == list(DIMS)
    assert [entry["module"] for entry in info] == ["stages.0", "stages.1", "stages.2", "stages.3"]


def layers_of(model, coarse):
    """Layer number of each parameter, from the patterns as timm reads them: ordinals by group, captures and suffix."""
    ordinals = {}
    for name, _ in model.named_parameters():
        ordinals[name] = (float("inf"),)
        for group, (_, patterns) in enumerate(model.group_matcher(coarse).items()):
            for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns:
                match = re.match(pattern, name)
                if match and ordinals[name] == (float("inf"),):
                    ordinals[name] = (group, *map(int, match.groups()), *(suffix or ()))
    order = sorted(set(ordinals.values()))
    return {name: order.index(ordinal) for name, ordinal in ordinals.items()}


def test_groups_for_layer_wise_rates():
    model = build(num_classes=2)
    fine, coarse = layers_of(model, False), layers_of(model, True)
    assert [fine[f"stages.{s}.{b}.norm.bias"] for s, b in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))] == [1, 2, 3, 4, 5]
    assert [fine[f"downsamples.{i}.conv.bias"] for i in range(3)] == [2, 4, 5]
    assert [coarse[f"downsamples.{i}.conv.bias"] for i in range(3)] == [2, 3, 4]
    assert coarse["stages.1.0.norm.bias"] == coarse["stages.1.1.norm.bias"] == 2
    assert fine["stem.pool.weight"] == coarse["stem.pool.weight"] == 0
    assert fine["norm.bias"] == fine["head.bias"] == 6
    assert model.no_weight_decay() == set()


def test_initial_weights():
    torch.manual_seed(0)
    model = mpmae.create_encoder("convnextv2_atto", num_classes=10)
    for name, value in model.named_parameters():
        if name.endswith("bias") or ".grn." in name:
            assert value.count_nonzero() == 0, name
        elif value.ndim == 1:
            assert (value == 1).all(), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=5 / value.numel() ** 0.5), name
            assert value.abs().max() < 0.2, name


def test_drop_path():
    model = build(drop_path_rate=0.4)
    assert [block.drop_path_rate for stage in model.stages for block in stage] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block, x = model.stages[3][0], torch.randn(1, 12, 2, 2).expand(4000, -1, -1, -1)
    change = block.eval()(x[:1]) - x[:1]
    changes = (block.train()(x) - x).flatten(1)
    kept = changes.abs().sum(1) > 0
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.05)
    torch.testing.assert_close(changes[kept], (change / 0.6).flatten(1).expand(int(kept.sum()), -1))
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(model.eval()(image), build()(image))


def test_grad_checkpointing_changes_no_gradient():
    model, image = build(), torch.randn(2, 3, 16, 16)
    plain = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    calls = []
    model.stages[0][0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
def test_traces(stem):
    model, image = build(16, stem, num_classes=2), torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(exported(image), model(image))


def test_a_batch_of_any_size_exports():
    model = build(num_classes=2)
    shape = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=(shape,)).module()
    image = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(exported(image), model(image))


def test_second_derivatives():
    model = build().double()
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = model.stages[3][0].pwconv1.weight
    (slope,) = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), weight)
    step = torch.randn_like(weight)

    def slope_norm(amount):
        with torch.no_grad():
            weight.add_(amount * step)
        (slope,) = torch.autograd.grad(model(image).square().sum(), image)
        with torch.no_grad():
            weight.sub_(amount * step)
        return slope.square().sum().item()

    estimate = (slope_norm(1e-5) - slope_norm(-1e-5)) / 2e-5
    assert (second * step).sum().item() == pytest.approx(estimate, rel=1e-5)


def test_a_dead_channel_has_a_finite_gradient():
    model = build()
    with torch.no_grad():
        model.stages[0][0].pwconv1.weight.zero_()
        model.stages[0][0].pwconv1.bias.zero_()
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("how", ["autocast", "module"])
def test_bfloat16(how):
    model, image = build(num_classes=2), torch.randn(2, 3, 16, 16)
    exact = model(image)
    if how == "module":
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        out = model(image)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m: m(torch.zeros(1, 4, 8, 8)), r"\[1, 4, 8, 8\]: expected \[N, 3, H, W\]"),
        (lambda m: m(torch.zeros(3, 8, 8)), r"\[3, 8, 8\]: expected"),
        (lambda m: m(torch.zeros(1, 3, 8, 12)), "8 x 12 pixels: both sides must be multiples of patch_size = 8"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 8, 8), [4]), r"\[4\]: expected at least one stage"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 8, 8), [-5]), r"\[-5\]"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 8, 8), []), r"indices = \[\]"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 8, 8), 5), "indices = 5: .* 1 to 4"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 8, 8), 0), "indices = 0"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NLC"), "'NLC'"),
        (lambda m: m.reset_classifier(-1), "num_classes = -1"),
        (lambda m: build(stem="vit"), "stem = 'vit': expected one of mmearth, convnext"),
        (lambda m: build(stem_padding="valid"), "stem_padding = 'valid'"),
        (lambda m: build(patch_size=12), "patch_size = 12: expected a multiple of 8"),
        (lambda m: ConvNeXtV2(DIMS[:3], DEPTHS, in_chans=3, patch_size=8), "one number for each of four stages"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run(build())


def test_the_file_needs_torch_alone():
    """It is copied as it is into exported folders."""
    tree = ast.parse(inspect.getsource(dense))
    tops = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add(node.module.split(".")[0])
    assert tops == {"torch", "collections", "itertools"}
