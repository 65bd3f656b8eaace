"""The stem: the written-out reference against PyTorch's modules, the op, the kernels compiled for GPUs that are not here."""

import importlib.util

import pytest
import torch

from mpmae.kernels import backends
from mpmae.kernels.stem import StemWeights, launch, ops, reference, stem
from tests.kernels.stem_cases import EPS, composite, draw, existing, poisoned, poisoned_grad, to

CASES = {
    "p8": {},
    "p8_all_valid": {"gaps": False},
    "p8_12_bands": {"bands": 12, "channels": 8},
    "p16": {"stride": 2},
    "p16_one": {"stride": 2, "num_visible": 1},
    "p32_every": {"stride": 4, "grid_side": 2, "num_visible": 4, "num_samples": 1},
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed")


def leaves(weights):
    return StemWeights(*(weight.requires_grad_() for weight in weights))


def run(image, weights):
    return stem(*image, weights, eps=EPS)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_modules_and_nothing_leaks(case):
    """Values and gradients; NaN in what does not exist, on the way in and on the way back."""
    image, weights, grad = draw(**CASES[case])
    weights = leaves(weights)
    expected = composite(image, weights)
    wanted = torch.autograd.grad(expected, weights, grad)
    out = run(poisoned(image), weights)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    for got, want in zip(torch.autograd.grad(out, weights, poisoned_grad(grad, out)), wanted, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    seen = image._replace(values=image.values + 0.1 * existing(image)[:, None])
    assert not torch.equal(run(seen, weights), out)


def test_gradcheck_and_registration():
    image, weights, _ = draw(bands=1, channels=2, num_visible=2, grid_side=2, num_samples=1)
    assert torch.autograd.gradcheck(lambda *t: run(image, StemWeights(*t)), tuple(leaves(weights)), fast_mode=True)
    for pixel_valid in (image.pixel_valid, None):
        inputs = (*image._replace(pixel_valid=pixel_valid), *weights, EPS, torch.float64)
        torch.library.opcheck(torch.ops.mpmae.stem.default, inputs)


def test_slots_may_be_left_to_the_op():
    image, weights, _ = draw()
    assert torch.equal(run(image._replace(slots=image.slots[:0]), weights), run(image, weights))


def test_autocast_sets_the_dtype():
    image, weights = to(*draw()[:2], torch.float32)
    weights = leaves(weights)
    exact = run(image, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(image, weights)
    assert out.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.1)
    out.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in weights)


def test_bad_inputs_are_named_at_once():
    image, weights, _ = draw()
    broken = image._replace(visible=image.visible.int(), pixel_valid=image.pixel_valid[:, 1:], slots=image.slots.int())
    with pytest.raises(ValueError, match=r"slots: .*int32.*visible: .*int32.*pixel_valid: .*\[2, 23, 24\].*norm_bias: "):
        run(broken, weights._replace(norm_bias=weights.norm_bias[1:]))
    with pytest.raises(ValueError, match=r"image: 20 pixels on a side, expected 3 patches \(slots\) of 8"):
        run(image._replace(values=image.values[:, :, 4:, 4:], pixel_valid=None), weights)
    with pytest.raises(ValueError, match=r"image: torch.int64 \[2, 3, 24, 24\]"):
        run(image._replace(values=image.values.long()), weights)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"channels": 200}, "200 channels in torch.float32, expected at most 96"),
        ({"bands": 15}, "15 bands, expected at most 14"),
        ({}, "64"),
    ],
)
def test_what_the_kernels_refuse(monkeypatch, change, cause):
    """Asked for, it is an error that names the cause; float64 among them."""
    monkeypatch.setenv(backends.VARIABLE, "triton")
    image, weights, _ = draw(**change, dtype=torch.float32 if change else torch.float64)
    assert cause in launch.refusal(image, weights, weights.conv_weight.dtype)
    with pytest.raises(backends.BackendError, match=f"stem: backend triton .*{cause}"):
        run(image, weights)


def compiled(kernel, architecture, dtype, channels, bands=12, stride=2, valid=True):
    """Registers and local bytes of a kernel in the cut that is launched."""
    from mpmae.kernels.stem import triton as kernels
    from tests.kernels.offline import compile_for

    weights = StemWeights(torch.empty(channels, bands, 3, 3), *[None] * 7)
    is_weight, side = kernel == "_weight_kernel", 7 * 8 * stride
    cut = (launch.weight_cut_of if is_weight else launch.cut_of)(weights, dtype)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    constants = {
        "G": 7, "STRIDES": (bands * side**2, side**2, side, 1), "T": stride, "BLOCK": cut.block,
        "ROWS": launch.sum_rows(stride**2), "SIZE": 144 * 64, **launch.sizes(weights, cut.threads),
    }  # fmt: skip
    constants["COLUMNS"] = min(constants["CHANNELS"], launch.WEIGHT_COLUMNS)
    signature = dict.fromkeys(("num_sites", "num_visible", "num_pixels"), "i32") | {"eps": "fp32"}
    signature |= {"image": "*fp32", "pixel_valid": "*u8", "visible": "*i64", "slots": "*i16", "partial": "*fp32"}
    signature |= dict.fromkeys(("out", "grad", "grad_conv", "packed"), f"*{name}")
    signature |= dict.fromkeys(StemWeights._fields[2:], "*fp32")
    if not valid:
        constants["pixel_valid"] = signature.pop("pixel_valid") and None
    function = getattr(kernels, kernel)
    signature, constants = (
        {key: value for key, value in given.items() if key in function.arg_names} for given in (signature, constants)
    )
    return compile_for(function, architecture, signature, constants, num_warps=cut.num_warps, num_stages=1)


