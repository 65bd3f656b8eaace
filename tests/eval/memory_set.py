"""A labelled set in memory: label maps that follow from the pixels, so that they can be learned.

Shapes: H x W pixels, K classes.
"""

import numpy as np

from mpmae.eval.dataset import IGNORED, StoredBand, Task

NAMES = ("B4", "B3", "B2")


class MemorySet:
    """Images [3, H, W] of blocks of one colour; a pixel's class is its largest band. Every 7th pixel has no label."""

    def __init__(self, num=20, size=(16, 16), seed=0, block_px=4):
        rng = np.random.default_rng(seed)
        blocks = rng.uniform(0, 1000, (num, 3, -(-size[0] // block_px), -(-size[1] // block_px)))
        self.images = blocks.repeat(block_px, 2).repeat(block_px, 3)[:, :, : size[0], : size[1]].astype(np.float32)
        self.labels = self.images.argmax(1).astype(np.int64)
        self.labels.reshape(num, -1)[:, ::7] = IGNORED
        wavelengths = (0.665, 0.56, 0.49)
        bands = tuple(StoredBand(n, w, 500.0, 288.0) for n, w in zip(NAMES, wavelengths, strict=True))
        self.task = Task("colours", "segmentation", ("red", "green", "blue"), bands, "miou")
        cut = num * 6 // 10, num * 8 // 10
        self.splits = {
            "train": np.arange(cut[0]),
            "val": np.arange(*cut),
            "test": np.arange(cut[1], num),
        }

    def __len__(self):
        return len(self.images)

    def sample_id(self, index):
        return f"sample-{index}"

    def image(self, index):
        return self.images[index]

    def label(self, index):
        return self.labels[index]

    def location(self, index):
        return None
