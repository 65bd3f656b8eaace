"""The stacked decoders against the decoders one by one."""

import copy

import pytest
import torch

from mpmae.models.multimae.per_domain import PerDomainDecoders
from mpmae.models.multimae.sampler import TokenSample
from tests.models.multimae.small import PATCHES, build


def run(decoders, tokens, sample):
    """Predictions, and gradients of the tokens, for a loss that weighs every value differently."""
    tokens = tokens.clone().requires_grad_()
    out = decoders(tokens, sample, 3)
    sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in out.values()).backward()
    return out, tokens.grad


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("inputs", [("rgb", "depth", "semseg"), ("depth", "ebands", "sentinel1")])
def test_stacked_is_one_by_one(inputs, padded):
    """Outputs, gradients of the tokens and of every weight, with and without filled-up samples, in any order of tokens."""
    stacked = build(domains_in=inputs, domains_out=("rgb", "depth", "semseg", "sired")).decoders
    single = PerDomainDecoders(copy.deepcopy(stacked))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 8, 192, generator=generator, dtype=torch.float64)
    index = torch.rand(4, 3 * PATCHES, generator=generator).argsort(1)[:, :7]
    real = torch.rand(4, 7, generator=generator) < 0.6 if padded else None
    (got, got_grad), (want, want_grad) = (run(d, tokens, TokenSample(index, real)) for d in (stacked, single))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-11, atol=1e-11)
    for number, (name, decoder) in enumerate(single.items()):
        for key, parameter in decoder.named_parameters():
            own = stacked.heads[name] if key.startswith("head.") else stacked
            grad = own.get_parameter(key.removeprefix("head.")).grad
            grad = grad if own is not stacked else grad[number]
            if parameter.grad is None:  # no input domain of its own: nothing but the context has an embedding
                assert not grad.any()
            else:
                torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-10, msg=f"{name} {key}")


def test_no_two_decoders_share_a_weight():
    """A change of one decoder's slice changes its own prediction alone."""
    decoders = build(domains_in=("rgb", "depth")).decoders
    tokens = torch.randn(2, 4, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample = TokenSample(torch.tensor([[0, 3, 11], [4, 9, 17]]), None)
    before = decoders(tokens, sample, 3)
    for name, parameter in decoders.named_parameters():
        if name.startswith("heads."):
            continue
        with torch.no_grad():
            parameter[1] += 0.1 * torch.randn_like(parameter[1])
    after = decoders(tokens, sample, 3)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [list(before)[1]]
