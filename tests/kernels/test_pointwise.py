"""Pointwise half of a block and its global response normalisation."""

import pytest
import torch
import torch.nn.functional as F

from mpmae import kernels

SCOPES = ["sample", "batch"]


def plain_grn(h, gamma, beta, scope, eps):
    norm = h.norm(dim=1, keepdim=True) if scope == "sample" else h.flatten(0, 1).norm(dim=0)[None, None]
    relative = norm / (norm.mean(-1, keepdim=True) + eps)
    return gamma * (h * relative) + beta + h


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5, 6), (1, 6), (1, 6))]


@pytest.mark.parametrize("scope", SCOPES)
def test_grn_equals_the_formula(tensors, scope):
    got = kernels.global_response_norm(*tensors, scope=scope, eps=1e-4)
    expected = plain_grn(*tensors, scope, 1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(got)
    grads = torch.autograd.grad((got * probe).sum(), tensors)
    for grad, wanted in zip(grads, torch.autograd.grad((expected * probe).sum(), tensors), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_grn_gradcheck_and_registration(tensors, scope):
    assert torch.autograd.gradcheck(lambda *t: kernels.global_response_norm(*t, scope=scope, eps=1e-4), tensors)
    h, gamma, beta = tensors
    torch.library.opcheck(torch.ops.mpmae.global_response_norm.default, (h, gamma.flatten(), beta.flatten(), scope, 1e-4))


@pytest.mark.parametrize("scope", SCOPES)
def test_grn_of_zeros_has_a_finite_gradient(scope):
    h = torch.zeros(2, 4, 3, requires_grad=True)
    kernels.global_response_norm(h, torch.ones(1, 3), torch.ones(1, 3), scope=scope, eps=1e-6).sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


@pytest.mark.parametrize("scope", SCOPES)
def test_grn_in_bfloat16_accumulates_wider(scope):
    torch.manual_seed(0)
    h = torch.rand(2, 4096, 8) + 0.5
    gamma, beta = torch.randn(1, 8), torch.randn(1, 8)
    got = kernels.global_response_norm(h.bfloat16(), gamma.bfloat16(), beta.bfloat16(), scope=scope, eps=1e-6)
    torch.testing.assert_close(got.float(), plain_grn(h, gamma, beta, scope, 1e-6), rtol=0.02, atol=0.03)


@pytest.mark.parametrize("scope", SCOPES)
def test_sites_that_do_not_exist_change_nothing(scope):
    torch.manual_seed(0)
    channels, double = 4, {"dtype": torch.float64}
    parameters = [
        (torch.randn(channels, **double), torch.randn(channels, **double)),
        (torch.randn(16, channels, **double), torch.randn(16, **double)),
        (torch.randn(1, 16, **double), torch.randn(1, 16, **double)),
        (torch.randn(channels, 16, **double), torch.randn(channels, **double)),
    ]
    valid = torch.tensor([[True, True, False, True], [True, False, False, True]])
    residual, y = torch.randn(2, 4, channels, **double) * valid[:, :, None], torch.randn(2, 4, channels, **double)
    options = {"scope": scope, "norm_eps": 1e-6, "grn_eps": 1e-6}
    out = kernels.pointwise_block(residual, y, *parameters, valid, **options)
    assert out[~valid].count_nonzero() == 0
    other = torch.where(valid[:, :, None], y, 1e3)
    torch.testing.assert_close(kernels.pointwise_block(residual, other, *parameters, valid, **options), out, rtol=0, atol=0)
    h = F.gelu(F.linear(F.layer_norm(y, (channels,), *parameters[0], 1e-6), *parameters[1])) * valid[:, :, None]
    plain = residual + F.linear(plain_grn(h, *parameters[2], scope, 1e-6), *parameters[3])
    torch.testing.assert_close(out[valid], plain[valid], rtol=1e-12, atol=1e-12)
