"""The stem's Triton kernels in the interpreter against the written-out reference in float64."""

import pytest
import torch

from mpmae.kernels.stem import launch, reference
from tests.kernels.stem_cases import EPS, draw, poisoned, poisoned_grad, to

CASES = {
    "p8": {"channels": 5, "bands": 3, "num_visible": 3},
    "p16": {"channels": 6, "bands": 2, "stride": 2, "grid_side": 2, "num_visible": 1},
    "p32": {"channels": 3, "bands": 1, "stride": 4, "grid_side": 2, "num_visible": 1, "num_samples": 1},
    "all_valid": {"channels": 5, "bands": 3, "num_visible": 2, "gaps": False},
    "one": {"channels": 4, "bands": 2, "num_visible": 1, "num_samples": 3},
    "every": {"channels": 4, "bands": 1, "grid_side": 2, "num_visible": 4, "num_samples": 1},
    "atto": {"channels": 40, "bands": 12, "num_visible": 2, "num_samples": 1},
}


@pytest.fixture
def own_blocks():
    """Blocks as on a GPU."""


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch, request):
    """The interpreter's time goes by the number of blocks."""
    if "own_blocks" not in request.fixturenames:
        monkeypatch.setattr(launch, "cut_of", lambda weights, dtype: launch.Cut(128, 2, 4))


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    empty = torch.empty

    def filled(*args, **options):
        out = empty(*args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


def run(image, weights, grad, dtype):
    out = launch.forward(image, weights, EPS, dtype)
    flat = launch.backward(poisoned_grad(grad.to(dtype), out), image, weights, EPS)
    assert flat.dtype == torch.float32
    return out, reference.unflatten(flat, reference.StemWeights(*(weight.float() for weight in weights)))


def oracle(image, weights, grad):
    out = reference.forward(image, weights, EPS, torch.float64)
    return out, reference.backward(grad, image, weights, EPS)


def error(got, wanted):
    assert got.isfinite().all()
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("case", CASES)
def test_float32_is_tight_and_nothing_leaks(case):
    """NaN in every pixel that does not exist and in the gradient of every such site."""
    image, weights, grad = draw(**CASES[case])
    wanted, wanted_grads = oracle(image, weights, grad)
    out, grads = run(
        poisoned(to(image, weights, torch.float32)[0]), to(image, weights, torch.float32)[1], grad, torch.float32
    )
    assert torch.equal(out == 0, wanted == 0)
    assert error(out, wanted) < 2e-6
    for name, got, want in zip(grads._fields, grads, wanted_grads, strict=True):
        assert error(got, want) < 1e-5, name


@pytest.mark.parametrize(("case", "dtype"), [("p16", torch.bfloat16), ("atto", torch.bfloat16), ("p8", torch.float16)])
def test_half_precision_is_as_good_as_pytorchs(case, dtype):
    """Parameters stay float32 here; 2x the reference's error in that dtype for the output, 3x for gradients."""
    image, weights, grad = draw(**CASES[case])
    image, weights = to(*to(image, weights, dtype), torch.float64)
    grad = grad.to(dtype).double()
    wanted, wanted_grads = oracle(image, weights, grad)
    narrow, wide = to(image, weights, dtype)[0], to(image, weights, torch.float32)[1]
    usual = reference.forward(narrow, wide, EPS, dtype)
    usual_grads = reference.backward(grad.to(dtype), narrow, wide, EPS)
    out, grads = run(narrow, wide, grad, dtype)
    assert out.dtype == dtype
    assert error(out, wanted) <= 2 * error(usual, wanted)
    for name, got, want, plain in zip(grads._fields, grads, wanted_grads, usual_grads, strict=True):
        assert error(got, want) <= max(3 * error(plain, want), 1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("own_blocks")
def test_in_the_blocks_of_a_gpu(dtype):
    image, weights, grad = draw(channels=5, bands=2, num_visible=1, num_samples=1)
    wanted, wanted_grads = oracle(image, weights, grad)
    out, grads = run(*to(image, weights, dtype), grad, dtype)
    assert error(out, wanted) < (0.02 if dtype == torch.bfloat16 else 2e-6)
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert all(error(got, want) < bound for got, want in zip(grads, wanted_grads, strict=True))


def test_two_runs_give_the_same_bits():
    image, weights, grad = draw(**CASES["p8"])
    image, weights = to(image, weights, torch.float32)
    first, second = (run(image, weights, grad, torch.float32) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))


def test_any_strides_of_the_image():
    image, weights, grad = draw(channels=5, bands=3, num_visible=1)
    image, weights = to(image, weights, torch.float32)
    other = image._replace(values=image.values.contiguous(memory_format=torch.channels_last))
    first, second = run(image, weights, grad, torch.float32), run(other, weights, grad, torch.float32)
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))
