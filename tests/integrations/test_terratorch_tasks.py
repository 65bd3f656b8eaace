"""The configurations in configs/eval/terratorch through TerraTorch's own command line. Run by `make test-eo`."""

import sys

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("terratorch", reason="needs terratorch: make test-eo")

import rasterio
from terratorch.cli_tools import build_lightning_cli

from mpmae import create_encoder
from mpmae.export import export

SIDE_PX = 32


def write_tiff(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"height": SIDE_PX, "width": SIDE_PX, "count": len(values), "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **options) as file:
        file.write(values)


@pytest.fixture
def workplace(checkpoint, tmp_path, monkeypatch):
    """A folder with data and an exported encoder, as the working folder: a class is where the red band is bright."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 8), ("val", 4), ("test", 4)):
        for i in range(num):
            image = rng.integers(0, 3000, (12, SIDE_PX, SIDE_PX)).astype(np.uint16)
            label = np.repeat(np.repeat(rng.integers(0, 2, (2, 2)), SIDE_PX // 2, 0), SIDE_PX // 2, 1)
            image[3] += (4000 * label).astype(np.uint16)
            write_tiff(tmp_path / "maps" / split / f"tile{i}_image.tif", image)
            write_tiff(tmp_path / "maps" / split / f"tile{i}_label.tif", label[None].astype(np.int16))
            image[3] += 4000 * (i % 2)
            write_tiff(tmp_path / "classes" / split / ("dark", "bright")[i % 2] / f"tile{i}.tif", image)
    export(checkpoint, "hub", tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "data"), [("segmentation", "maps"), ("classification", "classes")])
def test_a_configuration_fits_and_tests(name, data, workplace, repo, monkeypatch):
    config = yaml.safe_load((repo / "configs" / "eval" / "terratorch" / f"{name}.yaml").read_text())
    config["custom_modules_path"] = str(repo / config["custom_modules_path"])
    config["trainer"] |= {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
    given = config["data"]["init_args"]
    given |= {"num_workers": 0, "batch_size": 4, "means": [1500.0] * 12, "stds": [900.0] * 12}
    given |= {key: value.replace("data/", f"{data}/") for key, value in given.items() if key.endswith("_root")}
    (workplace / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli = build_lightning_cli(["fit", "--config", "config.yaml"])
    encoder = cli.model.model.encoder.encoder
    assert type(encoder).__module__ == "mpmae.models.dense"
    begun = create_encoder("convnextv2_atto", checkpoint=workplace / "exported").stem.conv.weight
    assert 0 < (encoder.stem.conv.weight - begun).abs().max() < 0.01  # from the checkpoint's weights, a few steps of 1e-4 on
    (saved, *_) = workplace.glob("runs/terratorch/**/*.ckpt")
    cli = build_lightning_cli(["test", "--config", "config.yaml", "--ckpt_path", str(saved)])
    results = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert 0 <= results[{"segmentation": "test/mIoU", "classification": "test/Accuracy"}[name]] <= 1
    assert torch.isfinite(torch.tensor(list(results.values()))).all()
