"""Losses: the reduction over a global batch and what does not count. The published code's quirks: test_quirks.py."""

import pytest
import torch
import torch.nn.functional as F

from mpmae.loader.batch import Batch
from mpmae.masking import visible_bool
from mpmae.models.losses import normalise_patches
from tests.models.small import PATCHES, SIZE, build, cut, draw, drop


def gappy(batch, quirks=False):
    """Gaps of every kind: pixels, whole samples, a whole modality (which has no finite loss with the quirks)."""
    drop(batch, "sentinel2", (0, slice(None), slice(0, 9), slice(0, 11)))
    drop(batch, "sentinel1", (slice(None), 2))
    drop(batch, "aster", 1)
    drop(batch, "esa_worldcover", (0, 0, slice(3, 20)))
    drop(batch, "era5", (0, slice(2, 5)))
    drop(batch, "biome", 1)
    num = len(batch)
    batch.num_present |= {"aster": num - 1, "biome": num - 1}
    if not quirks:
        drop(batch, "month")
        batch.num_present["month"] = 0
    return batch


def gradients(model, parts):
    model.zero_grad()
    loss = 0
    for part in parts:
        out = model(part, draw(part))
        out.loss.backward()
        loss += out.loss.item()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weighting", ["uncertainty", "unweighted"])
