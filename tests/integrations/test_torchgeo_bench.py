"""The adapter for torchgeo-bench: against the package where it is installed, else against its documented interface."""

import importlib
import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mpmae
from mpmae.errors import ConfigError, DatasetError
from mpmae.export import export
from mpmae.loader.batch import Batch
from mpmae.modalities import spec_of
from tests.integrations import bench_interface
from tests.models.multimae.small import build

BANDS = spec_of("sentinel2").model_bands
MODULE = "mpmae.integrations.torchgeo_bench"
GENUINE = importlib.util.find_spec("torchgeo_bench") is not None
STAGES = ["stages.3.1", "stages.2.5", "stages.1.1", "stages.0.1"]  # atto


@pytest.fixture(params=["stand-in", "genuine"])
def bench(request, monkeypatch):
    """(the adapter's module, BandSpec)."""
    if request.param == "genuine" and not GENUINE:
        pytest.skip("needs torchgeo-bench, which needs Python 3.12")
    for name in [name for name in sys.modules if name.startswith("torchgeo_bench")]:
        monkeypatch.delitem(sys.modules, name)
    if request.param == "stand-in":
        bench_interface.install(monkeypatch)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)
    yield module, importlib.import_module("torchgeo_bench.datasets.base").BandSpec
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def multimae(tmp_path_factory):
    """(folder of a small MultiMAE with statistics of L2A, the model)."""
    folder = tmp_path_factory.mktemp("multimae")
    model = build(torch.float32, img_size=16, domains_in=("rgb", "depth", "ired"), domains_out=("rgb",)).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    statistics = {"sentinel2_l2a": {"bands": list(BANDS), "mean": [1000.0] * 12, "std": [500.0] * 12}}
    config = {"domains_in": ["rgb", "depth", "ired"], "img_size": 16, "statistics": statistics}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """(folder of an exported encoder of all 12 bands, its statistics of L2A)."""
    folder = export(checkpoint, "hub", tmp_path_factory.mktemp("bench") / "exported").folder
    return folder, json.loads((checkpoint / "checkpoint.json").read_text())["statistics"]["sentinel2_l2a"]


def specs(BandSpec, names, sensor="s2", largest=10000.0):
    return [BandSpec(sensor, name, name.upper(), 1200.0, 300.0, 0.0, largest) for name in names]


def sentinel_code(name):
    return name.lower() if name.endswith("A") else f"b{int(name[1:]):02d}"


def test_features_are_those_of_the_encoder(bench, exported):
    module, BandSpec = bench
    folder, statistics = exported
    order = list(reversed(BANDS))
    model = module.EncoderBench(
        specs(BandSpec, map(sentinel_code, order)), checkpoint=str(folder), normalization="model_native", name="x", eval={}
    )
    images = torch.rand(2, 12, 64, 64) * 3000
    encoder = mpmae.create_encoder("convnextv2_atto", checkpoint=folder)
    mean, std = (torch.tensor(statistics[key]).view(1, 12, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = encoder.forward_features((images.flip(1) - mean) / std).mean((2, 3))
    torch.testing.assert_close(model(images), expected)
    assert model(images).shape == (2, 320)
    assert model.num_channels == 12
    assert not any(p.requires_grad for p in model.parameters())


def test_words_and_missing_bands(bench, exported):
    module, BandSpec = bench
    folder, _ = exported
    model = module.EncoderBench(specs(BandSpec, ["red", "green", "blue", "nir"]), checkpoint=folder)
    # B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B11 B12: by name, else by the nearest wavelength
    assert model._positions == [2, 2, 1, 0, 0, 0, 3, 3, 3, 3, 3, 3]
    assert model(torch.rand(1, 4, 32, 32)).shape == (1, 320)
    with pytest.raises(DatasetError, match="no stored band can stand for"):
        module.EncoderBench(specs(BandSpec, ["vv", "vh"], sensor="sar"), checkpoint=folder)


def test_radar_beside_optical_bands_is_left_out(bench, exported):
    module, BandSpec = bench
    bands = specs(BandSpec, ["vv", "vh"], sensor="s1", largest=30.0) + specs(BandSpec, map(sentinel_code, BANDS))
    model = module.EncoderBench(bands, checkpoint=exported[0], normalization="model_native")
    images = torch.rand(1, 14, 16, 16) * 3000
    other = images.clone()
    other[:, :2] = -20
    assert torch.equal(model(images), model(other))


@pytest.mark.parametrize(("largest", "factor"), [(10000.0, 1.0), (2.5, 10000.0)])
def test_units_are_converted_for_the_checkpoints_statistics(bench, exported, largest, factor):
    module, BandSpec = bench
    folder, statistics = exported
    bands = specs(BandSpec, map(sentinel_code, BANDS), largest=largest)
    model = module.EncoderBench(bands, checkpoint=folder, normalization="model_native")
    images = torch.rand(1, 12, 8, 8)
    mean, std = (torch.tensor(statistics[key]).view(1, 12, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(model.normalize_inputs(images), (images * factor - mean) / std)


def test_the_benchmarks_own_statistics(bench, exported):
    module, BandSpec = bench
    model = module.EncoderBench(
        specs(BandSpec, map(sentinel_code, BANDS)), checkpoint=exported[0], normalization="bandspec_zscore"
    )
    images = torch.rand(1, 12, 8, 8) * 1000
    images[0, 3, 2, 2] = torch.nan
    normalised = model.normalize_inputs(images)
    assert normalised[0, 3, 2, 2] == 0
    torch.testing.assert_close(normalised[0, 0], (images[0, 0] - 1200) / 300)


def test_sides_that_are_no_whole_patches(bench, exported, caplog):
    module, BandSpec = bench
    model = module.EncoderBench(specs(BandSpec, map(sentinel_code, BANDS)), checkpoint=exported[0])
    assert model(torch.rand(1, 12, 30, 33)).shape == (1, 320)
    model(torch.rand(1, 12, 30, 33))
    assert [r.message for r in caplog.records].count(
        "images of 30 x 33 are enlarged to 32 x 40: the encoder's patch size is 8"
    ) == 1


def test_random_weights_come_from_the_seed(bench):
    module, BandSpec = bench
    models = [
        module.EncoderBench(
            specs(BandSpec, ["red", "green", "blue"]),
            bands_in=["B4", "B3", "B2"],
            normalization="bandspec_zscore",
            encoder="convnextv2_atto",
            patch_size=16,
            seed=seed,
        )
        for seed in (0, 0, 1)
    ]
    images = torch.rand(1, 3, 32, 32)
    assert models[0].input.patch_size == 16
    assert torch.equal(models[0](images), models[1](images))
    assert not torch.equal(models[0](images), models[2](images))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"product_level": "l1c"}, "has statistics for l2a, not for l1c"),
        ({"product_level": "l3"}, "product_level = 'l3'"),
    ],
)
def test_statistics_that_are_not_there(bench, exported, options, words):
    module, BandSpec = bench
    with pytest.raises(ConfigError, match=words):
        module.EncoderBench(
            specs(BandSpec, map(sentinel_code, BANDS)), checkpoint=exported[0], normalization="model_native", **options
        )


