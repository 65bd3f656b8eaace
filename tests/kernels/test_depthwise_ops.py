"""The depthwise op around its implementations: choice, registration, compilation, bad input; fast ones have a stand-in."""

import sys
from types import ModuleType

import pytest
import torch

from mpmae import kernels
from mpmae.kernels import backends
from mpmae.kernels.depthwise import implementation, ops, reference

G = 3


def inputs(num_visible=4, side=2, channels=5, dtype=torch.float32):
    torch.manual_seed(0)
    visible = torch.stack([torch.randperm(G * G)[:num_visible].sort().values for _ in range(2)])
    x = torch.randn(2, num_visible * side**2, channels, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(channels, 1, 7, 7, requires_grad=True), torch.randn(channels, requires_grad=True)
    return x, weight, bias, visible, kernels.tile_slots(visible, G), side


@pytest.fixture
def stand_in(monkeypatch):
    """A module in the place of the CUDA implementation, which notes what it is called with; the op chooses it on a CPU."""
    module, calls = ModuleType("stand_in"), []

    def noting(name, tensors):
        def call(*args):
            assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in args[:tensors])
            assert args[-2].shape == (2, G + 6, G + 6)
            assert args[-3] is not None
            calls.append(name)
            return getattr(reference, name)(*args)

        return call

    module.forward, module.backward_input = noting("forward", 3), noting("backward_input", 2)
    module.backward_weight = noting("backward_weight", 2)
    monkeypatch.setitem(sys.modules, "mpmae.kernels.depthwise.cuda", module)
    monkeypatch.setattr(backends, "_unavailable_on", lambda *args: None)
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    return calls


def test_the_op_runs_what_was_chosen(stand_in, monkeypatch):
    x, weight, bias, *positions = inputs()
    out = kernels.depthwise_conv(x, weight, bias, *positions)
    grads = torch.autograd.grad(out.square().sum(), (x, weight, bias))
    assert stand_in == ["forward", "backward_weight", "backward_input"]
    monkeypatch.setenv(backends.VARIABLE, "reference")
    expected = kernels.depthwise_conv(x, weight, bias, *positions)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)
    assert len(stand_in) == 3


def test_a_fast_backend_gets_aligned_and_contiguous_tensors(stand_in):
    """From a view that starts anywhere, and gradients of other strides."""
    x, weight, bias, visible, slots, side = inputs(G * G)
    expected = reference.forward(x, weight, bias, visible, slots, side)
    shifted = torch.cat([torch.zeros(1), x.detach().flatten()])[1:].view_as(x)
    got = kernels.depthwise_conv(shifted.requires_grad_(), weight, bias, visible, slots, side)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    got.sum().backward()
    assert stand_in == ["forward", "backward_weight", "backward_input"]


def test_the_fast_backends_take_7x7_and_32_bit_offsets(stand_in):
    x, _, _, visible, slots, side = inputs(channels=2)
    weight, bias = torch.randn(2, 1, 5, 5), torch.randn(2)
    with pytest.raises(backends.BackendError, match="a kernel of 5 x 5, expected 7 x 7"):
        kernels.depthwise_conv(x, weight, bias, visible, slots, side)
    weight, slots = torch.empty(512, 1, 7, 7, device="meta"), torch.empty(0, 187, 187)
    assert ops.chosen(torch.empty(2**12, 2**10, 512, device="meta"), weight, slots) is implementation("cuda")
    with pytest.raises(backends.BackendError, match="elements of a sample: 4194304 x 512 = 2147483648, expected fewer"):
        ops.chosen(torch.empty(1, 2**22, 512, device="meta"), weight, slots)
    with pytest.raises(backends.BackendError, match="patches of the batch: 131072 x 181 x 181"):
        ops.chosen(torch.empty(2**17, 1, 512, device="meta"), weight, slots)
    with pytest.raises(backends.BackendError, match="182 patches on a side, expected at most 181"):
        ops.chosen(x, weight, torch.empty(0, 188, 188))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_functions_are_the_gradients(dtype):
    x, weight, bias, *positions = inputs(dtype=dtype)
    out = kernels.depthwise_conv(x, weight, bias, *positions)
    probe, residual = torch.randn_like(out), torch.randn_like(x)
    grads = torch.autograd.grad(out, (x, weight, bias), probe)
    module = implementation("reference")
    with torch.no_grad():
        assert torch.equal(module.forward(x, weight, bias, *positions), out)
        assert torch.equal(module.backward_input(probe, weight, *positions), grads[0])
        assert torch.equal(module.backward_input(probe, weight, *positions, residual), grads[0] + residual)
        grad_weight, grad_bias = module.backward_weight(probe, x, *positions)
    assert grad_weight.dtype == grad_bias.dtype == torch.float32
    assert torch.equal(grad_weight, grads[1])
    assert torch.equal(grad_bias, grads[2])