KERNELS = ("_forward_kernel", "_backward_kernel", "_weight_kernel")
FAST = [(kernel, 90, torch.bfloat16, 40) for kernel in KERNELS] + [("_forward_kernel", 80, torch.bfloat16, 40)]
SLOW = [
    (kernel, architecture, dtype, channels)
    for kernel in KERNELS
    for architecture in (80, 90)
    for dtype in (torch.bfloat16, torch.float32)
    for channels in (40, 48, 64, 80, 96, 128, 192)
    if (kernel, architecture, dtype, channels) not in FAST and (channels <= 96 or dtype != torch.float32)
]


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "architecture", "dtype", "channels"), FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_compiles_without_spilling(kernel, architecture, dtype, channels):
    usage = compiled(kernel, architecture, dtype, channels)
    print(kernel, architecture, dtype, channels, usage)
    assert usage.local_bytes == 0
    if (channels, architecture, dtype) == (40, 90, torch.bfloat16):
        assert usage.registers <= {"_forward_kernel": 128, "_backward_kernel": 200, "_weight_kernel": 168}[kernel]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("bands", "stride", "valid"), [(3, 1, True), (12, 1, False), (10, 4, True), (13, 2, True)])
def test_other_images_compile_without_spilling(kernel, bands, stride, valid):
    assert compiled(kernel, 90, torch.bfloat16, 40, bands, stride, valid).local_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [40, 80, 96, 128, 192])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype, stride, channels):
    """Parity with float64, nothing leaks, and two runs give the same bits."""
    image, weights, grad = draw(
        bands=12, channels=channels, stride=stride, grid_side=7, num_visible=19, num_samples=8, dtype=torch.float32
    )
    if launch.refusal(image, weights, dtype):
        pytest.skip(launch.refusal(image, weights, dtype))
    weights = to(image, weights, torch.float64)[1]
    wanted = reference.forward(image, weights, EPS, torch.float64)
    wanted_grads = reference.backward(grad.double(), image, weights, EPS)
    image, weights = to(image, weights, torch.float32)
    image = image._replace(values=image.values.cuda(), pixel_valid=image.pixel_valid.cuda())
    image = image._replace(visible=image.visible.cuda(), slots=image.slots.cuda())
    weights, grad = StemWeights(*(weight.cuda() for weight in weights)), grad.cuda().to(dtype)
    usual = reference.forward(image, weights, EPS, dtype)
    usual_grads = reference.backward(grad, image, weights, EPS)
    results = []
    for _ in range(2):
        out = launch.forward(poisoned_on_device(image), weights, EPS, dtype)
        results.append((out, launch.backward(poisoned_grad(grad, out), poisoned_on_device(image), weights, EPS)))
    assert all(map(torch.equal, *results))
    out, grads = results[0][0], reference.unflatten(results[0][1], weights)

    def error(got, want):
        return ((got.double().cpu() - want).norm() / want.norm()).item()

    exact = dtype == torch.float32
    assert error(out, wanted) <= max(2 * error(usual, wanted), 2e-6 if exact else 0)
    for name, got, want, plain in zip(grads._fields, grads, wanted_grads, usual_grads, strict=True):
        assert error(got, want) <= max(3 * error(plain, want), 1e-5 if exact else 1e-6), name


def poisoned_on_device(image):
    host = image._replace(**{name: None if t is None else t.cpu() for name, t in image._asdict().items()})
    return image._replace(values=poisoned(host).values.to(image.values.device))


@pytest.mark.gpu
def test_the_op_on_a_gpu_can_be_captured():
    """As a CUDA graph: no wait for the device, nothing allocated that a replay does not know."""
    image, weights, grad = draw(bands=12, channels=40, grid_side=7, num_visible=19, dtype=torch.float32)
    image = image._replace(**{name: t.cuda() for name, t in image._asdict().items()})
    weights, grad = leaves(StemWeights(*(weight.cuda() for weight in weights))), grad.cuda()
    assert ops._chosen(image, weights, torch.float32) == "triton"

    def step():
        return torch.autograd.grad(run(image, weights), weights, grad)

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
