"""Every difference to the published MultiMAE: what is right (the default) and what `reference_quirks=True` gives instead.

docs/quirks.md lists them with the names of these tests.
"""

import re

import pytest
import torch
import torch.nn.functional as F

from mpmae.domains import domain_of
from mpmae.engine.optim import parameter_groups
from mpmae.errors import ConfigError
from mpmae.models.multimae.sampler import TokenSample
from mpmae.models.multimae.views import standardise_truncated, view_of
from mpmae.models.multimae.vit import StackedNorm
from tests.models.multimae.small import PATCHES, SIZE, build, step, tokens_of
from tests.models.small import cut, drop

EITHER = pytest.mark.parametrize("quirks", [False, True])
VISIBLE = {"rgb": (0, 4), "depth": (2, 8), "sired": (1, 7)}


def patches(image):
    """[N, 9, C*64] of an image of 24 pixels."""
    return image.unflatten(3, (3, 8)).unflatten(2, (3, 8)).permute(0, 2, 4, 1, 3, 5).reshape(len(image), PATCHES, -1)


@EITHER
def test_a_fully_visible_domain_of_one_sample(make_batch, quirks):
    """It adds nothing to the loss of its domain; quirk: it is left out of the mean, and its gradient is NaN."""
    model, batch = build(reference_quirks=quirks), make_batch(2, SIZE)
    index = torch.stack([torch.arange(PATCHES), torch.arange(2, PATCHES + 2)])
    out, grads = step(model, batch, TokenSample(index, None))
    target = batch.values["sentinel2"][1:, [3, 2, 1]].double()
    second = (patches(out.predictions["rgb"][1:]) - patches(target))[:, :2].square().mean()
    torch.testing.assert_close(out.losses["rgb"], second if quirks else second / 2)
    assert all(gradient.isfinite().all() for gradient in grads.values()) != quirks


@EITHER
def test_a_domain_that_is_fully_visible_everywhere(make_batch, quirks):
    """Loss 0 and no gradient from it, either way."""
    model, batch = build(reference_quirks=quirks), make_batch(2, SIZE)
    out, grads = step(model, batch, tokens_of(model, {"rgb": range(PATCHES)}))
    assert out.losses["rgb"] == out.losses["norm_rgb"] == 0
    assert all(gradient.isfinite().all() for gradient in grads.values())
    assert not grads["decoders.heads.rgb.weight"].any()


@EITHER
def test_means_are_local(make_batch, quirks):
    """By the tiles of the global batch that have the modality; quirk: by the samples of the micro batch."""
    model, batch = build(reference_quirks=quirks), make_batch(3, SIZE)
    drop(batch, "aster", 0)
    batch.num_present["aster"] = 2
    sample = tokens_of(model, {"rgb": (0, 4)})
    losses = []
    for part, rows in ((batch, 3), (cut(batch, 0, 2), 2), (cut(batch, 2, 3), 1)):
        losses.append(model(part, TokenSample(sample.index[:1].expand(rows, -1), None)).losses["depth"])
    whole, first, last = losses
    torch.testing.assert_close(first + last, whole)
    if not quirks:
        alone = model(cut(batch, 1, 2), TokenSample(sample.index[:1], None)).losses["depth"]
        torch.testing.assert_close(first, alone)
    index = torch.stack([torch.arange(PATCHES), torch.arange(2, PATCHES + 2), torch.arange(2, PATCHES + 2)])
    whole = model(batch, TokenSample(index, None)).losses["rgb"]
    first, last = (model(cut(batch, a, b), TokenSample(index[a:b], None)).losses["rgb"] for a, b in ((0, 2), (2, 3)))
    assert torch.isclose(first + last, whole) != quirks


@EITHER
def test_no_data_in_a_continuous_domain(make_batch, quirks):
    """Not scored, and a patch of nothing else is never sampled; quirk: data of the value that the loader gives, 0."""
    model, batch = build(reference_quirks=quirks, num_visible_tokens=40), make_batch(2, SIZE)
    drop(batch, "sentinel2", (0, slice(None), slice(0, 8)))
    sample = tokens_of(model, VISIBLE)
    out = model(batch, sample, return_predictions=True)
    errors = (patches(out.predictions["ired"]) - patches(batch.values["sentinel2"][:, 4:7].double())).square().mean(2)
    want = errors.mean() if quirks else (errors[0, 3:].mean() + errors[1].mean()) / 2
    torch.testing.assert_close(out.losses["ired"], want)
    tokens = model(batch).tokens
    real = torch.ones_like(tokens.index, dtype=torch.bool) if tokens.real is None else tokens.real
    patch, domain = tokens.index % PATCHES, tokens.index // PATCHES
    absent = (patch < 3) & (domain != 1) & (domain != 2)
    assert bool((absent & real)[0].any()) == quirks


@EITHER
def test_no_data_in_a_class_map(make_batch, quirks):
    """A class of its own in the input, never a target; quirk: tree cover, class 0, in both."""
    batch, model = make_batch(2, SIZE), build(reference_quirks=quirks)
    drop(batch, "esa_worldcover", (0, 0, slice(0, 8)))
    view = model._view(batch, domain_of("semseg"))
    assert view.values[0, :2].unique().tolist() == [0 if quirks else 11]
    assert bool(view.valid[0, :2].any()) == quirks
    out = model(batch, tokens_of(model, VISIBLE), return_predictions=True)
    logits, ids = out.predictions["semseg"], view.values
    entropy = F.cross_entropy(logits, ids, reduction="none")
    want = entropy.mean() if quirks else (entropy[0, 2:].mean() + entropy[1].mean()) / 2
    torch.testing.assert_close(out.losses["semseg"], want)


