"""The sparse encoder against a dense one that masks after every operation (the SparK way), in float64.

Shapes: N samples, C channels, H sites on a side.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mpmae.masking import draw_visible, visible_bool
from mpmae.models.encoder import SparseEncoder

G = 3
DIMS, DEPTHS = (6, 8, 10, 12), (1, 2, 1, 1)


def build(patch_size, stem, grn_scope="sample", seed=0):
    torch.manual_seed(seed)
    encoder = SparseEncoder(
        DIMS, DEPTHS, num_bands=3, img_size=G * patch_size, patch_size=patch_size, stem=stem, grn_scope=grn_scope
    ).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def layer_norm(x, norm):
    return F.layer_norm(x.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)


def coarser(exists, factor):
    return F.max_pool2d(exists, factor) if factor > 1 else exists


def dense_block(x, block, exists):
    y = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=x.shape[1])
    y = layer_norm(y, block.norm).permute(0, 2, 3, 1)
    h = F.gelu(F.linear(y, block.pwconv1.weight, block.pwconv1.bias)) * exists.permute(0, 2, 3, 1)
    norm = torch.linalg.vector_norm(h, dim=(1, 2) if block.options.scope == "sample" else (0, 1, 2), keepdim=True)
    h = h + block.grn.gamma * h * (norm / (norm.mean(-1, keepdim=True) + block.options.grn_eps)) + block.grn.beta
    return (x + F.linear(h, block.pwconv2.weight, block.pwconv2.bias).permute(0, 3, 1, 2)) * exists


def dense(encoder, image, exists):
    """[N, C, G, G] for `image` [N, B, S, S]; `exists` [N, 1, S, S] is 1 where a pixel exists."""
    stem, stride, x = encoder.stem, encoder.stem_stride, image * exists
    if hasattr(stem, "pool"):
        x = F.gelu(layer_norm(F.conv2d(x, stem.conv.weight, stem.conv.bias, padding=1), stem.conv_norm)) * exists
        x = F.conv2d(x, stem.pool.weight, stem.pool.bias, stride=stride, groups=x.shape[1])
    else:
        x = F.conv2d(x, stem.conv.weight, stem.conv.bias, stride=stride)
    exists = coarser(exists, stride)
    x = layer_norm(x, stem.norm) * exists
    for stage, blocks in enumerate(encoder.stages):
        if stage:
            down = encoder.downsamples[stage - 1]
            x = F.conv2d(layer_norm(x, down.norm) * exists, down.conv.weight, down.conv.bias, stride=2)
            exists = coarser(exists, 2)
            x = x * exists
        for block in blocks:
            x = dense_block(x, block, exists)
    return x


def shown_pixels(visible, patch_size):
    shown = visible_bool(visible, G * G).double().view(-1, 1, G, G)
    return shown.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


@pytest.mark.parametrize("gaps", [False, True], ids=["all_valid", "gaps"])
@pytest.mark.parametrize("num_visible", [9, 4, 1])
@pytest.mark.parametrize(
    ("patch_size", "stem", "grn_scope"),
    [
        (8, "mmearth", "sample"),
        (8, "convnext", "batch"),
        (16, "mmearth", "batch"),
        (32, "mmearth", "sample"),
        (32, "convnext", "sample"),
    ],
)
def test_equals_the_masked_dense_encoder(patch_size, stem, grn_scope, num_visible, gaps):
    encoder, side = build(patch_size, stem, grn_scope), G * patch_size
    visible = draw_visible(0, 0, [0, 1], G * G, num_visible)
    pixel_valid = torch.ones(2, side, side, dtype=torch.bool)
    if gaps:
        pixel_valid[0, : patch_size + 3, 2:7] = False
        first = int(visible[1, 0])  # a whole visible patch without data
        row, column = first // G * patch_size, first % G * patch_size
        pixel_valid[1, row : row + patch_size, column : column + patch_size] = False
    image = torch.randn(2, 3, side, side, dtype=torch.float64) * pixel_valid[:, None]
    expected = dense(encoder, image, shown_pixels(visible, patch_size) * pixel_valid[:, None])
    tokens = encoder(image, pixel_valid, visible)
    wanted = expected.flatten(2).transpose(1, 2).gather(1, visible[:, :, None].expand(-1, -1, DIMS[-1]))
    torch.testing.assert_close(tokens, wanted, rtol=1e-10, atol=1e-10)

    probe = torch.randn_like(wanted)
    parameters = list(encoder.parameters())
    grads = torch.autograd.grad((tokens * probe).sum(), parameters)
    for grad, dense_grad in zip(grads, torch.autograd.grad((wanted * probe).sum(), parameters), strict=True):
        torch.testing.assert_close(grad, dense_grad, rtol=1e-8, atol=1e-8)


def test_hidden_pixels_change_nothing():
    encoder = build(8, "mmearth")
    visible = draw_visible(0, 0, [3, 4], G * G, 4)
    shown = shown_pixels(visible, 8)
    image, pixel_valid = torch.randn(2, 3, 24, 24, dtype=torch.float64), torch.ones(2, 24, 24, dtype=torch.bool)
    other_valid = pixel_valid & ((torch.rand(2, 24, 24) < 0.5) | (shown[:, 0] > 0))
    expected = encoder(image, pixel_valid, visible)
    assert torch.equal(encoder(torch.where(shown > 0, image, 7.0), other_valid, visible), expected)
    assert not torch.equal(encoder(image + 0.1 * shown, pixel_valid, visible), expected)


def test_samples_do_not_meet_with_sample_scope():
    encoder = build(8, "mmearth")
    visible = draw_visible(0, 0, [3, 4], G * G, 4)
    image, pixel_valid = torch.randn(2, 3, 24, 24, dtype=torch.float64), torch.ones(2, 24, 24, dtype=torch.bool)
    alone = encoder(image[:1], pixel_valid[:1], visible[:1])
    torch.testing.assert_close(encoder(image, pixel_valid, visible)[:1], alone, rtol=1e-12, atol=1e-12)


def test_a_sample_without_any_data_is_zero():
    encoder = build(8, "mmearth")
    visible = draw_visible(0, 0, [0, 1], G * G, 4)
    pixel_valid = torch.ones(2, 24, 24, dtype=torch.bool)
    pixel_valid[1] = False
    image = torch.randn(2, 3, 24, 24, dtype=torch.float64) * pixel_valid[:, None]
    tokens = encoder(image, pixel_valid, visible)
    assert tokens[1].count_nonzero() == 0
    tokens.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
def test_but_for_eager_cpu_no_value_is_looked_at(monkeypatch, stem):
    """In tensors without values a look would raise, as it does where one is taken."""
    encoder = build(8, stem)
    with FakeTensorMode(allow_non_fake_inputs=True):
        image, pixel_valid = torch.empty(2, 3, 24, 24).double(), torch.empty(2, 24, 24, dtype=torch.bool)
        visible = torch.empty(2, 4, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            encoder(image, pixel_valid, visible)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert encoder(image, pixel_valid, visible).shape == (2, 4, DIMS[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
def test_nothing_waits_for_a_gpu(stem):
    encoder = build(8, stem).float().cuda()
    visible = draw_visible(0, 0, [3, 4], G * G, 4).cuda()
    image, pixel_valid = torch.randn(2, 3, 24, 24).cuda(), torch.ones(2, 24, 24, dtype=torch.bool).cuda()
    encoder(image, pixel_valid, visible).sum().backward()  # kernels are compiled and loaded, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(image, pixel_valid, visible).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gelus_are_close_but_not_the_same():
    image, valid = torch.randn(2, 3, 24, 24), torch.ones(2, 24, 24, dtype=torch.bool)
    visible, features = torch.tensor([[0, 4, 5], [2, 3, 8]]), {}
    for gelu in ("erf", "poly", "tanh"):
        torch.manual_seed(0)
        encoder = SparseEncoder(
            DIMS, DEPTHS, num_bands=3, img_size=24, patch_size=8, stem="mmearth", grn_scope="sample", gelu=gelu
        )
        with torch.no_grad():
            features[gelu] = encoder(image, valid, visible)
    for gelu in ("poly", "tanh"):
        error = ((features[gelu] - features["erf"]).norm() / features["erf"].norm()).item()
        assert 0 < error < 5e-3
