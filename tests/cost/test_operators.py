"""Bytes and operations against counts by hand."""

import pytest
import torch

from mpmae.cost import operators
from mpmae.cost.operators import Work, added
from mpmae.masking import draw_visible


def test_depthwise():
    # 10 sites of 3 channels in bf16: 60 bytes in, 60 out, 50 float32 parameters a channel
    assert operators.depthwise_forward(10, 3, 2) == (120 + 600, 0, 2 * 49 * 30)
    assert operators.depthwise_forward(10, 3, 2, taps=1.5).vector_flops == 90
    assert operators.depthwise_input_grad(10, 3, 2).num_bytes == 120 + 588
    assert operators.depthwise_input_grad(10, 3, 2, residual=True).num_bytes == 180 + 588
    assert operators.depthwise_weight_grad(10, 3, 4).num_bytes == 240 + 600


def test_pointwise():
    # a site of 1 channel, 4 hidden: 3 + 12 items forward, 4 + 12 backward, mean and rstd 8 bytes; 8 + 3 + 12 parameters
    assert operators.pointwise_forward(1, 1, 2) == (30 + 8 + 92, 16, 0)
    assert operators.pointwise_backward(1, 1, 2) == (32 + 8 + 184, 32, 0)
    forward = operators.pointwise_forward(1000, 64, 2)
    assert forward.matrix_flops == 2 * (1000 * 64 * 256) * 2


def test_stem_downsample_and_heads():
    # one patch of 8 x 8 pixels (stride 1), 2 bands in float32, 3 channels in bf16
    parameters = (18 + 1 + 6) * 3 * 4
    assert operators.stem_forward(1, 8, 2, 3, 2, 4) == (64 * 8 + 64 * 6 + parameters, 2 * 64 * 9 * 2 * 3, 2 * 64 * 3)
    assert operators.stem_backward(1, 8, 2, 3, 2, 4).matrix_flops == 2 * (2 * 64 * 9 * 2 * 3)
    # 4 sites of 3 channels become one of 5: a product of [1, 12] and [12, 5]
    assert operators.downsample_forward(4, 3, 5, 2) == ((12 + 5) * 2 + (60 + 5 + 6) * 4, 2 * 12 * 5, 0)
    assert operators.downsample_backward(4, 3, 5, 2) == ((24 + 5) * 2 + (120 + 5 + 12) * 4, 4 * 12 * 5, 0)
    # 2 patches of 3 features, 7 outputs, 100 bytes of targets: features in, their gradient out
    assert operators.heads_step(2, 3, 7, 2, 100) == (24 + 100 + 2 * 4 * 28, 6 * 2 * 3 * 7, 0)


def test_the_floor_is_the_larger_of_two_times():
    work = Work(1000, 600, 7)
    assert (work.floor_s(100, 10), work.bound(100, 10)) == (60, "matrix")
    assert (work.floor_s(10, 100), work.bound(10, 100)) == (100, "memory")
    assert added([work, Work(1, 2, 3)]) == (1001, 602, 10)


def test_active_taps_by_counting():
    visible = torch.tensor([[0, 4, 8], [1, 2, 7]])
    counts = []
    for patches in visible.tolist():
        sites = {(p // 3 * 2 + r, p % 3 * 2 + c) for p in patches for r in range(2) for c in range(2)}
        counts += [sum((r + i, c + j) in sites for i in range(-3, 4) for j in range(-3, 4)) for r, c in sites]
    assert operators.active_taps(visible, 3, 2) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize(("tile_side", "taps"), [(8, 36.2), (4, 26.2), (2, 16.7), (1, 11.1)])
def test_active_taps_at_the_usual_mask_ratio(tile_side, taps):
    visible = draw_visible(0, 0, range(200), 49, 19)
    assert operators.active_taps(visible, 7, tile_side) == pytest.approx(taps, abs=0.4)
    assert operators.expected_taps(19, 7, tile_side) == pytest.approx(taps, abs=0.1)


def test_expected_taps_at_the_ends():
    assert operators.expected_taps(1, 7, 2) == 4  # its own tile and no other
    assert operators.expected_taps(49, 7, 1) == pytest.approx((37 / 7) ** 2)  # the whole image: rows of 4, 5, 6, 7, 6, 5, 4
    every = draw_visible(0, 0, range(1), 49, 49)
    assert operators.expected_taps(49, 7, 4) == pytest.approx(operators.active_taps(every, 7, 4))


def test_ways_of_the_pointwise_half_move_what_their_readmes_say():
    sums = {way: sum(passes) for way, passes in operators.POINTWISE_PASSES.items()}
    assert sums == {"least": 31, "fused in one pass": 31, "fused": 40, "wide folded": 68, "wide": 88}
    moved = operators.pointwise_backward(10, 3, 2, "wide").num_bytes - operators.pointwise_backward(10, 3, 2).num_bytes
    assert moved == (53 - 16) * 10 * 3 * 2


def test_linear_and_the_stem_of_convnext():
    # 2 rows of 3 into 5: 6 + 10 items forward; 12 + 10 backward; weight and bias, and in the backward their gradients too
    assert operators.linear_forward(2, 3, 5, 2) == (32 + 20 * 4, 60, 0)
    assert operators.linear_backward(2, 3, 5, 2) == (44 + 35 * 4, 120, 0)
    # a patch of 16 x 16 pixels, 2 bands in float32, 64 sites of 3 channels in bf16; 4 taps
    parameters = (4 * 2 + 3) * 3 * 4
    assert operators.patch_stem_forward(1, 16, 2, 3, 2, 4) == (2048 + 384 + parameters, 2 * 64 * 8 * 3, 0)
    assert operators.patch_stem_backward(1, 16, 2, 3, 2, 4) == (2048 + 768 + parameters, 2 * 64 * 8 * 3, 0)
