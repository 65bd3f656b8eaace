"""The written-out pointwise half and its backward against autograd of the plain form, in float64."""

import pytest
import torch
import torch.nn.functional as F

from mpmae.kernels.pointwise import fit_normal_cdf, formulas
from tests.kernels import plain

CHANNELS, SITES, SAMPLES = 5, 7, 3
GELU_NAMES = {"erf": "none", "tanh": "tanh"}
SCOPES = ["sample", "batch"]


def draw():
    torch.manual_seed(0)
    residual, y, grad = (torch.randn(SAMPLES, SITES, CHANNELS, dtype=torch.float64) for _ in range(3))
    valid = torch.rand(SAMPLES, SITES) > 0.3
    valid[1] = False
    return residual * valid[:, :, None], y, grad, plain.draw_weights(CHANNELS), valid


@pytest.mark.parametrize("gelu", GELU_NAMES)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_autograd(scope, gaps, gelu):
    residual, y, grad, weights, valid = draw()
    valid = valid if gaps else None
    options = formulas.Options(scope, 1e-6, 1e-4, gelu)
    out, saved = formulas.forward(residual, y, weights, valid, options)
    expected = plain.pointwise(residual, y.requires_grad_(), weights, valid, options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, (y, *weights), grad)
    poisoned = grad if valid is None else torch.where(valid[:, :, None], grad, torch.nan)
    with torch.no_grad():
        grad_y, grads = formulas.backward(poisoned, y, weights, saved, valid, options)
    for got, want in zip((grad_y, *grads), wanted, strict=True):
        torch.testing.assert_close(got, want.view_as(got), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("scope", SCOPES)
def test_sites_that_do_not_exist_change_nothing(scope):
    residual, y, grad, weights, valid = draw()
    options = formulas.Options(scope, 1e-6, 1e-6)
    with torch.no_grad():
        out, saved = formulas.forward(residual, y, weights, valid, options)
        other, saved_other = formulas.forward(residual, torch.where(valid[:, :, None], y, 1e3), weights, valid, options)
        grads, grads_other = (formulas.backward(grad, y, weights, kept, valid, options) for kept in (saved, saved_other))
    assert out[~valid].count_nonzero() == 0
    assert grads[0][~valid].count_nonzero() == 0
    assert torch.equal(out, other)
    for got, wanted in zip(grads[1], grads_other[1], strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_norm_of_zero_has_a_finite_gradient(scope):
    _, y, grad, weights, valid = draw()
    options = formulas.Options(scope, 1e-6, 1e-6)
    nothing = torch.zeros_like(valid)
    with torch.no_grad():
        out, saved = formulas.forward(torch.zeros_like(y), y, weights, nothing, options)
        grad_y, grads = formulas.backward(grad, y, weights, saved, nothing, options)
    for value in (out, grad_y, *grads):
        assert value.count_nonzero() == 0


@pytest.mark.parametrize("scope", SCOPES)
def test_the_norm_accumulates_wider_than_bfloat16(scope):
    torch.manual_seed(0)
    y, weights = torch.randn(2, 4096, 4), plain.draw_weights(4, torch.float32)
    options = formulas.Options(scope, 1e-6, 1e-6)
    with torch.no_grad():
        norm = formulas.forward(torch.zeros_like(y), y, weights, None, options)[1].norm
        half = formulas.forward(torch.zeros_like(y).bfloat16(), y.bfloat16(), weights, None, options)[1].norm
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, norm, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", GELU_NAMES)
def test_gelu_and_its_slope(kind):
    a = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    expected = F.gelu(a, approximate=GELU_NAMES[kind])
    value, slope = formulas.gelu_and_slope(a.detach(), kind)
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
