"""The block operator against the plain form on the zero-filled grid, and what torch asks of an operator."""

import pytest
import torch

from mpmae import kernels
from mpmae.kernels.pointwise import Options
from tests.kernels import plain

G, CHANNELS = 3, 4


def draw(side, num_visible, gaps, dtype=torch.float64):
    torch.manual_seed(0)
    visible = plain.draw_visible(num_visible, G)
    x = torch.randn(2, num_visible * side**2, CHANNELS, dtype=dtype)
    valid = None
    if gaps:
        valid = torch.rand(x.shape[:2]) > 0.3
        x = x * valid[:, :, None]
    dwconv = tuple(torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((CHANNELS, 1, 7, 7), (CHANNELS,)))
    return (
        x.requires_grad_(),
        dwconv,
        plain.draw_weights(CHANNELS, dtype),
        (visible, kernels.tile_slots(visible, G), side, valid),
    )


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("side", "num_visible"), [(8, 2), (4, 4), (2, 9), (1, 9), (1, 5), (2, 1)])
def test_equals_the_plain_block(side, num_visible, gaps):
    x, dwconv, weights, sites = draw(side, num_visible, gaps)
    visible, *_, valid = sites
    options = Options("sample", 1e-6, 1e-4)
    y = plain.depthwise(x, *dwconv, visible, G, side)
    expected = plain.pointwise(x, y, weights, valid, options)
    out = kernels.sparse_block(x, dwconv, weights, *sites, options)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    probe, leaves = torch.randn_like(out), (x, *dwconv, *weights)
    wanted = torch.autograd.grad(expected, leaves, probe)
    if gaps:
        probe = torch.where(valid[:, :, None], probe, torch.nan)
    grads = torch.autograd.grad(out, leaves, probe)
    for leaf, got, want in zip(leaves, grads, wanted, strict=True):
        if leaf is x and gaps:  # at sites that do not exist it means nothing
            got, want = got[valid], want[valid]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert leaf is x or got.stride() == leaf.stride()


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_gradcheck_and_registration(scope):
    x, dwconv, weights, sites = draw(1, 5, False)
    valid = torch.rand(x.shape[:2]) > 0.3
    gaps = (*sites[:-1], valid)
    x = (x * valid[:, :, None]).detach().requires_grad_()
    options = Options(scope, 1e-6, 1e-4)

    def run(*leaves):
        inside = leaves[0] * valid[:, :, None]
        return kernels.sparse_block(inside, leaves[1:3], kernels.pointwise.Weights(*leaves[3:]), *gaps, options)

    assert torch.autograd.gradcheck(run, (x, *dwconv, *weights), fast_mode=True)
    torch.library.opcheck(torch.ops.mpmae.block.default, (x, *dwconv, *weights, *gaps, *options, True))
    torch.library.opcheck(
        torch.ops.mpmae.block.default,
        tuple(t.detach() if torch.is_tensor(t) else t for t in (x, *dwconv, *weights, *sites, *options, False)),
    )


def test_autocast_sets_the_dtype_of_the_block_but_not_of_its_gradients():
    x, dwconv, weights, sites = draw(2, 5, False, torch.float32)
    options = Options("sample", 1e-6, 1e-4)
    wanted = kernels.sparse_block(x, dwconv, weights, *sites, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernels.sparse_block(x, dwconv, weights, *sites, options)
    assert out.dtype == torch.bfloat16
    assert ((out - wanted).norm() / wanted.norm()).item() < 0.02
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *dwconv, *weights))


def test_without_gradients_nothing_is_kept():
    x, dwconv, weights, sites = draw(1, 5, False)
    options = Options("sample", 1e-6, 1e-4)
    outputs = torch.ops.mpmae.block(x, *dwconv, *weights, *sites, *options, False)
    assert all(t.numel() == 0 for t in outputs[1:])
    assert torch.equal(outputs[0], torch.ops.mpmae.block(x, *dwconv, *weights, *sites, *options, True)[0])


def test_compiles_without_a_graph_break():
    x, dwconv, weights, sites = draw(2, 4, False)
    options = Options("sample", 1e-6, 1e-4)

    def run(x):
        return kernels.sparse_block(x * 2, dwconv, weights, *sites, options).square().sum()

    expected = torch.autograd.grad(run(x), x)[0]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected, rtol=1e-12, atol=1e-12)


def test_bad_input_is_said_at_once():
    x, dwconv, weights, (visible, slots, side, _) = draw(2, 4, False)
    options = Options("sample", 1e-6, 1e-4)
    wrong = weights._replace(bias1=weights.bias1[:3], weight2=weights.weight2.half())
    valid = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"block: bias1: shape \[3\], expected \[16\]; weight2: dtype torch.float16.*; valid: .*\[2, 16\]"
    ):
        kernels.sparse_block(x, dwconv, wrong, visible, slots, side, valid, options)
    with pytest.raises(ValueError, match="tile_side: 3"):
        kernels.sparse_block(x, dwconv, weights, visible, slots, 3, None, options)
