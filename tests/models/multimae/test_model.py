"""What a forward pass of MultiMAE gives."""

import pytest
import torch

from mpmae.models.multimae.sampler import TokenSample
from tests.models.multimae.small import PATCHES, SIZE, build, gradients, step, tokens_of
from tests.models.small import cut, drop

VISIBLE = {"rgb": (0, 4), "depth": (2, 8), "semseg": (5,), "sired": (1, 7)}


def test_shapes(make_batch):
    model = build(torch.float32)
    out = model(make_batch(2, SIZE), return_predictions=True)
    assert list(out.losses) == ["rgb", "depth", "semseg", "ired", "sired", "ebands", "norm_rgb"]
    assert {name: tuple(p.shape[1:]) for name, p in out.predictions.items()} == {
        "rgb": (3, 24, 24),
        "depth": (1, 24, 24),
        "semseg": (12, 6, 6),
        "ired": (3, 24, 24),
        "sired": (2, 24, 24),
        "ebands": (2, 24, 24),
        "norm_rgb": (3, 24, 24),
    }
    assert out.tokens.index.shape == (2, 9)  # a sixth of 6 * 9
    assert out.latent.shape == (2, 10, 192)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(sum(out.losses.values()).item())


def test_every_parameter_trains(make_batch):
    model = build(loss_weighting="uncertainty", domains_in=("rgb", "depth"), domains_out=("rgb", "semseg", "sentinel1"))
    model(make_batch(2, SIZE), tokens_of(model, {"rgb": (0, 4)})).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.ndim > 0 for parameter in model.parameters())


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("everywhere", [False, True], ids=["in the micro batch", "in the global batch"])
def test_every_parameter_has_a_gradient_whatever_is_absent(make_batch, everywhere, quirks):
    """What data-parallel engines wait for: also of a domain that no sample has, that none saw, or that is all visible."""
    model, batch = build(loss_weighting="uncertainty", reference_quirks=quirks), make_batch(2, SIZE)
    for name in ("aster", "esa_worldcover"):
        drop(batch, name, slice(None))
        batch.num_present[name] = 0 if everywhere else 3
    out, grads = step(model, batch, tokens_of(model, {"rgb": range(PATCHES)}))
    assert set(grads) == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in grads.values())
    if not quirks:
        assert out.losses["depth"] == out.losses["semseg"] == out.losses["rgb"] == 0
        s = model.log_vars.detach()
        skipped = {"depth", "semseg"} if everywhere else set()
        terms = [(-s[i]).exp() * loss + s[i] * (name not in skipped) for i, (name, loss) in enumerate(out.losses.items())]
        torch.testing.assert_close(out.loss, sum(terms))


