"""A set of label maps that follow from the pixels: the class is the brightest of the first three bands."""

import numpy as np

from mpmae.eval.dataset import IGNORED
from tests.eval.bright_bands import BANDS, MemorySet

NAMES = tuple(name for name, _ in BANDS)


def coloured_blocks(num=20, size=(16, 16), block_px=4, seed=0):
    """Images [4, H, W] of blocks of one colour, 3 classes; every 7th pixel has no label. 60 % train, 20 % val and test."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(0, 1000, (num, len(BANDS), *(-(-side // block_px) for side in size)))
    images = blocks.repeat(block_px, 2).repeat(block_px, 3)[:, :, : size[0], : size[1]].astype(np.float32)
    labels = images[:, :3].argmax(1).astype(np.int64)
    labels.reshape(num, -1)[:, ::7] = IGNORED
    ends = num * 6 // 10, num * 8 // 10
    splits = dict(zip(("train", "val", "test"), np.split(np.arange(num), ends), strict=True))
    return MemorySet("segmentation", images, labels, splits, 3)
