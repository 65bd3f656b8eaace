"""Readers and loaders as a configuration asks for them: training, validation, report and benchmarks open theirs here."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mpmae.config import RunConfig
from mpmae.errors import ConfigError
from mpmae.loader import Augmentation, Batch, BatchPlan, CpuLoader, ShardReader, TrainOrder
from mpmae.loader.folder import ShardFolder, shard_folder
from mpmae.loader.tiers import HostTier, num_fitting

_LOG = logging.getLogger(__name__)


class Loader(Protocol):
    """What a run needs of a loader; as in `CpuLoader`."""

    reader: ShardReader

    def training(self, order: TrainOrder, plan: BatchPlan, rank: int, start_step: int) -> Iterator[tuple[int, Batch]]:
        """(epoch, micro batch) from a step on, without end."""
        ...

    def evaluation(
        self, batch_size: int, rank: int, world_size: int, max_samples: int | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """(0, batch) over the split once."""
        ...

    def batch_of(self, sample_ids: np.ndarray) -> Batch:
        """The given samples as one batch."""
        ...


def open_folder(config: RunConfig) -> ShardFolder:
    """Where `data.shards` lies, with its cache when that is a URL. Raises ConfigError for what cannot be used."""
    data = config.data
    return shard_folder(data.shards, data.cache_dir, num_bytes(data.cache_size_gb), data.storage_options)


def num_bytes(gigabytes: float | None) -> int | None:
    """Bytes of so many GB, of 10^9 bytes each."""
    return None if gigabytes is None else round(gigabytes * 1e9)


def open_reader(config: RunConfig, split: str) -> ShardReader:
    """One split of `data.shards`. Raises ShardError when the set, the split or a shard is absent or has changed."""
    return ShardReader(open_folder(config), split)


def cpu_loader(
    config: RunConfig, reader: ShardReader, *, training: bool, modalities: Sequence[str] | None = None
) -> CpuLoader:
    """Batches of the reader's split on the host; `modalities`: None for the input and all that the model reconstructs.

    training: with the random changes of `data`, else centre crops without flips. Raises ConfigError when the image does not
    fit the tiles, ShardError when the set lacks a modality.
    """
    return CpuLoader(reader, modalities or config.model.modalities, **_settings(config, training))


def open_loader(config: RunConfig, reader: ShardReader, *, training: bool) -> Loader:
    """Batches of the reader's split from `data.loader`: on the GPU for dali where there is one, else on the host.

    training: as in `cpu_loader`, and with the cache tiers. Raises ConfigError and ShardError as that does, and ConfigError
    when DALI is not installed or a device cache has no device.
    """
    data = config.data
    if training and data.host_cache_gb:
        reader = _with_host_tier(reader, num_bytes(data.host_cache_gb), num_bytes(data.device_cache_gb))
    if data.loader == "cpu":
        return cpu_loader(config, reader, training=training)
    from mpmae.loader.dali import DaliLoader  # an optional dependency

    device_id = torch.cuda.current_device() if torch.cuda.is_available() else None
    if data.device_cache_gb and device_id is None:
        raise ConfigError(f"data.device_cache_gb = {data.device_cache_gb}: there is no GPU here; set it to 0")
    budget_bytes = num_bytes(data.device_cache_gb) if training else 0
    options = {"device_id": device_id, "device_budget_bytes": budget_bytes}
    return DaliLoader(reader, config.model.modalities, **_settings(config, training), **options)


def _with_host_tier(reader: ShardReader, budget_bytes: int, device_budget_bytes: int) -> HostTier:
    """The reader with a tier for what the device tier above it does not keep."""
    ids = np.arange(num_fitting(reader.index, device_budget_bytes), len(reader))
    tier = HostTier(reader, budget_bytes, ids)
    if tier.report.num_kept < tier.report.num_samples:
        _LOG.warning("%s", tier.report)
    return tier


def _settings(config: RunConfig, training: bool) -> dict[str, Any]:
    """What every loader takes."""
    data = config.data
    return {
        "img_size_px": config.model.img_size,
        "seed": config.train.seed,
        "augmentation": Augmentation(hflip=data.hflip, vflip=data.vflip) if training else Augmentation.none(),
        "num_workers": data.num_workers,
        "prefetch": data.prefetch,
        "reference_quirks": config.model.loader_quirks,
    }
