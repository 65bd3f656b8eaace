"""A labelled set in memory whose answer is known: classes told apart by a band ratio, by texture, or by both."""

import numpy as np

from mpmae.eval.dataset import StoredBand, Task

BANDS = (("B2", 0.49), ("B3", 0.56), ("B4", 0.665), ("B8", 0.842))
SIDE = 16
CLASS_NAMES = ("dark smooth", "dark rough", "bright smooth", "bright rough")


class MemorySet:
    """Images [N, 4, 16, 16] with labels; class c has a bright B8 for c >= 2, and a checkerboard for odd c.

    The checkerboard leaves every pixel statistic of a noisy image as it is. kind "multilabel" has both as labels.
    """

    def __init__(self, num_per_class: int = 12, kind: str = "multiclass", seed: int = 0):
        rng = np.random.default_rng(seed)
        classes = np.tile(np.arange(4), num_per_class)
        self.images = np.stack([_image(int(c), rng) for c in classes])
        self.labels = classes if kind == "multiclass" else np.stack([classes >= 2, classes % 2 == 1], 1)
        names = CLASS_NAMES if kind == "multiclass" else ("bright", "rough")
        bands = tuple(
            StoredBand(name, wavelength, float(values.mean()), float(values.std()))
            for (name, wavelength), values in zip(BANDS, self.images.swapaxes(0, 1), strict=True)
        )
        metric = "accuracy" if kind == "multiclass" else "f1_macro"
        self.task = Task("memory", kind, names, bands, metric)
        part = np.arange(len(classes)) // 4 % 4
        self.splits = {
            "train": np.flatnonzero(part < 2),
            "val": np.flatnonzero(part == 2),
            "test": np.flatnonzero(part == 3),
        }
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def sample_id(self, index: int) -> str:
        return f"image-{index}"

    def image(self, index: int) -> np.ndarray:
        self.num_reads += 1
        return self.images[index]

    def label(self, index: int) -> np.ndarray:
        return self.labels[index]

    def location(self, index: int) -> None:
        return None


def _image(label: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels of two values in equal numbers, in a checkerboard or in random order, so that only their places differ."""
    rows, columns = np.indices((SIDE, SIDE))
    board = ((rows + columns) % 2).ravel()
    pattern = board if label % 2 else rng.permutation(board)
    base = 1000 + 200 * pattern.reshape(SIDE, SIDE) + rng.normal(0, 20, (len(BANDS), SIDE, SIDE))
    base[3] *= 2 if label >= 2 else 1
    return base.astype(np.float32)
