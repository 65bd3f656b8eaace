"""The downsampling between stages: reference, registration, autocast, bad input."""

import subprocess
import sys

import pytest
import torch

from mpmae.kernels.downsample import downsample
from mpmae.models.blocks import Downsample
from tests.kernels.downsample_cases import SIZES, draw, plain

GAPS = [False, True]


def apply(x, weights, valid):
    return downsample(x, tuple(weights[:2]), tuple(weights[2:]), *valid, eps=1e-6)


@pytest.mark.parametrize("gaps", GAPS)
def test_equals_the_layers_of_pytorch(gaps):
    x, weights, grad, valid = draw(SIZES, torch.float64, gaps)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    out, expected = apply(x, weights, valid), plain(x, weights, valid)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(out, leaves, grad)
    for got, wanted in zip(grads, torch.autograd.grad(expected, leaves, grad.nan_to_num()), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
        assert got.stride() == wanted.contiguous().stride()


@pytest.mark.parametrize("gaps", GAPS)
def test_gradcheck_and_registration(gaps):
    x, weights, _, valid = draw((2, 4, 2, 3), torch.float64, gaps)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    assert torch.autograd.gradcheck(lambda x, *weights: apply(x, weights, valid), leaves)
    torch.library.opcheck(torch.ops.mpmae.downsample.default, (x, *weights, *valid, 1e-6))
    _, mean, rstd = torch.ops.mpmae.downsample(x, *weights, *valid, 1e-6)
    arguments = (torch.randn(2, 1, 3, dtype=torch.float64), x, mean, rstd, *weights, *valid)
    torch.library.opcheck(
        torch.ops.mpmae.downsample_backward.default, tuple(t if t is None else t.detach() for t in arguments)
    )


def test_the_bit_pattern_of_what_does_not_exist_changes_nothing():
    x, weights, grad, valid = draw(SIZES, torch.float32, True)
    other = torch.where(valid[0][:, :, None], x, 1e3)
    outs = [apply(t.requires_grad_(), weights, valid) for t in (x, other)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out, t, grad)[0] for out, t in zip(outs, (x, other), strict=True)]
    assert torch.equal(*grads)
    assert grads[0][~valid[0]].count_nonzero() == 0


@pytest.mark.parametrize("gaps", GAPS)
def test_the_output_is_no_view(gaps):
    """A view that is changed in place loses its hooks, and with them FSDP the gather before the backward."""
    x, weights, _, valid = draw(SIZES, torch.float32, gaps)
    assert apply(x.requires_grad_(), weights, valid)._base is None


def test_autocast_sets_the_dtype():
    x, weights, grad, valid = draw(SIZES, torch.float32, False)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = apply(x, weights, valid)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), apply(x, weights, valid), rtol=0.05, atol=0.1)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out, leaves, grad.bfloat16()))


def test_compiles_without_a_graph_break():
    module = Downsample(4, 8)
    x = torch.randn(2, 8, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, None, None), module(x, None, None))


def test_only_x_and_its_statistics_are_kept():
    x, weights, _, valid = draw(SIZES, torch.float32, False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        apply(x.requires_grad_(), weights, valid)
    sizes = sorted(t.numel() for t in kept if not any(t.data_ptr() == w.data_ptr() for w in weights))
    assert sizes == sorted((3 * 28, 3 * 28, x.numel()))


def test_bad_input():
    x, weights, _, _ = draw(SIZES, torch.float32, False)
    with pytest.raises(ValueError, match="multiple of 4"):
        apply(x[:, :27], weights, (None, None))
    wrong = [weights[0][:-1], weights[1], weights[2][:, :, :1], weights[3]]
    with pytest.raises(ValueError, match=r"norm_weight: .*; weight: .*valid_in: .*valid_out: torch.uint8"):
        apply(x, wrong, (torch.ones(3, 7, dtype=torch.bool), torch.ones(3, 7, dtype=torch.uint8)))


def test_the_kernels_are_there_without_triton():
    code = "import sys; sys.modules['triton'] = None; import mpmae.kernels.pointwise.choice, mpmae.kernels.downsample"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