def test_a_loss_by_hand(make_batch):
    """Squared error, absolute error of standardised depth, cross entropy, and squared error of normalised patches."""
    batch = make_batch(2, SIZE, dtype=torch.float64)
    model = build()
    out = model(batch, tokens_of(model, VISIBLE), return_predictions=True)

    def hidden(name, values):
        patch = values.shape[-1] // 3
        grid = values.unflatten(-1, (3, patch)).unflatten(-3, (3, patch)).movedim((-4, -2), (1, 2))
        keep = [number for number in range(PATCHES) if number not in VISIBLE.get(name, ())]
        return grid.flatten(1, 2)[:, keep]

    rgb, pred = batch.values["sentinel2"][:, [3, 2, 1]], out.predictions
    torch.testing.assert_close(out.losses["rgb"], hidden("rgb", (pred["rgb"] - rgb).square()).mean())
    target = hidden("rgb", rgb).flatten(2)
    target = (target - target.mean(2, True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    errors = hidden("rgb", pred["norm_rgb"]).flatten(2) - target
    torch.testing.assert_close(out.losses["norm_rgb"], errors.square().mean())
    ids = batch.values["esa_worldcover"][:, 0, 2::4, 2::4]
    entropy = torch.nn.functional.cross_entropy(pred["semseg"], ids, reduction="none")
    torch.testing.assert_close(out.losses["semseg"], hidden("semseg", entropy).mean())
    height = batch.values["aster"][:, :1].flatten(1).sort(1).values
    middle = height[:, 57:518]
    depth = (batch.values["aster"][:, :1] - middle.mean(1).view(2, 1, 1, 1)) / (middle.var(1) + 1e-6).sqrt().view(2, 1, 1, 1)
    torch.testing.assert_close(out.losses["depth"], hidden("depth", (pred["depth"] - depth).abs()).mean())


def test_hidden_inputs_change_nothing_the_encoder_gives(make_batch):
    model, batch = build(), make_batch(2, SIZE)
    sample = tokens_of(model, {"rgb": (0, 4), "semseg": (5,)})
    before = model(batch, sample, return_predictions=True)
    for name in ("sentinel2", "esa_worldcover"):
        noise = torch.randn(2, 1, SIZE, SIZE)
        changed = batch.values[name] + noise if name == "sentinel2" else (batch.values[name] + 1) % 11
        keep = torch.zeros(3, 3, dtype=torch.bool)
        for patch in (0, 4) if name == "sentinel2" else (5,):
            keep[divmod(patch, 3)] = True
        keep = keep.repeat_interleave(8, 0).repeat_interleave(8, 1)
        batch.values[name] = torch.where(keep, batch.values[name], changed)
    after = model(batch, sample, return_predictions=True)
    assert torch.equal(before.latent, after.latent)
    assert all(torch.equal(before.predictions[name], after.predictions[name]) for name in before.predictions)
    assert not torch.equal(before.loss, after.loss)


def test_the_order_of_the_tokens_does_not_matter(make_batch):
    model, batch = build(), make_batch(2, SIZE)
    sample = tokens_of(model, VISIBLE)
    shuffled = TokenSample(sample.index[:, torch.tensor([3, 0, 6, 2, 5, 1, 4])], None)
    torch.testing.assert_close(model(batch, shuffled).loss, model(batch, sample).loss, rtol=1e-12, atol=0)


def test_padding_is_neither_attended_nor_scored(make_batch):
    """A sample filled up with tokens that are not real is the sample without them, its gradients too."""
    model, batch = build(), make_batch(2, SIZE)
    sample = tokens_of(model, VISIBLE)
    more = torch.tensor([[3, 50, 20]]).expand(2, -1)
    padded = TokenSample(torch.cat([sample.index, more], 1), torch.tensor([[True] * 7 + [False] * 3] * 2))
    out, grads = step(model, batch, sample)
    padded_out, padded_grads = step(model, batch, padded)
    torch.testing.assert_close(padded_out.losses, out.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_out.predictions, out.predictions, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(padded_grads, grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, torch.nan, 1e30])
def test_an_absent_modality_is_never_sampled_and_never_scored(make_batch, value):
    """Whatever stands where there is no data: the same tokens, losses and gradients."""
    model, results = build(), []
    for filler in (0.0, value):
        batch = make_batch(2, SIZE)
        drop(batch, "aster", 0)
        drop(batch, "esa_worldcover", 1)
        batch.values["aster"][0] = filler
        batch.num_present |= {"aster": 1, "esa_worldcover": 1}
        results.append(step(model, batch, model.draw(0, 0, batch.sample_ids)))
    (out, grads), (other, other_grads) = results
    domain = out.tokens.index // PATCHES
    assert not (domain[0] == 1).any()
    assert not (domain[1] == 2).any()
    assert out.tokens.real is None
    assert torch.equal(out.tokens.index, other.tokens.index)
    torch.testing.assert_close(other.losses, out.losses, rtol=0, atol=0)
    torch.testing.assert_close(other_grads, grads, rtol=0, atol=0)
    assert all(gradient.isfinite().all() for gradient in grads.values())
    alone = step(model, cut(batch, 1, 2), TokenSample(out.tokens.index[1:], None))[0]
    torch.testing.assert_close(alone.losses["depth"], out.losses["depth"])


def test_patches_without_data_are_never_sampled(make_batch):
    model, batch = build(num_visible_tokens=30), make_batch(2, SIZE)
    drop(batch, "sentinel2", (0, slice(None), slice(0, 16)))  # 6 of 9 patches in four domains
    drop(batch, "esa_worldcover", 0)
    out, grads = step(model, batch, None)
    real = out.tokens.real
    assert real.sum(1).tolist() == [4 * 3 + 9, 30]
    assert set(out.tokens.index[0][real[0]].tolist()) == {
        k * PATCHES + patch for k, name in enumerate(model.domains_in) for patch in range(9) if patch >= 6 or name == "depth"
    } - set(range(2 * PATCHES, 3 * PATCHES))
    assert all(gradient.isfinite().all() for gradient in grads.values())


def test_shares_add_up_over_any_cut(make_batch):
    """Loss and gradients of three samples are the sums of one and two, with absent data and a visible domain."""
    model, batch = build(loss_weighting="uncertainty"), make_batch(3, SIZE)
    drop(batch, "aster", 0)
    drop(batch, "esa_worldcover", (2, slice(None), slice(0, 12)))
    batch.num_present["aster"] = 2
    draw = model.draw(0, 0, batch.sample_ids)
    whole, grads = step(model, batch, draw)
    model.zero_grad()
    total = 0
    for first, last in ((0, 1), (1, 3)):
        out = model(cut(batch, first, last), type(draw)(*(t[first:last] for t in draw)))
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(gradients(model), grads, rtol=1e-9, atol=1e-12)


def test_repeats_that_fill_up_a_batch_do_not_count(make_batch):
    model, batch = build(), make_batch(2, SIZE)
    alone = cut(batch, 0, 1)
    batch.padding[1] = True
    for part in (alone, batch):
        part.num_present, part.global_batch_size = dict.fromkeys(part.values, 1), 1
    sample = tokens_of(model, VISIBLE)
    (out, grads), (want, want_grads) = (
        step(model, part, TokenSample(sample.index[: len(part)], None)) for part in (batch, alone)
    )
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(grads, want_grads, rtol=1e-9, atol=1e-12)


def test_uncertainty_weighs_norm_rgb_too(make_batch):
    model, batch = build(loss_weighting="uncertainty"), make_batch(2, SIZE)
    out = model(batch, tokens_of(model, VISIBLE))
    s = model.log_vars.detach()
    assert list(out.log_vars) == list(out.losses)
    assert len(s) == 7
    assert "norm_rgb" in out.losses
    want = sum((-s[i]).exp() * loss + s[i] for i, loss in enumerate(out.losses.values()))
    torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize("names", [("depth",), ("ebands", "rgb"), None])
def test_features_of_any_subset(make_batch, names):
    """No other modality need be there, and a patch without data changes no other feature."""
    model, batch = build(), make_batch(2, SIZE)
    wanted = names or tuple(model.domains_in)
    modalities = {model.domains_in[name].modality for name in wanted}
    batch.values = {name: value for name, value in batch.values.items() if name in modalities}
    batch.valid = {name: value for name, value in batch.valid.items() if name in modalities}
    features = model.encode(batch, names)
    assert list(features.patches) == [name for name in model.domains_in if name in wanted]
    assert features.summary.shape == (2, 192)
    assert all(patches.shape == (2, PATCHES, 192) for patches in features.patches.values())
    for name in batch.valid:
        drop(batch, name, (0, slice(None), slice(0, 8)))
    gaps = model.encode(batch, names)
    for name, available in gaps.available.items():
        assert available.tolist() == [[False] * 3 + [True] * 6, [True] * 9], name
    assert torch.allclose(gaps.summary[1], features.summary[1])
    assert not torch.allclose(gaps.summary[0], features.summary[0])
    first = next(iter(batch.values))
    batch.values[first][0, :, :8] = 3 if batch.values[first].dtype == torch.int64 else 5.0
    assert torch.equal(model.encode(batch, names).summary, gaps.summary)


def test_half_precision(make_batch):
    model, batch = build(torch.float32), make_batch(2, SIZE)
    sample = tokens_of(model, VISIBLE)
    full = model(batch, sample).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch, sample)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(full.item(), rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_seed_gives_the_weights(make_batch):
    """Initial weights and tokens drawn inside come from torch's generator."""
    outs = []
    for _ in range(2):
        model = build()
        outs.append(model(make_batch(2, SIZE)).loss)
    assert outs[0] == outs[1]
