"""The block operator on Triton kernels, narrow and wide, against the plain form in float64."""

import pytest
import torch

from mpmae import kernels
from mpmae.kernels import backends, pointwise
from mpmae.kernels.pointwise import Options
from tests.kernels import plain

G = 3


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")


@pytest.mark.parametrize(("channels", "module"), [(12, "fused"), (64, "wide")])
@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_equals_the_plain_block(channels, module, scope):
    torch.manual_seed(0)
    side, visible = 2, plain.draw_visible(4, G)
    valid = torch.rand(2, 16) > 0.3
    x = torch.randn(2, 16, channels) * valid[:, :, None]
    dwconv = (torch.randn(channels, 1, 7, 7) * 0.1, torch.randn(channels))
    weights = pointwise.Weights(*(w.detach() * 0.3 for w in plain.draw_weights(channels, torch.float32)))
    leaves = [t.requires_grad_() for t in (x, *dwconv, *weights)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    options, grad = Options(scope, 1e-6, 1e-4), torch.randn_like(x)
    assert pointwise.chosen(x, options).__name__.endswith(module)

    sites = (visible, kernels.tile_slots(visible, G), side, valid)
    out = kernels.sparse_block(leaves[0], leaves[1:3], pointwise.Weights(*leaves[3:]), *sites, options)
    grads = torch.autograd.grad(out, leaves, torch.where(valid[:, :, None], grad, torch.nan))
    y = plain.depthwise(*doubles[:3], visible, G, side)
    expected = plain.pointwise(doubles[0], y, pointwise.Weights(*doubles[3:]), valid, options)
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    pairs = [(out, expected), (grads[0][valid], wanted[0][valid]), *zip(grads[1:], wanted[1:], strict=True)]
    for got, want in pairs:
        assert ((got.double() - want).norm() / want.norm()).item() < 2e-6