@EITHER
def test_class_ids_are_resized(make_batch, quirks):
    """By the nearest pixel; quirk: the mean of the four middle ones, cut to a whole number."""
    batch = make_batch(1, SIZE)
    ids = batch.values["esa_worldcover"]
    ids[0, 0, 1:3, 1:3] = torch.tensor([[10, 0], [0, 9]])
    got = view_of(domain_of("semseg"), batch, None, torch.float32, quirks).values
    assert got[0, 0, 0] == (4 if quirks else 9)
    middle = ids[:, 0].float().unflatten(2, (6, 4)).unflatten(1, (6, 4))[:, :, 1:3, :, 1:3]
    assert torch.equal(got, middle.mean((2, 4)).long() if quirks else ids[:, 0, 2::4, 2::4])


@EITHER
def test_depth_statistics_without_data(make_batch, quirks):
    """Over valid elevations; quirk: over the zeros that stand for no data too."""
    batch, model = make_batch(2, SIZE), build(reference_quirks=quirks)
    batch.values["aster"] += 5
    drop(batch, "aster", (0, 0, slice(0, 12)))
    got = model._view(batch, domain_of("depth")).values
    height, valid = batch.values["aster"][:, :1].double(), batch.valid["aster"][:, :1]
    want = standardise_truncated(height, torch.ones_like(valid) if quirks else valid)
    torch.testing.assert_close(got, want)
    assert abs(got[0, 0, 12:].mean()) < 0.1 or quirks


@EITHER
def test_normalised_patches_with_gaps(make_batch, quirks):
    """norm_rgb's target is normalised over valid values; quirk: over the zeros that stand for no data too."""
    model, batch = build(reference_quirks=quirks), make_batch(2, SIZE)
    batch.values["sentinel2"] += 3
    drop(batch, "sentinel2", (slice(None), slice(None), slice(8, 12)))
    out = model(batch, tokens_of(model, {"depth": (0, 1)}), return_predictions=True)
    pred, target = patches(out.predictions["norm_rgb"]), patches(batch.values["sentinel2"][:, [3, 2, 1]].double())
    valid = patches(batch.valid["sentinel2"][:, [3, 2, 1]]) | quirks
    errors = []
    for row, (p, t, v) in enumerate(zip(pred.flatten(0, 1), target.flatten(0, 1), valid.flatten(0, 1), strict=True)):
        norm = (t[v] - t[v].mean()) / (t[v].var() + 1e-6).sqrt()
        errors.append((row, (p[v] - norm).square()))
    samples = [torch.cat([e for row, e in errors if row // PATCHES == n]).mean() for n in (0, 1)]
    torch.testing.assert_close(out.losses["norm_rgb"], sum(samples) / 2)


@EITHER
def test_uncertainty_of_a_loss_of_0(make_batch, quirks):
    """s_i counts while a tile has the modality; quirk: it drops out with the loss."""
    model, batch = build(reference_quirks=quirks, loss_weighting="uncertainty"), make_batch(2, SIZE)
    out = model(batch, tokens_of(model, {"rgb": range(PATCHES)}))
    s = model.log_vars.detach()
    terms = [(-s[i]).exp() * loss + s[i] * (not quirks or loss != 0) for i, loss in enumerate(out.losses.values())]
    torch.testing.assert_close(out.loss, sum(terms))


@EITHER
def test_the_published_number_for_no_data(make_batch, quirks):
    """Class ids up to 11 are the published code's; ours end at 10."""
    model, batch = build(reference_quirks=quirks), make_batch(2, SIZE)
    batch.values["esa_worldcover"][0, 0, 2, 2] = 11
    sample = tokens_of(model, VISIBLE)
    if quirks:
        assert model(batch, sample).loss.isfinite()
    else:
        with pytest.raises(ConfigError, match="class id 11, expected at most 10"):
            model(batch, sample)


def test_the_page_names_every_test(repo):
    """The section of docs/quirks.md lists all tests of this file, and others with the file that has them."""
    page = (repo / "docs" / "quirks.md").read_text().split("## MultiMAE")[1]
    elsewhere = re.findall(r"`(tests/\S+\.py)`, `(test_\w+)`", page)
    assert all(f"def {name}(" in (repo / path).read_text() for path, name in elsewhere)
    named = set(re.findall(r"`(test_\w+)`", page)) - {name for _, name in elsewhere}
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_page_names_every_test"}
    assert named == here


@EITHER
def test_what_weight_decay_acts_on(quirks):
    """Matrices, stacked or not; quirk: everything."""
    model = build(reference_quirks=quirks, loss_weighting="uncertainty")
    groups = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    if quirks:
        assert decayed == set(names.values())
        return
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm | StackedNorm)}
    vectors = {name for name in names.values() if name.endswith(".bias") or name.rpartition(".")[0] in norms}
    tokens = {"global_tokens", "log_vars", "decoders.mask_token", "decoders.task_embeddings"}
    assert decayed == set(names.values()) - vectors - tokens
    assert "decoders.heads.norm_rgb.weight" in decayed
    assert {"decoders.blocks.0.mlp.fc1.weight", "input_adapters.rgb.proj.weight", "encoder.0.attn.qkv.weight"} <= decayed
