"""A labelled set in memory of several modalities whose classes show in one of them, and a small MultiMAE to read it."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from mpmae.eval.bands import SENTINEL2_UM
from mpmae.eval.dataset import StoredBand, Task
from mpmae.modalities import spec_of
from tests.models.multimae.small import build

COLOURS = ("B4", "B3", "B2")
SIDE = 16
CODES = np.array([land_class.code for land_class in spec_of("esa_worldcover").classes])
METRIC = {"multiclass": "accuracy", "multilabel": "map_macro", "segmentation": "miou"}
S2_BANDS = ["B4", "B3", "B2", "B5", "B6", "B7", "B11", "B12", "B8A", "B8"]
TABLES = {
    "sentinel2_l2a": {"bands": S2_BANDS, "mean": [1000.0 - 10 * i for i in range(10)], "std": [100.0] * 10},
    "aster": {"bands": ["elevation"], "mean": [300.0], "std": [200.0]},
}


class MemorySet:
    """See `mpmae.eval.dataset.LabelledSet`: B4, B3, B2, elevation, esa_worldcover."""

    def __init__(self, images, labels, splits, kind, num_classes):
        names = (*COLOURS, "elevation", "esa_worldcover")
        spread = [(float(np.nanmean(images[:, i])), float(np.nanstd(images[:, i]))) for i in range(len(names))]
        bands = [StoredBand(name, SENTINEL2_UM.get(name), *pair) for name, pair in zip(names, spread, strict=True)]
        classes = tuple(f"class {i}" for i in range(num_classes))
        self.task = Task(f"{kind} in one modality", kind, classes, tuple(bands), METRIC[kind], "l2a")
        self.splits, self._images, self._labels = splits, images, labels

    def __len__(self):
        return len(self._images)

    def sample_id(self, index):
        return f"sample-{index}"

    def image(self, index):
        return self._images[index].copy()

    def label(self, index):
        return self._labels[index]

    def location(self, index):
        return None


def hidden_in(modality, kind="multiclass", sizes=(32, 16, 16), side=SIDE, seed=0):
    """Two classes told apart by `modality` alone: "elevation" rises along rows or columns; "colour": B4 is bright or dark;
    "land cover": trees or water.

    kind "segmentation": of each block of 8 px, by "colour".
    """
    rng, num = np.random.default_rng(seed), sum(sizes)
    labels = np.arange(num) % 2
    if kind == "segmentation":
        labels = rng.integers(0, 2, (num, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
    images = rng.normal(1000, 100, (num, 5, side, side)).astype(np.float32)
    slope = np.linspace(0, 100, side, dtype=np.float32)
    images[:, 3] = 500 + rng.normal(0, 5, (num, side, side))
    cover = rng.integers(0, len(CODES), (num, side, side))
    if modality == "elevation":
        images[:, 3] += np.where(labels[:, None, None], slope[:, None], slope[None, :])
    elif modality == "colour":
        images[:, 0] += 400 * (labels if labels.ndim == 3 else labels[:, None, None])
    else:
        cover[:] = np.where(labels, 7, 0)[:, None, None]
    images[:, 4] = CODES[cover]
    splits = dict(zip(("train", "val", "test"), np.split(np.arange(num), np.cumsum(sizes)[:-1]), strict=True))
    return MemorySet(images, labels, splits, kind, 2)


def write_checkpoint(folder, dtype=torch.float32, **options):
    """A small MultiMAE's weights with what stands beside them; the model."""
    model = build(dtype, **options)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    beside = {"domains_in": list(model.domains_in), "img_size": model.img_size, "statistics": TABLES}
    (folder / "config.json").write_text(json.dumps(beside))
    return model.eval()
