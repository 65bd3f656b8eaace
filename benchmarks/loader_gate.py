"""Whether a case's batch is what it must be: the cpu loader's of the same tiles with the same crops and flips."""

from typing import Any

import numpy as np
from loader_tiles import epoch_zero_views
from loader_work import SEED, Work

from mpmae.loader import CpuLoader, ShardReader
from mpmae.modalities import TARGETS

ULPS = 2


def gate_views(work: Work) -> np.ndarray:
    """By row, what our loaders draw in epoch 0, for the peers to use too: int64 [num_tiles, 4], top, left, hflip, vflip."""
    reader = ShardReader(work.folder / "shards-raw", "train")
    views = epoch_zero_views(SEED, len(reader), reader.manifest.tile_size_px, work.img_size_px)
    by_row = np.empty_like(views)
    by_row[reader.index["row"].astype(np.int64)] = views
    return by_row


def gate_problems(found: dict[str, Any], work: Work) -> list[str]:
    """What is not as in the cpu loader's batch of the same tiles and views: class ids and flags exactly, floats to 2 ulp."""
    reader = ShardReader(work.folder / "shards-raw", "train")
    sample_of_row = np.argsort(reader.index["row"])
    loader = CpuLoader(reader, TARGETS, work.img_size_px, seed=SEED)
    expected = loader.batch_of(sample_of_row[found["rows"].cpu().numpy()])
    problems = [f"{len(found['rows'])} tiles of {work.batch_size}"] if len(found["rows"]) != work.batch_size else []
    for part, ours in (("values", expected.values), ("valid", expected.valid)):
        for name in TARGETS:
            got, want = found[part][name].cpu(), ours[name]
            if got.shape != want.shape or got.dtype != want.dtype:
                problems.append(
                    f"{part} of {name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
                )
                continue
            spacing = np.spacing(np.abs(want.numpy())) if want.is_floating_point() else 0
            difference = np.abs(np.subtract(got.numpy(), want.numpy(), dtype=np.float64))
            wrong = ~(difference <= ULPS * spacing)  # a NaN is wrong too
            if wrong.any():
                problems.append(f"{part} of {name}: {wrong.sum()} of {wrong.size} differ")
    return problems
