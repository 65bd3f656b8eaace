"""Tiles from whatever lies at a path or URL, and the encoder that can read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpmae.domains import domain_of
from mpmae.embed.labelled_tiles import LabelledTiles
from mpmae.embed.shard_tiles import ShardTiles
from mpmae.embed.source import TileSource
from mpmae.errors import ShardError
from mpmae.eval.config import DatasetSection, EncoderSection, ImageSection
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.encoders import ImageEncoder, build_encoder
from mpmae.eval.open_set import open_set
from mpmae.loader import shard_folder
from mpmae.loader.folder import ShardFolder
from mpmae.models.interop import Weights
from mpmae.remote_store import is_remote, without_scheme
from mpmae.shard_format import MANIFEST_NAME, Manifest


@dataclass(frozen=True)
class StoredShards:
    """A shard set, opened."""

    folder: ShardFolder
    manifest: Manifest

    def encoder(self, section: EncoderSection, weights: Weights) -> ImageEncoder:
        """The encoder of `weights`; of a MultiMAE by `section.domains`, else by all input domains that the set has."""
        if weights.family == "multimae" and section.domains is None:
            section = section.model_copy(update={"domains": self._domains(weights)})
        return build_encoder(section, weights)

    def tiles(
        self, encoder_input: EncoderInput, image: ImageSection, splits: Sequence[str] = (), max_samples: int | None = None
    ) -> TileSource:
        """See `open_source`."""
        return ShardTiles(self.folder, self.manifest, encoder_input, image, splits, max_samples)

    def _domains(self, weights: Weights) -> tuple[str, ...]:
        stored = {entry.name: entry.bands for entry in self.manifest.pixels}
        wanted = [domain_of(name) for name in weights.domains_in]
        there = [d for d in wanted if d.modality in stored and set(d.bands) <= set(stored[d.modality])]
        if not there:
            lacking = ", ".join(f"{d.name} ({' '.join((d.modality, *d.bands))})" for d in wanted)
            raise ShardError(
                f"shard set {self.folder}: none of the input domains of {weights.source} is there: {lacking}; it has "
                f"{', '.join(stored)}"
            )
        return tuple(domain.name for domain in there)


@dataclass(frozen=True)
class StoredImages:
    """A labelled set, opened."""

    path: Path
    labelled: LabelledSet

    def encoder(self, section: EncoderSection, weights: Weights) -> ImageEncoder:
        """The encoder of `weights`; of a MultiMAE by `section.domains`, else by all input domains that the set has."""
        return build_encoder(section, weights, task=self.labelled.task)

    def tiles(
        self, encoder_input: EncoderInput, image: ImageSection, splits: Sequence[str] = (), max_samples: int | None = None
    ) -> TileSource:
        """See `open_source`."""
        return LabelledTiles(self.labelled, self.path, encoder_input, image, splits, max_samples)


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
    return open_stored(where, dataset).tiles(encoder_input, image or ImageSection(), splits, max_samples)


def open_stored(where: str | Path, dataset: DatasetSection | None = None) -> StoredShards | StoredImages:
    """What `open_source` reads, before it is prepared for an encoder. Raises ShardError and DatasetError."""
    if is_shard_set(where):
        folder = shard_folder(where)
        return StoredShards(folder, folder.manifest())
    path = Path(without_scheme(str(where)))
    # Folds ask for no splits and for no class in every split, and neither matters here.
    section = (dataset or DatasetSection()).model_copy(update={"path": path, "num_folds": 2})
    return StoredImages(path, open_set(section))


def is_shard_set(where: str | Path) -> bool:
    """Whether this is a URL or a folder with a shard set's manifest."""
    return is_remote(where) or (Path(without_scheme(str(where))) / MANIFEST_NAME).is_file()