def test_shares_add_up_however_the_batch_is_cut(make_batch, weighting):
    batch, model = gappy(make_batch(6, SIZE)), build(loss_weighting=weighting)
    whole, expected = gradients(model, [batch])
    for count in (2, 3):
        size = 6 // count
        loss, grads = gradients(model, [cut(batch, start, start + size) for start in range(0, 6, size)])
        assert loss == pytest.approx(whole, rel=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_the_reduction_by_hand(make_batch):
    """Per sample the mean over valid target values on hidden patches, then the sum over samples / K."""
    batch, model = gappy(make_batch(3, SIZE)), build(loss_weighting="unweighted")
    visible = draw(batch)
    out = model(batch, visible, return_predictions=True)
    hidden = ~visible_bool(visible, PATCHES).view(3, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def image(name, channels):  # [N, p*p*C, G, G] -> [N, C, H, W]
        pred = out.predictions[name].view(3, 8, 8, channels, 3, 3)
        return pred.permute(0, 3, 4, 1, 5, 2).reshape(3, channels, SIZE, SIZE)

    def per_sample(errors, counts):
        return (errors * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)

    for name, channels, num_present in (("sentinel1", 8, 3), ("aster", 2, 2)):
        errors = (image(name, channels) - batch.values[name]).square()
        expected = per_sample(errors, batch.valid[name] & hidden).sum() / num_present
        torch.testing.assert_close(out.losses[name], expected, check_dtype=False, rtol=1e-6, atol=0)
    labels = batch.values["esa_worldcover"][:, 0]
    errors = F.cross_entropy(image("esa_worldcover", 11), labels.clamp(min=0), reduction="none")
    expected = per_sample(errors, (labels >= 0) & hidden[:, 0]).sum() / 3
    torch.testing.assert_close(out.losses["esa_worldcover"], expected, rtol=1e-9, atol=0)
    errors = (out.predictions["era5"] - batch.values["era5"]).square()
    expected = per_sample(errors, batch.valid["era5"]).sum() / 3
    torch.testing.assert_close(out.losses["era5"], expected, check_dtype=False, rtol=1e-6, atol=0)
    errors = F.cross_entropy(out.predictions["biome"][[0, 2]], batch.values["biome"][[0, 2]], reduction="sum")
    torch.testing.assert_close(out.losses["biome"], errors / 2, rtol=1e-9, atol=0)
    assert out.losses["month"] == 0
    torch.testing.assert_close(out.loss, sum(out.losses.values()))


def test_sentinel2_target_is_normalised_over_valid_values():
    torch.manual_seed(0)
    target, valid = torch.randn(2, 3, 20, dtype=torch.float64), torch.rand(2, 3, 20) < 0.6
    valid[0, 0] = False
    valid[0, 1] = torch.arange(20) == 4
    got = normalise_patches(torch.where(valid, target, 0), valid)
    assert got.isfinite().all()
    chosen = target[1, 2][valid[1, 2]]
    expected = (chosen - chosen.mean()) / (chosen.var() + 1e-6).sqrt()
    torch.testing.assert_close(got[1, 2][valid[1, 2]], expected)
    assert got[0, 1, 4] == 0


@pytest.mark.parametrize("weighting", ["uncertainty", "unweighted"])
def test_absent_modalities_give_zero_gradients(make_batch, weighting):
    batch = make_batch(2, SIZE)
    absent = ("sentinel1", "esa_worldcover", "era5", "eco_region")
    for name in absent:
        drop(batch, name)
        batch.num_present[name] = 0
    model = build(loss_weighting=weighting)
    out = model(batch, draw(batch))
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    for name in absent:
        head = model.heads.pixel[name] if name in model.heads.pixel else model.heads.tile[name]
        assert out.losses[name] == 0
        assert head.weight.grad.count_nonzero() == 0
        if weighting == "uncertainty":
            assert model.log_vars.grad[model.modalities_out.index(name)] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("quirks", [False, True])
def test_values_that_are_not_valid_reach_nothing(make_batch, bad, quirks):
    model = build(torch.float32, reference_quirks=quirks)
    clean, dirty = (gappy(make_batch(3, SIZE), quirks) for _ in range(2))
    for name, values in dirty.values.items():
        values[~dirty.valid[name]] = bad if values.is_floating_point() else 1_000_000
    loss, expected = gradients(model, [clean])
    dirty_loss, grads = gradients(model, [dirty])
    assert dirty_loss == loss
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("grn_scope", ["sample", "batch"])
@pytest.mark.parametrize("quirks", [False, True])
def test_padding_counts_nothing(make_batch, quirks, grn_scope):
    model = build(reference_quirks=quirks, grn_scope=grn_scope)
    batch = gappy(make_batch(4, SIZE), quirks)
    batch.global_batch_size = 3
    batch.padding[3] = True
    loss, expected = gradients(model, [cut(batch, 0, 3)])
    padded_loss, grads = gradients(model, [batch])
    assert padded_loss == pytest.approx(loss, rel=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)
    batch.padding[:] = True
    only_padding, grads = gradients(model, [batch])
    assert only_padding == 0
    assert all(grad.count_nonzero() == 0 for grad in grads.values())


def test_hidden_inputs_and_visible_targets_change_only_what_they_must(make_batch):
    model, batch = build(loss_weighting="unweighted"), make_batch(2, SIZE)
    visible = draw(batch)
    shown = visible_bool(visible, PATCHES).view(2, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    before = model(batch, visible)
    batch.values["sentinel2"] = torch.where(shown, batch.values["sentinel2"], 3 * batch.values["sentinel2"] + 1)
    after = model(batch, visible)
    assert torch.equal(before.latent, after.latent)
    changed = {name for name in before.losses if not torch.equal(before.losses[name], after.losses[name])}
    assert changed <= {"sentinel2"}
    batch.values["sentinel1"] = torch.where(shown, 9.0, batch.values["sentinel1"])
    assert torch.equal(model(batch, visible).losses["sentinel1"], before.losses["sentinel1"])


def test_losses_are_float32_under_bfloat16(make_batch):
    batch, model = make_batch(2, SIZE), build(torch.bfloat16)
    out = model(batch, draw(batch))
    assert out.loss.dtype == torch.float32
    assert {loss.dtype for loss in out.losses.values()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = build(torch.float32)
        auto = model(batch, draw(batch))
    assert auto.loss.dtype == torch.float32
    exact = build(torch.float64)(batch, draw(batch))
    assert isinstance(batch, Batch)
    for got in (out, auto):
        assert got.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
        got.loss.backward()
