"""The Triton kernels of the heads against the losses of full predictions, in Triton's interpreter."""

import pytest
import torch

from mpmae.kernels.heads import head_loss, ops
from tests.kernels.head_cases import KINDS, composite, draw

SCALE = 3.5


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    """The kernels run, several chunks with an odd one at the end, and all buffers come filled with NaN."""
    monkeypatch.setenv("MPMAE_KERNELS", "triton")
    monkeypatch.setattr(ops, "_chunk_samples", lambda *_: 2)

    def poisoned(make):
        def filled(*args, **options):
            buffer = make(*args, **options)
            return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def results(function, head):
    """The share and its gradients, in float64."""
    share = function(head)
    return [t.detach().double() for t in (share, *torch.autograd.grad(SCALE * share, head.tensors[:3]))]


def by_kernels(head):
    return head_loss(*head.tensors, **head.options)


@pytest.mark.parametrize(("kind", "gaps"), [("aster", False), *((kind, True) for kind in KINDS)])
def test_equals_the_loss_of_full_predictions(kind, gaps):
    expected = results(composite, draw(kind, gaps=gaps))
    for got, wanted in zip(results(by_kernels, draw(kind, torch.float32, gaps=gaps)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "patch_size"), [("aster", 32), ("sentinel2", 16), ("sentinel2", 12), ("dynamic_world", 16)]
)
def test_patches_of_other_sizes(kind, patch_size):
    expected = results(composite, draw(kind, patch_size=patch_size, samples=3))
    head = draw(kind, torch.float32, patch_size=patch_size, samples=3)
    for got, wanted in zip(results(by_kernels, head), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sentinel2", "esa_worldcover"])
def test_error_in_half_precision_is_that_of_pytorch(kind, dtype):
    exact = results(composite, draw(kind, dim=16))
    plain = results(composite, draw(kind, dtype, dim=16))
    got = results(by_kernels, draw(kind, dtype, dim=16))
    for number, (value, by_pytorch, wanted) in enumerate(zip(got, plain, exact, strict=True)):
        least = 1e-3 * wanted.norm() if number == 0 else 0  # one number's own error may be near 0 by chance
        assert (value - wanted).norm() <= (3 if number else 2) * (by_pytorch - wanted).norm() + least


def test_large_targets_far_from_zero_are_normalised_exactly():
    head, exact = draw("sentinel2", torch.float32), draw("sentinel2")
    shifted = [h._replace(tensors=(*h.tensors[:3], h.tensors[3] + 5000, *h.tensors[4:])) for h in (head, exact)]
    for got, wanted in zip(results(by_kernels, shifted[0]), results(composite, shifted[1]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_narrow_class_ids(dtype):
    head = draw("dynamic_world", torch.float32, gaps=False)
    narrow = head._replace(tensors=(*head.tensors[:3], head.tensors[3].to(dtype), *head.tensors[4:]))
    for got, wanted in zip(results(by_kernels, narrow), results(by_kernels, head), strict=True):
        assert torch.equal(got, wanted)


def test_a_class_that_does_not_exist_makes_the_loss_nan():
    head = draw("dynamic_world", torch.float32, gaps=False)
    head.tensors[3][:] = 9
    share, *grads = results(by_kernels, head)
    assert share.isnan()
    assert all(grad.isnan().any() for grad in grads)


def test_two_runs_give_the_same_bits():
    for kind in ("sentinel2", "dynamic_world"):
        first, second = (results(by_kernels, draw(kind, torch.float32)) for _ in range(2))
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("case", ["nothing valid", "nothing counted"])
@pytest.mark.parametrize("kind", ["sentinel2", "dynamic_world"])
def test_nothing_to_predict(kind, case):
    head = draw(kind, torch.float32)
    position = 4 if case == "nothing valid" else 6
    tensors = list(head.tensors)
    tensors[position] = torch.zeros_like(tensors[position])
    assert all(t.count_nonzero() == 0 for t in results(by_kernels, head._replace(tensors=tuple(tensors))))


def test_without_gradients():
    head = draw("sentinel2 of 13", torch.float32)
    with torch.no_grad():
        share = by_kernels(head)
    assert torch.equal(share.double(), results(by_kernels, head)[0])