def test_the_layers_named_for_segmentation_give_maps(bench, exported):
    module, BandSpec = bench
    model = module.EncoderBench(specs(BandSpec, map(sentinel_code, BANDS)), checkpoint=exported[0])
    assert model.segmentation_layers == STAGES
    modules, maps = dict(model.named_modules()), []
    for name in STAGES:
        modules[f"backbone.{name}"].register_forward_hook(lambda _module, _input, output: maps.append(output))
    model(torch.rand(1, 12, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [(40, 32, 32), (80, 16, 16), (160, 8, 8), (320, 4, 4)]


def test_a_multimae_reads_the_sentinel2_domains_that_are_there(bench, multimae):
    module, BandSpec = bench
    folder, model = multimae
    names = ["blue", "green", "red", "red_edge_1", "red_edge_2", "red_edge_3"]
    bands = [*specs(BandSpec, ["elevation"], sensor="dem"), *specs(BandSpec, names)]
    images = torch.rand(2, 7, 16, 16) * 3000
    images[0, 1:4, :8, :8] = torch.nan
    adapter = module.EncoderBench(bands, checkpoint=folder)
    assert adapter.input.bands == ("B4", "B3", "B2", "B5", "B6", "B7")
    values = torch.full((2, 13, 16, 16), torch.nan)
    for position, name in enumerate(("B2", "B3", "B4", "B5", "B6", "B7"), 1):
        values[:, spec_of("sentinel2").bands.index(name)] = (images[:, position] - 1000) / 500
    valid = values.isfinite()
    batch = Batch({"sentinel2": values.nan_to_num(0)}, {"sentinel2": valid}, torch.arange(2), {}, 2)
    with torch.no_grad():
        features = model.encode(batch, ("rgb", "ired"))
    there = features.available["rgb"]
    assert not there[0, 0], "a patch without data"
    for row, vector in enumerate(adapter(images)):
        tokens = (features.patches["rgb"][row][there[row]], features.patches["ired"][row], features.summary[row, None])
        torch.testing.assert_close(vector, torch.cat(tokens).mean(0))
    alone = module.EncoderBench(bands, checkpoint=folder, domains=["rgb"], pooling="global")
    with torch.no_grad():
        torch.testing.assert_close(alone(images), model.encode(batch, ("rgb",)).summary)
    with pytest.raises(ConfigError, match=r"dense heads take maps.*launch/finetune\.py"):
        _ = adapter.segmentation_layers
    with pytest.raises(DatasetError, match="no aster"):
        module.EncoderBench(bands, checkpoint=folder, domains=["depth"])


@pytest.mark.skipif(not GENUINE, reason="needs torchgeo-bench, which needs Python 3.12")
def test_the_genuine_segmentation_probe_trains(exported):
    from torchgeo_bench.datasets.base import BandSpec
    from torchgeo_bench.segmentation_probe import SegmentationProbe

    from mpmae.integrations.torchgeo_bench import EncoderBench

    model = EncoderBench(specs(BandSpec, map(sentinel_code, BANDS)), checkpoint=exported[0])
    probe = SegmentationProbe(model, STAGES, num_classes=3, head_type="fpn", hidden_dim=8)
    assert probe.channels_list == [320, 160, 80, 40]
    logits = probe(torch.rand(2, 12, 32, 32) * 3000)
    assert logits.shape == (2, 3, 32, 32)
    nn.functional.cross_entropy(logits, torch.zeros(2, 32, 32, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in probe.head.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
