"""NaN and infinity in any modality never reach a gradient, even where the batch says `valid`."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mpmae
from mpmae.masking import draw_visible
from mpmae.modalities import TARGETS

SIZE, PATCHES, NUM = 24, 9, 2
NOT_A_CLASS = -(2**63)  # what a cast of NaN to int64 gives
BAD = (float("nan"), float("inf"), float("-inf"))


def build(quirks):
    torch.manual_seed(1)
    return mpmae.create_model(
        "mpmae_atto", img_size=SIZE, decoder_dim=16, init="convnextv2", grn_scope="sample", reference_quirks=quirks
    )


@pytest.fixture(scope="module")
def models():
    return {quirks: build(quirks) for quirks in (False, True)}


def step(model, batch):
    model.zero_grad()
    out = model(batch, draw_visible(0, 0, batch.sample_ids, PATCHES, 3))
    out.loss.backward()
    return out.loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def spoil(batch, name, where, bad, valid):
    """A copy of `batch` with `bad` in `name` at `where` (bool, the values' shape), marked as `valid` or not."""
    values, flags = batch.values[name].clone(), batch.valid[name].clone()
    values[where] = bad if values.is_floating_point() else NOT_A_CLASS
    flags[where] = valid
    return dataclasses.replace(batch, values=batch.values | {name: values}, valid=batch.valid | {name: flags})


def assert_reaches_nothing(model, batch, name, where, bad):
    loss, grads = step(model, spoil(batch, name, where, bad, valid=True))
    expected_loss, expected = step(model, spoil(batch, name, where, bad, valid=False))
    assert loss.isfinite()
    assert torch.equal(loss, expected_loss)
    for parameter, grad in grads.items():
        assert grad.isfinite().all(), parameter
        assert torch.equal(grad, expected[parameter]), parameter


@pytest.mark.parametrize("quirks", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_each_modality(models, make_batch, name, quirks):
    batch = make_batch(NUM, SIZE)
    generator = torch.Generator().manual_seed(TARGETS.index(name))
    shape = batch.values[name].shape
    where = torch.rand(shape, generator=generator) < 0.2
    where.view(-1)[0] = True
    where.view(-1)[-1] = False
    for bad in BAD if batch.values[name].is_floating_point() else BAD[:1]:
        assert_reaches_nothing(models[quirks], batch, name, where, bad)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(TARGETS),
    bad=st.sampled_from(BAD),
    seed=st.integers(0, 2**31 - 1),
    share=st.floats(0, 0.9),
    quirks=st.booleans(),
)
def test_anywhere(models, make_batch, name, bad, seed, share, quirks):
    batch = make_batch(NUM, SIZE)
    where = torch.rand(batch.values[name].shape, generator=torch.Generator().manual_seed(seed)) < share
    where.view(-1)[-1] = False  # the quirks have no finite loss for a modality without any valid target
    assert_reaches_nothing(models[quirks], batch, name, where, bad)


def test_nothing_but_bad_values(models, make_batch):
    """A batch that is bad throughout still gives finite gradients by default: zeros."""
    batch = make_batch(NUM, SIZE)
    for name in TARGETS:
        batch = spoil(batch, name, torch.ones_like(batch.valid[name]), float("nan"), valid=True)
    loss, grads = step(models[False], batch)
    assert loss == 0
    assert all(grad.isfinite().all() for grad in grads.values())
