"""The pointwise half of a wide block in Triton's interpreter, products by torch on the CPU."""

import pytest
import torch

from mpmae.kernels.pointwise import formulas, hidden_passes, norm_passes, row_passes, wide
from mpmae.kernels.pointwise.formulas import Options
from tests.kernels.error_bounds import poisoned
from tests.kernels.rounding import rounding
from tests.kernels.wide_cases import Case, check, draw, run

__all__ = ["poisoned", "rounding"]

pytestmark = pytest.mark.usefixtures("poisoned", "rounding")

SCOPES = ("sample", "batch")
NARROW, RAGGED, LONG = Case(3, 7, 24, True), Case(3, 11, 160, True), Case(2, 99, 24, True)


def options(scope, gelu="erf"):
    return Options(scope, 1e-6, 1e-4, gelu)


@pytest.mark.parametrize("case", [NARROW, NARROW._replace(gaps=False), RAGGED, LONG])
@pytest.mark.parametrize("scope", SCOPES)
def test_float32(scope, case):
    check(wide, case, torch.float32, options(scope))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [NARROW, LONG])
@pytest.mark.parametrize("scope", SCOPES)
def test_half_precision(scope, case, dtype):
    check(wide, case, dtype, options(scope))


def test_tanh():
    check(wide, NARROW, torch.float32, options("sample", "tanh"))


def test_the_cases_take_both_ways():
    ways = {wide.folds("sample", case.num_sites, case.num_channels) for case in (NARROW, RAGGED, LONG)}
    assert ways == {True, False}
    assert wide.folds("batch", 1, 512)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_lies_at_missing_sites_changes_no_bit(scope):
    inputs = draw(NARROW, torch.float32)
    hole = ~inputs.valid[:, :, None]
    other = inputs._replace(**{name: torch.where(hole, 7.0, getattr(inputs, name)) for name in ("residual", "y", "grad")})
    for got, wanted in zip(run(wide, other, options(scope)), run(wide, inputs, options(scope)), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_saved_is_what_the_formulas_save(scope):
    inputs = draw(NARROW, torch.float32)
    residual, y, _, weights, valid = inputs
    saved = wide.forward(residual, y, weights, valid, options(scope))[1]
    expected = formulas.forward(residual, y.nan_to_num(), weights, valid, options(scope))[1]
    for name, got, wanted in zip(saved._fields, saved, expected, strict=True):
        if name in ("mean", "rstd"):
            got, wanted = got[valid], wanted[valid]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_a_backward_leaves_what_it_reads():
    """A second backward over the same graph gives the same bits."""
    residual, y, grad, weights, valid = draw(NARROW, torch.float32)
    _, saved = wide.forward(residual, y, weights, valid, options("sample"))
    first, second = (wide.backward(grad, y, weights, saved, valid, options("sample")) for _ in range(2))
    assert all(map(torch.equal, (first[0], *first[1]), (second[0], *second[1])))


def test_strips_of_several_norms(monkeypatch):
    monkeypatch.setattr(norm_passes, "TARGET_PROGRAMS", 1)
    outer, weight, factor = torch.randn(3, 20, 24), torch.randn(20, 24), torch.randn(3, 24)
    grad_weight, products = norm_passes.unfold(outer, weight, factor)
    torch.testing.assert_close(grad_weight, (outer * factor[:, None]).sum(0))
    torch.testing.assert_close(products, (outer * weight).sum(1))


def test_norms_longer_than_a_tile():
    torch.manual_seed(0)
    norm, gamma, products = torch.rand(2, 1100), torch.randn(1100), torch.randn(2, 1100)
    norm[:, ::7] = 0
    mean, relative, factor = formulas.grn_factors(norm, gamma, 1e-6)
    torch.testing.assert_close(norm_passes.factors(norm, gamma, 1e-6), factor)
    pull, grad_gamma = norm_passes.pulls(products, norm, gamma, 1e-6)
    torch.testing.assert_close(pull, formulas.grn_pull(products, norm, mean, gamma), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_gamma, (relative * products).sum(0))


def test_strips_cover_each_row_once():
    for num_rows, num_blocks, rows in ((1, 1, 8), (1_245_184, 2, 8), (33, 3, 8)):
        length = row_passes.strip_length(num_rows, num_blocks, rows)
        assert length % rows == 0
        assert -(-num_rows // length) * num_blocks <= 2 * row_passes.TARGET_PROGRAMS
    shape = hidden_passes._Strips(torch.empty(4, 300, 640))
    assert shape.sums.shape == (4, -(-300 // shape.sizes[2]), 640)


def test_supports_names_every_reason():
    assert wide.supports(torch.empty(2, 3, 128, dtype=torch.bfloat16), options("sample")) is None
    reasons = wide.supports(torch.empty(2, 3, 5000, dtype=torch.float64), options("image", "relu"))
    assert all(word in reasons for word in ("5000", "float64", "image", "relu"))
