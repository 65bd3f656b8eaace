"""The written-out pointwise backward against autograd and finite differences, in float64."""

import pytest
import torch
import torch.nn.functional as F

from mpmae.kernels import pointwise_block
from mpmae.kernels.pointwise import fit_normal_cdf, formulas

CHANNELS, SITES, SAMPLES = 5, 7, 3
GELU_NAMES = {"erf": "none", "tanh": "tanh"}


def draw():
    torch.manual_seed(0)
    shapes = [(5,), (5,), (20, 5), (20,), (1, 20), (1, 20), (5, 20), (5,)]
    weights = formulas.Weights(*(torch.randn(*shape, dtype=torch.float64) for shape in shapes))
    residual, y, grad = (torch.randn(SAMPLES, SITES, CHANNELS, dtype=torch.float64) for _ in range(3))
    valid = torch.rand(SAMPLES, SITES) > 0.3
    valid[1] = False
    return residual, y, grad, weights, valid


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_equals_autograd(scope, gaps):
    residual, y, grad, weights, valid = draw()
    valid = valid if gaps else None
    if gaps:
        residual = residual * valid[:, :, None]
    options = formulas.Options(scope, 1e-6, 1e-4)
    out, saved = formulas.forward(residual, y, weights, valid, options)
    leaves = [t.requires_grad_() for t in (y, *weights)]
    pairs = (weights[0:2], weights[2:4], weights[4:6], weights[6:8])
    expected = pointwise_block(residual, y, *pairs, valid, scope=scope, norm_eps=1e-6, grn_eps=1e-4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, leaves, grad)
    poisoned = grad if valid is None else torch.where(valid[:, :, None], grad, torch.nan)
    with torch.no_grad():
        grad_y, grads = formulas.backward(poisoned, y, weights, saved, valid, options)
    for got, want in zip((grad_y, *grads), wanted, strict=True):
        torch.testing.assert_close(got, want.view_as(got), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", GELU_NAMES)
def test_gelu_and_its_slope(kind):
    a = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    expected = F.gelu(a, approximate=GELU_NAMES[kind])
    value, slope = formulas.gelu_and_slope(a, kind)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), a)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kind", "value_error", "slope_error"), [("tanh", 4.8e-4, 8.7e-4), ("poly", 1.3e-4, 1.3e-4)])
def test_errors_of_the_other_gelus_are_as_stated(kind, value_error, slope_error):
    a = torch.linspace(-12, 12, 240001, dtype=torch.float64)
    pairs = zip(formulas.gelu_and_slope(a, kind), formulas.gelu_and_slope(a, "erf"), strict=True)
    errors = [(got - exact).abs().max().item() for got, exact in pairs]
    assert 0.9 * value_error < errors[0] <= value_error
    assert 0.9 * slope_error < errors[1] <= slope_error


def test_the_fit_gives_the_coefficients_of_poly():
    assert fit_normal_cdf.CUT == formulas.CDF_CUT
    fitted = fit_normal_cdf.fit()
    assert fitted == pytest.approx(formulas.CDF_COEFFICIENTS, rel=1e-4)
