"""Heads fused with their loss against the losses of full predictions, and as a registered operator."""

import importlib.util

import pytest
import torch

from mpmae.kernels.heads import head_loss, ops
from tests.kernels.head_cases import COMPILED, KINDS, REGISTER_CAP, SAMPLES, composite, draw, resources

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed")


def gradients(loss, head):
    return torch.autograd.grad(3.5 * loss, head.tensors[:3])


@pytest.fixture(params=[1, 2, SAMPLES])
def chunk_samples(request, monkeypatch):
    monkeypatch.setattr(ops, "_chunk_samples", lambda *_: request.param)


@pytest.mark.usefixtures("chunk_samples")
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loss_of_full_predictions(kind, gaps):
    head = draw(kind, gaps=gaps)
    expected, got = composite(head), head_loss(*head.tensors, **head.options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for grad, wanted in zip(gradients(got, head), gradients(expected, head), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["aster", "dynamic_world"])
def test_gradcheck_and_registration(kind):
    head = draw(kind, samples=3, dim=1)
    x, weight, bias, *rest = head.tensors
    rows = torch.arange(0, len(weight), 197)  # finite differences of all of them take long

    def share(x, some_weight, some_bias):
        parts = weight.detach().index_copy(0, rows, some_weight), bias.detach().index_copy(0, rows, some_bias)
        return head_loss(x, *parts, *rest, **head.options)

    assert torch.autograd.gradcheck(share, [t.detach().requires_grad_() for t in (x, weight[rows], bias[rows])])
    values, valid, hidden, counted = rest
    options = head.options
    arguments = (x, weight, bias, values, valid, options["bands"], hidden, counted)
    arguments += (options["patch_size"], options["num_classes"], options["normalise"])
    operator = torch.ops.mpmae.head_loss.default
    torch.library.opcheck(operator, (*arguments, True))
    detached = (t.detach() if torch.is_tensor(t) else t for t in arguments)
    torch.library.opcheck(operator, (*detached, False), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", ["sentinel2", "dynamic_world"])
@pytest.mark.parametrize("case", ["nothing valid", "nothing counted", "nobody has it", "nothing hidden"])
def test_nothing_to_predict(kind, case):
    head = draw(kind, torch.float32)
    x, weight, bias, values, valid, hidden, counted = head.tensors
    options = dict(head.options)
    if case == "nothing valid":
        valid = torch.zeros_like(valid)
    elif case == "nothing counted":
        counted = torch.zeros_like(counted)
    elif case == "nobody has it":
        options["num_present"] = 0
    else:
        x, hidden = x[:, :0].detach().requires_grad_(), hidden[:, :0]
    loss = head_loss(x, weight, bias, values, valid, hidden, counted, **options)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (x, weight, bias)):
        assert grad.count_nonzero() == 0


def test_without_gradients_none_is_computed(monkeypatch):
    head = draw("sentinel2", torch.float32)
    monkeypatch.setattr(ops, "_add_product", None)
    with torch.no_grad():
        quiet = head_loss(*head.tensors, **head.options)
    detached = [t.detach() for t in head.tensors]
    assert torch.equal(head_loss(*detached, **head.options), quiet)
    torch.testing.assert_close(quiet, composite(head).detach())
    with pytest.raises(TypeError, match="NoneType"):
        head_loss(*head.tensors, **head.options)


@pytest.mark.parametrize("kind", ["sentinel2", "esa_worldcover"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_loss_wide(kind, dtype):
    head, exact_head = draw(kind, torch.float32, dim=32), draw(kind, dim=32)
    with torch.autocast("cpu", dtype=dtype):
        loss, expected = head_loss(*head.tensors, **head.options), composite(head)
    exact = composite(exact_head)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= 2 * abs(expected - exact) + 1e-3 * exact
    wanted, plain = gradients(exact, exact_head), gradients(expected, head)
    for grad, exact_grad, plain_grad in zip(gradients(loss, head), wanted, plain, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - exact_grad).norm() <= 3 * (plain_grad - exact_grad).norm()


def test_float16_gradients_do_not_vanish():
    """The stored gradients do not have the size that upstream scaling gives them: a large divisor costs no digits."""
    head = draw("aster", torch.float16, gaps=False)
    loss = head_loss(*head.tensors, **head.options | {"num_present": 1 << 20})
    half = torch.autograd.grad(loss * 2.0**20, head.tensors[:3])
    wide = draw("aster", gaps=False)
    exact = torch.autograd.grad(head_loss(*wide.tensors, **wide.options | {"num_present": 1}), wide.tensors[:3])
    for grad, wanted in zip(half, exact, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=0.02, atol=0.01 * wanted.abs().max().item())


def test_first_order_only():
    head = draw("aster")
    with pytest.raises(RuntimeError, match="out="):
        torch.autograd.grad(head_loss(*head.tensors, **head.options).square(), head.tensors[0], create_graph=True)


def test_gradients_take_dtype_and_strides_of_the_parameters():
    head = draw("aster", torch.bfloat16)
    x, weight, bias, *rest = head.tensors
    weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    head_loss(x, weight, bias, *rest, **head.options).backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert weight.grad.stride() == weight.stride()


def test_compiles_without_graph_breaks():
    head = draw("sentinel2 of 13", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: head_loss(*t, **head.options), fullgraph=True, backend="aot_eager")
    got, expected = compiled(*head.tensors), head_loss(*head.tensors, **head.options)
    torch.testing.assert_close(got, expected)
    for grad, wanted in zip(gradients(got, head), gradients(expected, head), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_what_does_not_fit_is_told_at_once():
    head = draw("aster", torch.float32)
    x, weight, bias, values, valid, hidden, counted = head.tensors
    with pytest.raises(
        ValueError, match=r"weight: .*\[126, 6\].*expected.*\[128, 6\].*hidden: torch.int32.*counted: torch.float32"
    ):
        head_loss(x, weight[2:], bias, values, valid, hidden.int(), counted.float(), **head.options)
    with pytest.raises(ValueError, match="num_classes 9 expects integer class ids"):
        head_loss(*head.tensors, **head.options | {"num_classes": 9})
    with pytest.raises(ValueError, match="multiple of patch_size 7"):
        head_loss(*head.tensors, **head.options | {"patch_size": 7})


def assert_no_spills(name, architecture):
    for kernel, usage in resources(name, architecture).items():
        assert usage.local_bytes == 0, (name, kernel, usage)
        assert usage.registers <= REGISTER_CAP, (name, kernel, usage)


@needs_triton
@pytest.mark.parametrize(("name", "architecture"), [("sentinel2 p16", 90), ("esa_worldcover p8", 80)])
def test_triton_compiles_offline_without_spills(name, architecture):
    assert_no_spills(name, architecture)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_case_compiles_offline_without_spills(name, architecture):
    assert_no_spills(name, architecture)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_on_the_gpu(kind, dtype, monkeypatch):
    """Their error is at most 2 times (gradients: 3) that of PyTorch in the same dtype; two runs give the same bits."""
    monkeypatch.setattr(ops, "_chunk_samples", lambda *_: 2)
    exact_head, plain_head = draw(kind, dim=64), draw(kind, dtype, dim=64, device="cuda")
    exact, plain = composite(exact_head), composite(plain_head)
    runs = []
    for _ in range(2):
        head = draw(kind, dtype, dim=64, device="cuda")
        share = head_loss(*head.tensors, **head.options)
        runs.append([share, *gradients(share, head)])
    assert all(map(torch.equal, *runs))
    wanted = [exact, *gradients(exact, exact_head)]
    for number, (got, by_pytorch, right) in enumerate(
        zip(runs[0], (plain, *gradients(plain, plain_head)), wanted, strict=True)
    ):
        got, by_pytorch = got.double().cpu(), by_pytorch.double().cpu()
        least = (1e-6 if dtype == torch.float32 else 1e-3) * right.norm()
        assert (got - right).norm() <= (3 if number else 2) * (by_pytorch - right).norm() + least


@pytest.mark.gpu
def test_capture_in_a_graph():
    head = draw("sentinel2", torch.bfloat16, dim=64, device="cuda")

    def step():
        share = head_loss(*head.tensors, **head.options)
        return [share, *gradients(share, head)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, captured, expected))
