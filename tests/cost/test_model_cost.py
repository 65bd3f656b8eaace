"""The count of a step's operations and bytes against torch's flop counter and against sums by hand."""

import pytest
import torch

from mpmae.cost import model_cost
from mpmae.kernels import checks
from mpmae.loader.batch import Batch
from mpmae.modalities import spec_of
from mpmae.models import create_model
from mpmae.models.mpmae import INPUT
from mpmae.models.presets import list_mpmae
from tests.cost.flops import counted, fake_mode

NUM_SAMPLES = 2


@pytest.fixture(autouse=True)
def without_data(monkeypatch):
    """No look at values or addresses: the tensors of this file have none."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(checks, "aligned", lambda tensor: tensor)


def meta_model(name="mpmae_atto", **options):
    with torch.device("meta"):
        return create_model(name, **options)


def empty_batch(model) -> Batch:
    values = {}
    for name in dict.fromkeys((INPUT, *model.modalities_out)):
        shape = model._expected_shape(name, NUM_SAMPLES)
        values[name] = torch.empty(shape, dtype=torch.int64 if spec_of(name).kind == "categorical" else torch.float32)
    valid = {name: torch.empty(value.shape, dtype=torch.bool) for name, value in values.items()}
    return Batch(values, valid, torch.empty(NUM_SAMPLES, dtype=torch.int64), dict.fromkeys(values, NUM_SAMPLES), NUM_SAMPLES)


def step_flops(**options):
    model = meta_model(**options)
    with fake_mode():
        model = model.to_empty(device="cpu")
        visible = torch.empty(NUM_SAMPLES, model.num_visible, dtype=torch.int64)
        return counted(model, empty_batch(model), visible)


def beta_products(model, sparse):
    """What makes the gradient of GRN's beta: one product of [C] and [C, 4C] a block, and no site in it."""
    blocks = [*model.decoder.blocks, *(block for stage in model.encoder.stages for block in stage if sparse)]
    return sum(8 * block.dwconv.in_channels**2 for block in blocks)


def check_against_torch(**options):
    model = meta_model(**options)
    sparse = options.get("encoder", "sparse") == "sparse"
    cost = model_cost(model, "fp32")
    forward = sum(part.forward.matrix_flops for part in cost.parts.values())
    both = forward + sum(part.backward.matrix_flops for part in cost.parts.values())

    found = step_flops(**options)
    # the heads of pixel modalities make their gradients, two more products, in the forward
    outputs = sum(head.out_features for head in model.heads.pixel.values())
    early = 4 * model.decoder.proj.out_features * outputs * (model.num_patches - model.num_visible)
    assert found.forward == NUM_SAMPLES * (forward + early)
    # counted there and not here: the stem's convolution, which its backward computes again
    again = cost.parts["stem"].forward.matrix_flops if sparse and options.get("stem") != "convnext" else 0
    assert found.matrix == NUM_SAMPLES * (both + again) + beta_products(model, sparse)

    # in PyTorch a depthwise convolution covers the whole grid, with all its taps
    decoder = cost.parts["decoder"].forward.vector_flops
    side, width = model.num_patches_side, model.decoder.proj.out_features
    assert 49 * decoder == pytest.approx(_rows(side) ** 2 * found.depthwise[width, 7] / NUM_SAMPLES / 3, rel=1e-6)
    for stage, dim in enumerate(model.encoder.stages[i][0].dwconv.in_channels for i in range(4)):
        part = cost.parts[f"stage {stage}"]
        whole = found.depthwise[dim, 7] / NUM_SAMPLES
        if sparse:
            assert 0 < part.forward.vector_flops + part.backward.vector_flops < whole * model.num_visible / side**2
        else:
            assert part.forward.vector_flops + part.backward.vector_flops == whole
    if not sparse and "stem" not in options:
        stem = cost.parts["stem"]
        assert found.depthwise[model.encoder.stem.conv.out_channels, model.patch_size // 8] == NUM_SAMPLES * (
            stem.forward.vector_flops + stem.backward.vector_flops
        )


