"""Attention by plain products, as bf16 trains on a CPU, against the fused one."""

import pytest
import torch
import torch.nn.functional as F

from mpmae.models.multimae import vit

SHAPE = 3, 2, 10, 4, 16  # stacked, samples, tokens, heads, channels of a head


def made(num_tokens=SHAPE[2], seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*SHAPE[:2], num_tokens, *SHAPE[3:], generator=generator)


def outcome(inputs, real, dtype, grad):
    """Output and gradients in float32."""
    q, k, v = (t.to(dtype).requires_grad_() for t in inputs)
    out = vit.attend(q, k, v, real)
    out.backward(grad.to(dtype))
    return [t.float() for t in (out.detach(), q.grad, k.grad, v.grad)]


@pytest.fixture
def fused_calls(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *inputs: calls.append(1) or fused(*inputs))
    return calls


@pytest.mark.parametrize("has_filling", [False, True])
def test_products_err_no_more_than_the_fused_attention(fused_calls, monkeypatch, has_filling):
    inputs, grad = [made(7), made(seed=1), made(seed=2)], made(7, seed=3).flatten(-2)
    real = torch.rand(SHAPE[1:3], generator=torch.Generator().manual_seed(4)) < 0.6 if has_filling else None
    if has_filling:
        real[:, -1] = True
    exact = outcome(inputs, real, torch.float64, grad)
    by_products = outcome(inputs, real, torch.bfloat16, grad)
    assert len(fused_calls) == 1  # of the float64 alone
    monkeypatch.setattr(vit, "_products", F.scaled_dot_product_attention)
    fused = outcome(inputs, real, torch.bfloat16, grad)
    for want, got, other in zip(exact, by_products, fused, strict=True):
        assert (got - want).norm() <= 2 * (other - want).norm()


def test_features_in_bf16_come_from_the_fused_attention(fused_calls):
    q, k, v = (made(seed=seed).bfloat16() for seed in range(3))
    with torch.no_grad():
        vit.attend(q, k, v, None)
    assert len(fused_calls) == 1


def test_the_choice_leaves_one_graph():
    compiled = torch.compile(vit.attend, fullgraph=True, backend="eager")
    inputs, real = [made(seed=seed).bfloat16() for seed in range(3)], torch.ones(SHAPE[1:3], dtype=torch.bool)
    assert torch.equal(compiled(*inputs, real), vit.attend(*inputs, real))
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, real), vit.attend(*inputs, real))
