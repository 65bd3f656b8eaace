"""The count of a MultiMAE's step against torch's flop counter and against sums by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mpmae
from mpmae.cost import model_cost
from mpmae.loader.batch import Batch
from mpmae.modalities import spec_of
from mpmae.models import list_models
from tests.cost.flops import fake_mode

NUM_SAMPLES = 2


def meta_model(name="multimae_tiny", **options):
    with torch.device("meta"):
        return mpmae.create_model(name, **options)


def empty_batch(model) -> Batch:
    values = {}
    for name in model.modalities:
        classes = spec_of(name).kind == "categorical"
        shape = (NUM_SAMPLES, 1 if classes else len(model.bands_available[name]), model.img_size, model.img_size)
        values[name] = torch.empty(shape, dtype=torch.int64 if classes else torch.float32)
    valid = {name: torch.empty(value.shape, dtype=torch.bool) for name, value in values.items()}
    return Batch(values, valid, torch.empty(NUM_SAMPLES, dtype=torch.int64), dict.fromkeys(values, NUM_SAMPLES), NUM_SAMPLES)


def domain_products(model):
    """What makes the tokens' domain embeddings: a product of one-hot rows with them, and one for their gradient."""
    num, num_inputs, dim = model.decoders.task_embeddings.shape
    return 2 * model.num_visible * num_inputs * num * dim


def check_against_torch(**options):
    model = meta_model(**options)
    cost, tokens = model_cost(model, "fp32"), model.draw(0, 0, range(NUM_SAMPLES))
    # attention as plain products, all of which the counter sees
    with fake_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = model.to_empty(device="cpu")
        loss = model(empty_batch(model), tokens).loss
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == NUM_SAMPLES * (cost.forward_flops + domain_products(model))
    assert counter.get_total_flops() == NUM_SAMPLES * (cost.flops + 2 * domain_products(model))


@pytest.fixture(autouse=True)
def without_data(monkeypatch):
    """No look at values: the tensors of this file have none."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "multimae_base", "img_size": 112, "patch_size": 16, "num_visible_tokens": 98, "decoder_depth": 0},
        {"domains_in": ["semseg", "sentinel1"], "domains_out": ["rgb", "dynamic_world"], "decoder_dim": 64},
    ],
    ids=["published", "patch 16", "other domains"],
)
def test_operations_are_those_of_torchs_counter(options):
    check_against_torch(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("multimae")])
def test_operations_of_every_preset(name):
    check_against_torch(name=name)


def test_parts_by_hand():
    cost = model_cost(meta_model("multimae_base"), "bf16")
    assert list(cost.parts) == ["embedding", "encoder", "decoders", "heads"]
    embedding, encoder, decoders, heads = cost.parts.values()
    # 49 patches of 3 + 1 + 3 + 2 + 2 bands of 64 pixels, and of 4 class embeddings, which alone have a gradient
    pixels, classes = 2 * 49 * 768 * 11 * 64, 2 * 49 * 768 * 4 * 64
    assert (embedding.forward.flops, embedding.backward.flops) == (pixels + classes, pixels + 2 * classes)
    # 49 visible tokens and the global one
    assert encoder.forward.flops == 12 * (24 * 50 * 768**2 + 4 * 50**2 * 768)
    assert encoder.backward.flops == 2 * encoder.forward.flops
    own = 24 * 49 * 128**2 + 4 * 49**2 * 128
    cross = 2 * 128**2 * (49 + 2 * 50 + 49 + 8 * 49) + 4 * 49 * 50 * 128
    assert decoders.forward.flops == 7 * (2 * 50 * 768 * 128 + cross + 2 * own)
    # rgb twice, ired, sired, ebands and depth of 64 pixels, 12 classes of 4
    assert heads.forward.flops == 2 * 49 * 128 * ((3 + 1 + 3 + 2 + 2 + 3) * 64 + 12 * 4)
    assert cost.forward_flops < encoder.forward.flops * 1.08


def test_bytes_by_hand():
    model = meta_model("multimae_tiny", domains_in=["depth"], domains_out=["depth"], num_visible_tokens=9, decoder_depth=0)
    narrow, wide = (model_cost(model, precision) for precision in ("bf16", "fp32"))
    for cost, item_bytes in ((narrow, 2), (wide, 4)):
        parts = cost.parts
        # products: D and 3D, D and D, D and 4D, 4D and D items a token, attention 4D, two residuals 2D
        assert parts["encoder"].forward.num_bytes == 12 * 10 * 22 * 192 * item_bytes
        assert parts["encoder"].backward.num_bytes == 12 * 10 * 33 * 192 * item_bytes
        embedded = 49 * (64 * 4 + 192 * item_bytes) + 2 * 9 * 192 * item_bytes
        assert parts["embedding"].forward.num_bytes == parts["embedding"].backward.num_bytes == embedded
        targets = 49 * 64 * 5
        assert parts["heads"].forward.num_bytes == 2 * 49 * 128 * item_bytes + targets
    assert narrow.gradient_bytes == wide.gradient_bytes == 4 * narrow.num_parameters
    assert narrow.micro_step_bytes == pytest.approx(3 * 4 * narrow.num_parameters, rel=0.01)


def test_parts_hold_all_parameters_but_the_log_variances():
    for options in ({}, {"loss_weighting": "uncertainty", "domains_in": ["semseg", "sentinel1"]}):
        model = meta_model(**options)
        cost = model_cost(model, "fp32")
        log_vars = 0 if model.log_vars is None else len(model.log_vars)
        assert cost.num_parameters == sum(p.numel() for p in model.parameters())
        assert sum(part.num_parameters for part in cost.parts.values()) == cost.num_parameters - log_vars


def test_the_budget_sets_the_encoders_work():
    few, many = (model_cost(meta_model(num_visible_tokens=num), "bf16") for num in (24, 49))
    assert few.parts["encoder"].forward.flops < many.parts["encoder"].forward.flops
    assert few.parts["embedding"].forward.flops == many.parts["embedding"].forward.flops
