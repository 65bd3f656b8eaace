"""Readers and loaders as a configuration asks for them: training, validation, report and benchmarks open theirs here."""

from collections.abc import Sequence

from mpmae.config import RunConfig
from mpmae.loader import Augmentation, CpuLoader, ShardReader
from mpmae.shard_format import Manifest


def open_reader(config: RunConfig, split: str, manifest: Manifest | None = None) -> ShardReader:
    """One split of `data.shards`. Raises ShardError when the set, the split or a shard is absent or has changed."""
    return ShardReader(config.data.shards, split, manifest)


def open_loader(
    config: RunConfig, reader: ShardReader, *, augment: bool, modalities: Sequence[str] | None = None
) -> CpuLoader:
    """A loader of the reader's split; `modalities`: None for the input and all that the model reconstructs.

    augment: with the random changes of `data`, else centre crops without flips. Raises ConfigError when the image does not
    fit the tiles, ShardError when the set lacks a modality.
    """
    data = config.data
    return CpuLoader(
        reader,
        tuple(modalities or dict.fromkeys(("sentinel2", *config.model.modalities_out))),
        config.model.img_size,
        seed=config.train.seed,
        augmentation=Augmentation(hflip=data.hflip, vflip=data.vflip) if augment else Augmentation.none(),
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        reference_quirks=config.model.reference_quirks,
    )
