"""Bytes and operations against counts by hand."""

import pytest
import torch


def test_depthwise():
    import roofline

    # 10 sites of 3 channels in bf16: 60 bytes in, 60 out, 50 float32 parameters a channel
    assert roofline.depthwise_forward(10, 3, 2) == (120 + 600, 0, 2 * 49 * 30)
    assert roofline.depthwise_forward(10, 3, 2, taps=1.5).vector_flops == 90
    assert roofline.depthwise_input_grad(10, 3, 2).num_bytes == 120 + 588
    assert roofline.depthwise_input_grad(10, 3, 2, residual=True).num_bytes == 180 + 588
    assert roofline.depthwise_weight_grad(10, 3, 4).num_bytes == 240 + 600


def test_pointwise():
    import roofline

    # a site of 1 channel, 4 hidden: 3 + 12 items forward, 4 + 12 backward, mean and rstd 8 bytes; 8 + 3 + 12 parameters
    assert roofline.pointwise_forward(1, 1, 2) == (30 + 8 + 92, 16, 0)
    assert roofline.pointwise_backward(1, 1, 2) == (32 + 8 + 184, 32, 0)
    forward = roofline.pointwise_forward(1000, 64, 2)
    assert forward.matrix_flops == 2 * (1000 * 64 * 256) * 2


def test_stem_downsample_and_heads():
    import roofline

    # one patch of 8 x 8 pixels (stride 1), 2 bands in float32, 3 channels in bf16
    parameters = (18 + 1 + 6) * 3 * 4
    assert roofline.stem_forward(1, 8, 2, 3, 2, 4) == (64 * 8 + 64 * 6 + parameters, 2 * 64 * 9 * 2 * 3, 2 * 64 * 3)
    assert roofline.stem_backward(1, 8, 2, 3, 2, 4).matrix_flops == 2 * (2 * 64 * 9 * 2 * 3)
    # 4 sites of 3 channels become one of 5: a product of [1, 12] and [12, 5]
    assert roofline.downsample_forward(4, 3, 5, 2) == ((12 + 5) * 2 + (60 + 5 + 6) * 4, 2 * 12 * 5, 0)
    assert roofline.downsample_backward(4, 3, 5, 2) == ((24 + 5) * 2 + (120 + 5 + 12) * 4, 4 * 12 * 5, 0)
    # 2 patches of 3 features, 7 outputs, 100 bytes of targets: features in, their gradient out
    assert roofline.heads_step(2, 3, 7, 2, 100) == (24 + 100 + 2 * 4 * 28, 6 * 2 * 3 * 7, 0)


def test_the_floor_is_the_larger_of_two_times():
    from roofline import Work, added

    work = Work(1000, 600, 7)
    assert (work.floor_s(100, 10), work.bound(100, 10)) == (60, "matrix")
    assert (work.floor_s(10, 100), work.bound(10, 100)) == (100, "memory")
    assert added([work, Work(1, 2, 3)]) == (1001, 602, 10)


def test_active_taps_by_counting():
    import roofline

    visible = torch.tensor([[0, 4, 8], [1, 2, 7]])
    counts = []
    for patches in visible.tolist():
        sites = {(p // 3 * 2 + r, p % 3 * 2 + c) for p in patches for r in range(2) for c in range(2)}
        counts += [sum((r + i, c + j) in sites for i in range(-3, 4) for j in range(-3, 4)) for r, c in sites]
    assert roofline.active_taps(visible, 3, 2) == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize(("tile_side", "taps"), [(8, 36.2), (4, 26.2), (2, 16.7), (1, 11.1)])
def test_active_taps_at_the_usual_mask_ratio(tile_side, taps):
    import roofline
    from synthetic import random_visible

    visible = random_visible(200, 49, 0.6, torch.device("cpu"))
    assert roofline.active_taps(visible, 7, tile_side) == pytest.approx(taps, abs=0.4)
