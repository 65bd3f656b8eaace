"""Tiles from whatever lies at a path or URL."""

from collections.abc import Sequence
from pathlib import Path

from mpmae.embed.labelled_tiles import LabelledTiles
from mpmae.embed.shard_tiles import ShardTiles
from mpmae.embed.source import TileSource
from mpmae.eval.config import DatasetSection, ImageSection
from mpmae.eval.encoder_input import EncoderInput
from mpmae.remote_store import is_remote, without_scheme
from mpmae.shard_format import MANIFEST_NAME


def open_source(
    where: str | Path,
    encoder_input: EncoderInput,
    image: ImageSection | None = None,
    *,
    dataset: DatasetSection | None = None,
    splits: Sequence[str] = (),
    max_samples: int | None = None,
) -> TileSource:
    """The tiles of a shard set (folder or URL) or of a labelled set, prepared for an encoder with this input.

    dataset: how to read a labelled set, its path aside. splits: names, or empty for all. max_samples: so many tiles, evenly
    spread. Raises ShardError, DatasetError and ConfigError.
    """
    image = image or ImageSection()
    if not is_shard_set(where):
        path = Path(without_scheme(str(where)))
        section = (dataset or DatasetSection()).model_copy(update={"path": path})
        return LabelledTiles(section, encoder_input, image, splits, max_samples)
    return ShardTiles(where, encoder_input, image, splits, max_samples)


def is_shard_set(where: str | Path) -> bool:
    """Whether this is a URL or a folder with a shard set's manifest."""
    return is_remote(where) or (Path(without_scheme(str(where))) / MANIFEST_NAME).is_file()
