"""The fused pointwise kernels in the interpreter, against the formulas in float64."""

import pytest
import torch

from mpmae.kernels.pointwise import formulas, fused, tuning
from tests.kernels.pointwise_cases import check, draw, poison, run

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# rows that are no multiple of a block, fewer than one, and just one more than one; blocks with and without room for ones
CASES = [
    (5, 3, 19, FLOAT, "sample", True),
    (5, 3, 19, HALF, "batch", True),
    (16, 2, 65, FLOAT, "batch", False),
    (16, 2, 33, BRAIN, "sample", False),
    (40, 2, 19, FLOAT, "sample", False),
    (40, 2, 65, BRAIN, "sample", True),
    (40, 2, 76, HALF, "batch", False),
    (64, 2, 20, BRAIN, "batch", True),
    pytest.param(64, 2, 65, HALF, "sample", True, marks=pytest.mark.slow),
    pytest.param(80, 2, 70, BRAIN, "sample", True, marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize(("channels", "samples", "sites", "dtype", "scope", "gaps"), CASES)
def test_equals_the_formulas(channels, samples, sites, dtype, scope, gaps):
    check(fused, draw(channels, samples, sites, dtype, scope=scope, gaps=gaps))


@pytest.mark.parametrize("gelu", ["tanh", "poly"])
def test_other_gelus(gelu):
    check(fused, draw(5, 2, 9, FLOAT, gelu=gelu))


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_several_chunks_and_parts_of_a_norm(scope, monkeypatch):
    monkeypatch.setattr(tuning, "num_chunks", lambda *_: 3)
    monkeypatch.setattr(tuning, "RESIDENT_PROGRAMS", 3)
    for dtype in (FLOAT, BRAIN):
        check(fused, draw(5, 5, 35, dtype, scope=scope, gaps=True))


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def test_two_runs_give_the_same_bits(dtype):
    case = draw(5, 3, 35, dtype, gaps=True)
    first, second = run(fused, case), run(fused, case)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_sites_that_do_not_exist_change_nothing():
    case = draw(5, 3, 19, FLOAT, gaps=True)
    other = torch.where(case.valid[:, :, None], case.grad, 1e30)
    noisy = torch.where(case.valid[:, :, None], case.y, 1e3)
    first, second = run(fused, case), run(fused, case._replace(grad=other, y=noisy))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_all_sites_valid_equals_no_mask():
    case = draw(5, 3, 19, FLOAT)
    masked = case._replace(valid=torch.ones(3, 19, dtype=torch.bool))
    first, second = run(fused, case), run(fused, masked)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_not_taken_is_said():
    def reasons(num_rows, channels, dtype, gelu="erf"):
        options = formulas.Options("sample", 1e-6, 1e-6, gelu)
        return fused.supports(torch.empty(1, num_rows, channels, dtype=dtype, device="meta"), options)

    assert reasons(1024 * 1216, 40, BRAIN) is None
    assert reasons(2**31, 160, torch.float64, "relu").split("; ")[0] == "160 channels, expected at most 128"
    for part in ("torch.float64, expected", "2147483648 rows", "'relu'"):
        assert part in reasons(2**31, 160, torch.float64, "relu")


def test_blocks_fit_the_problem():
    assert tuning.blocks("hidden", 40, 2, 1216, 9).hidden == 32
    assert tuning.blocks("hidden", 64, 2, 19, 9)[:2] == (32, 64)
    assert tuning.blocks("rows_and_weight1", 40, 2, 1216, 8) is None
    assert tuning.blocks("rows_and_weight1", 64, 2, 1216, 9) is None