def _rows(side):
    """Mean number of the 7 taps of a row that stay within so many sites."""
    return sum(0 <= site + tap < side for site in range(side) for tap in range(-3, 4)) / side


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": "dense", "patch_size": 16, "img_size": 64},
        {"name": "mpmae_huge", "stem": "convnext", "patch_size": 16, "img_size": 112, "mask_ratio": 0.75},
    ],
    ids=["atto", "dense", "huge with the stem of ConvNeXt"],
)
def test_operations_are_those_of_torchs_counter(options):
    check_against_torch(**options)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["sparse", "dense"])
@pytest.mark.parametrize("name", list_mpmae())
def test_operations_of_every_preset(name, encoder):
    check_against_torch(name=name, encoder=encoder, decoder_dim=520)  # no stage is as wide: widths tell them apart


def test_stages_and_heads_by_hand():
    cost = model_cost(meta_model(modalities_out=["biome", "aster"]), "bf16")
    assert cost.parts["stage 0"].forward.matrix_flops == 2 * 16 * 40**2 * 19 * 64
    assert cost.parts["downsample 1"].forward.matrix_flops == 2 * (19 * 16) * (4 * 40) * 80
    assert cost.parts["stage 0"].backward.flops == 2 * cost.parts["stage 0"].forward.flops
    # 30 hidden patches of 64 pixels and 2 bands, and 14 biomes of the whole tile
    assert cost.parts["heads"].forward.flops == 2 * 512 * (30 * 128 + 14)
    # an image has no gradient: the convolution's weight alone, and the pooling's input and weight
    stem = cost.parts["stem"]
    pixels = 19 * 64
    assert (stem.forward.flops, stem.backward.flops) == (pixels * 40 * (18 * 12 + 2), pixels * 40 * (18 * 12 + 4))


def test_parts_hold_all_parameters_but_the_log_variances():
    for options in ({}, {"encoder": "dense"}, {"stem": "convnext", "patch_size": 16, "img_size": 112}):
        model = meta_model(**options)
        cost = model_cost(model, "fp32")
        assert cost.num_parameters == sum(p.numel() for p in model.parameters())
        assert sum(part.num_parameters for part in cost.parts.values()) == cost.num_parameters - 12
        assert list(cost.parts)[:4] == ["stem", "stage 0", "downsample 1", "stage 1"]


def test_bytes_follow_the_precision_and_the_way_of_the_kernels():
    model = meta_model("mpmae_tiny")
    narrow, wide = (model_cost(model, precision) for precision in ("bf16", "fp32"))
    stage = (model_cost(model, "bf16", capability).parts["stage 0"].forward.num_bytes for capability in (None, 9))
    assert len(set(stage)) == 1  # 96 channels: the fused forward moves the least
    assert narrow.image_bytes < wide.image_bytes < 2 * narrow.image_bytes
    assert narrow.gradient_bytes == wide.gradient_bytes == 4 * narrow.num_parameters
    by_kernels = model_cost(model, "bf16", 9)
    assert by_kernels.flops == narrow.flops
    sites, dim = 19 * 4, 384  # stage 2 is wide, and its tiles too small to fold
    moved = by_kernels.parts["stage 2"].forward.num_bytes - narrow.parts["stage 2"].forward.num_bytes
    assert moved == 9 * (35 - 15) * sites * dim * 2
    atto = meta_model()
    one_pass, two = (model_cost(atto, "bf16", capability).parts["stage 0"].backward.num_bytes for capability in (9, 8))
    assert two - one_pass == 2 * 9 * (19 * 64) * 40 * 2


def test_bytes_of_a_whole_step():
    cost = model_cost(meta_model(), "bf16")
    n = cost.num_parameters
    assert cost.step_bytes(32, 4) - cost.step_bytes(32, 2) == 2 * cost.micro_step_bytes
    assert cost.step_bytes(32, 4) - cost.step_bytes(16, 4) == 16 * cost.image_bytes
    assert cost.optimizer_bytes() == 8 * 4 * n
    assert cost.optimizer_bytes(clipped=True) == 10 * 4 * n
    assert cost.step_bytes(0, 0, num_shards=4) == 2 * 4 * n
    assert (cost.reduction_bytes(1), cost.reduction_bytes(2), cost.reduction_bytes(4)) == (0, 4 * n, 6 * n)