@pytest.mark.parametrize("whole", [True, False])
def test_opcheck(whole):
    x, weight, bias, *positions = inputs(G * G if whole else 4)
    torch.library.opcheck(torch.ops.mpmae.depthwise_conv.default, (x, weight, bias, *positions))
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.mpmae.depthwise_conv_backward.default, (torch.randn_like(x), x.detach(), weight, *positions)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 16)}, r"x: shape \[2, 16\], expected \[samples, sites, channels\]"),
        ({"x": torch.randn(2, 5, 16).transpose(1, 2)}, r"x: strides \[80, 1, 16\], expected a contiguous tensor"),
        ({"x": torch.zeros(2, 16, 5, dtype=torch.int64)}, r"x: dtype torch.int64, expected a floating-point type"),
        ({"x": torch.randn(2, 12, 5)}, r"12 sites of each sample, expected 4 patches x 4 sites = 16"),
        ({"x": torch.randn(2, 16, 5).double()}, r"weight: dtype torch.float32, expected torch.float64; bias: dtype"),
        ({"weight": torch.randn(6, 1, 7, 7)}, r"weight: shape \[6, 1, 7, 7\], expected \[5, 1, 7, 7\]"),
        ({"weight": torch.randn(5, 1, 4, 4)}, r"weight: a kernel of side 4, expected an odd side"),
        ({"bias": torch.randn(4).half()}, r"bias: shape \[4\], expected \[5\]; bias: dtype torch.float16, expected"),
        ({"visible": torch.zeros(2, 4, dtype=torch.int32)}, r"visible: torch.int32 .*expected contiguous torch.int64"),
        ({"visible": torch.zeros(3, 4, dtype=torch.int64)}, r"visible: shape \[3, 4\], expected \[2, visible patches\]"),
        ({"visible": torch.zeros(2, 10, dtype=torch.int64)}, r"10 patches of each sample, but a grid of 3 x 3 has 9"),
        ({"slots": torch.zeros(2, 9, 8, dtype=torch.int16)}, r"slots: shape \[2, 9, 8\], expected \[2, G\+6, G\+6\]"),
        ({"slots": torch.zeros(2, 9, 9)}, r"slots: torch.float32 .*expected contiguous torch.int16"),
        ({"tile_side": 3}, r"tile_side: 3, expected one of 8, 4, 2, 1"),
        ({"tile_side": 16}, r"tile_side: 16, expected one of 8, 4, 2, 1"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "weight", "bias", "visible", "slots", "tile_side")
    arguments = dict(zip(names, inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=f"^depthwise_conv: .*{message}"):
        kernels.depthwise_conv(*arguments.values())


def test_everything_wrong_is_said_at_once():
    x, weight, bias, visible, slots, _ = inputs()
    problems = ops.input_problems(x, weight[:4], bias.to("meta"), visible.int(), slots, 3)
    assert [problem.split(":")[0] for problem in problems] == ["weight", "bias", "tile_side"]
    assert "bias: on meta, expected cpu" in problems[1]
    problems = ops.input_problems(x, weight, bias, visible.to("meta").int(), slots, 1)
    assert [problem.split(":")[0] for problem in problems] == ["visible", "visible", "x"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_backends_on_a_gpu(backend, side, monkeypatch):
    """A captured step, first launch and all, against the reference; then bit by bit the same when it is replayed."""
    cpu = inputs(6, side, 40)
    monkeypatch.setenv(backends.VARIABLE, "reference")
    expected = kernels.depthwise_conv(*cpu)
    wanted = torch.autograd.grad(expected.square().sum(), cpu[:3])

    monkeypatch.setenv(backends.VARIABLE, backend)
    x, weight, bias = (tensor.detach().cuda().requires_grad_() for tensor in cpu[:3])
    positions = cpu[3].cuda(), cpu[4].cuda(), side

    def step():
        out = kernels.depthwise_conv(x, weight, bias, *positions)
        return [out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))]

    side_stream = torch.cuda.Stream()
    with torch.cuda.stream(side_stream):
        eager = [tensor.detach().cpu() for tensor in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, again, right in zip(eager, captured, (expected, *wanted), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
        assert torch.equal(again.detach().cpu(), got)


@pytest.mark.gpu
def test_the_choice_on_a_gpu(caplog):
    x, weight, bias, visible, slots, side = (t.cuda() if torch.is_tensor(t) else t for t in inputs())
    assert ops.chosen(x, weight, slots) is implementation("cuda")
    assert ops.chosen(x.double(), weight, slots) is reference
    with pytest.raises(
        ValueError, match=r"slots: on cpu, expected cuda:0.*; visible: on cpu|slots: on cpu, expected cuda:0"
    ):
        kernels.depthwise_conv(x, weight, bias, visible, slots.cpu(), side)


def test_asked_for_without_a_gpu(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    with pytest.raises(backends.BackendError, match=r"depthwise_conv: backend cuda was asked for .*on the cpu device"):
        kernels.depthwise_conv(*inputs())
