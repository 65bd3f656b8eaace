"""A small encoder, and tiles that are made up."""

from pathlib import Path

import numpy as np
import torch

from mpmae.embed.run import Done, embed
from mpmae.embed.source import UNKNOWN, ClassColumn, Tiles
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.encoders import ImageEncoder
from mpmae.models import ConvNeXtV2

BANDS = ("B2", "B3", "B4")


def small_encoder(seed: int = 0, bands: tuple[str, ...] = BANDS, statistics: dict | None = None) -> ImageEncoder:
    torch.manual_seed(seed)
    backbone = ConvNeXtV2((4, 4, 8, 8), (1, 1, 1, 1), in_chans=len(bands), patch_size=8)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ImageEncoder(backbone.eval(), EncoderInput(bands, 8, statistics or {}), f"small {seed}")


class MadeTiles:
    """Ten tiles, two splits. Every third has no known place, the fourth no data; two classes of columns."""

    def __init__(self, num: int = 10, seed: int = 1):
        rng = np.random.default_rng(seed)
        self.images = torch.from_numpy(rng.normal(size=(num, 1, 3, 16, 16)).astype(np.float32))
        self.images[3:4] = 0
        self.places = rng.uniform((-90, -180), (90, 180), (num, 2))
        self.places[::3] = np.nan
        self.classes = rng.integers(UNKNOWN, 3, num)
        self.several = rng.integers(0, 2, (num, 2)) > 0
        self.title, self.fingerprint, self.facts = "made", f"made {num} {seed}", {"image": "as it is"}
        self.columns = (
            ClassColumn("cover", "Cover, most frequent", ("wood", "sea", "<ice>"), ("#00ff00", "#0000ff", "#eeeeee")),
            ClassColumn("labels", "Labels", ("a", "b"), several=True),
        )
        self.num_tiles = {"train": num - num // 3, "val": num // 3}
        self.num_closed = 0

    def __len__(self) -> int:
        return len(self.images)

    def read(self, positions: np.ndarray) -> Tiles:
        first_val = self.num_tiles["train"]
        return Tiles(
            ids=[f"tile {i}" for i in positions],
            splits=["train" if i < first_val else "val" for i in positions],
            product_levels=["l2a" if i % 2 else None for i in positions.tolist()],
            locations=self.places[positions],
            images=self.images[positions],
            valid_fraction=np.where(positions == 3, 0, 1).astype(np.float32),
            classes={"cover": self.classes[positions], "labels": self.several[positions]},
        )

    def prefetch(self, positions: np.ndarray) -> None:
        assert len(positions)

    def close(self) -> None:
        self.num_closed += 1


def run(folder: Path, source: MadeTiles | None = None, encoder: ImageEncoder | None = None, **options) -> Done:
    options = {"batch_size": 2, "tiles_per_part": 4, "num_workers": 1} | options
    return embed(encoder or small_encoder(), MadeTiles() if source is None else source, folder, **options)
