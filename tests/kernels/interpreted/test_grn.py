"""Reductions around GRN in the interpreter, against the formulas."""

import pytest
import torch

from mpmae.kernels.pointwise import grn
from mpmae.kernels.pointwise.formulas import grn_factors, grn_pull


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: plain(*a, **k).fill_(torch.nan))


@pytest.mark.parametrize(("num_norms", "num_partials", "length"), [(1, 700, 40), (3, 5, 33), (2, 1, 7)])
def test_partial_sums(num_norms, num_partials, length):
    torch.manual_seed(0)
    partials = torch.randn(num_norms, num_partials, length)
    got = grn.sum_partials(partials)
    assert got.shape == (num_norms, 1, length)
    torch.testing.assert_close(got, partials.double().sum(1, keepdim=True).float(), rtol=1e-5, atol=2e-5)
    few = grn.sum_partials(partials, 4)
    assert few.shape[1] <= 4
    torch.testing.assert_close(few.sum(1), got[:, 0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("num_norms", "num_partials"), [(1, 300), (3, 2)])
def test_norms_factors_and_pull(num_norms, num_partials):
    torch.manual_seed(0)
    hidden, eps = 20, 1e-4
    partials = torch.rand(num_norms, num_partials, hidden)
    partials[:, :, 3] = 0
    gamma, products = torch.randn(1, hidden), torch.randn(num_norms, num_partials, hidden)
    norm, factor = grn.norms_from_partials(partials, gamma, eps)
    wide_norm, wide_gamma = partials.double().sum(1).sqrt(), gamma.double()
    mean, relative, wide_factor = grn_factors(wide_norm, wide_gamma, eps)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(norm, wide_norm.float(), **close)
    torch.testing.assert_close(factor, wide_factor.float(), **close)
    torch.testing.assert_close(grn.factors_from_norms(norm, gamma, eps), factor, rtol=0, atol=0)

    pull, grad_gamma = grn.pull_from_products(products, norm, gamma, eps)
    wide_products = products.double().sum(1)
    torch.testing.assert_close(pull, grn_pull(wide_products, wide_norm, mean, wide_gamma).float(), **close)
    torch.testing.assert_close(grad_gamma, (relative * wide_products).sum(0).float(), **close)
    assert pull[:, 3].count_nonzero() == 0
