"""What a case of the loader benchmark is, and what all cases share.

Shapes: B batch size, the rest as in `mpmae.loader.Batch`.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from loader_tiles import Transform

from mpmae.shard_files import load_manifest

SEED = 0


class Loaded(NamedTuple):
    """A batch: rows int64 [B] in the repeated set, values and valid as in `mpmae.loader.Batch`."""

    rows: torch.Tensor
    values: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """What is loaded, and where it is. original: the real tiles, an MMEarth folder. folder: of the cases' files."""

    original: Path
    folder: Path
    repeats: int
    batch_size: int
    img_size_px: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the repeated set."""
        return load_manifest(self.folder / "shards-raw").num_samples("train")

    def transform(self, views: np.ndarray | None) -> Transform:
        """What the peers do with a sample."""
        return Transform(load_manifest(self.folder / "shards-raw"), self.img_size_px, views)


Views = np.ndarray | None  # of `Transform`; ours draw their own, which are those of `epoch_zero_views` in epoch 0
EPOCH_END = None
Batches = Iterator[Loaded | None]
"""Batches epoch after epoch, EPOCH_END between two: a peer starts an epoch anew, which a benchmark's short epochs must not
charge it for."""


@dataclass(frozen=True)
class Case:
    """One loader with its files.

    files: name of their folder, shared by cases that read the same. write: makes it. open: batches with a number of workers.
    needs: modules that must be installed. warm_epochs: whole epochs before anything is measured.
    """

    name: str
    files: str
    write: Callable[[Work, Path], None]
    open: Callable[[Work, Path, int, Views], Batches]
    needs: tuple[str, ...] = ()
    warm_epochs: int = 0

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this project's loaders."""
        return self.name.startswith("mpmae")

    def missing(self) -> list[str]:
        """The modules it needs that are not installed."""
        return [name for name in self.needs if not is_installed(name)]


def is_installed(module: str) -> bool:
    """Whether a module is there; it is not imported, its parents are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def prepare(case: Case, work: Work) -> Path:
    """The folder of the case's files, written unless they are there."""
    folder = work.folder / case.files
    if not folder.is_dir():
        unfinished = folder.with_name(f"{case.files}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        case.write(work, unfinished)
        unfinished.rename(folder)
    return folder
