"""Where a shard set lies: a local folder, or a folder of a store behind a URL."""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpmae.errors import ShardError
from mpmae.loader.open_files import OpenFiles
from mpmae.remote_store import is_remote, without_scheme
from mpmae.retries import RemoteStatistics
from mpmae.shard_files import load_index, load_manifest
from mpmae.shard_format import Manifest, ShardEntry, index_name


class ShardFiles(Protocol):
    """The bytes of numbered shards, read from many threads."""

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes of the `number`-th shard from `offset` on, fewer at its end. Raises OSError or ShardError."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Get these shards ready ahead of their use; those in use now are named, too."""

    def close(self) -> None:
        """Close the shards."""


class ShardFolder(Protocol):
    """What a reader needs of the place of a shard set; `folder / name` and `str(folder)` are for messages."""

    statistics: RemoteStatistics | None

    def __truediv__(self, name: str) -> Path | str: ...

    @property
    def check_hint(self) -> str:
        """What to do about bytes that do not decode."""

    def manifest(self) -> Manifest:
        """The set's manifest; ShardError when it cannot be had."""

    def indices(self, manifest: Manifest, shards: Sequence[ShardEntry]) -> list[np.ndarray]:
        """The index rows of each shard (`manifest.index_dtype`); ShardError when one cannot be had or does not fit."""

    def files(self, shards: Sequence[ShardEntry]) -> ShardFiles:
        """The shards' bytes. Raises ShardError or ConfigError when they cannot be read."""


class LocalFolder:
    """A shard set's folder on this machine."""

    statistics = None

    def __init__(self, path: Path):
        self._path = path

    def __str__(self):
        return str(self._path)

    def __truediv__(self, name: str) -> Path:
        return self._path / name

    @property
    def check_hint(self) -> str:
        """What to do about bytes that do not decode."""
        return f"run `mpmae-shards verify {self._path}`"

    def manifest(self) -> Manifest:
        """The set's manifest; ShardError when it cannot be had."""
        return load_manifest(self._path)

    def indices(self, manifest: Manifest, shards: Sequence[ShardEntry]) -> list[np.ndarray]:
        """The index rows of each shard; ShardError when one is absent or does not fit the manifest."""
        return [load_index(self / index_name(shard.name), manifest, shard) for shard in shards]

    def files(self, shards: Sequence[ShardEntry]) -> OpenFiles:
        """The shards' bytes. Raises ShardError when a shard is absent or its size differs from the manifest."""
        problems = [problem for shard in shards if (problem := self._problem(shard))]
        if problems:
            raise ShardError(problems)
        return OpenFiles([self / shard.name for shard in shards])

    def _problem(self, shard: ShardEntry) -> str:
        path = self / shard.name
        try:
            status = path.stat()
        except FileNotFoundError:
            return f"{path} is missing, though the manifest lists it; restore it or rebuild the set"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error}); check the disk and the permissions"
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a file, though the manifest lists it; restore it or rebuild the set"
        if status.st_size != shard.num_bytes:
            return f"{path} has {status.st_size} bytes, the manifest says {shard.num_bytes}; restore it or rebuild the set"
        return ""


def shard_folder(
    where: str | Path,
    cache_dir: Path | None = None,
    max_bytes: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ShardFolder:
    """The folder at a path or URL (s3://, gs://, http(s)://, memory://, ...; file:// is a path).

    For URLs only: cache_dir (default: `MPMAE_CACHE_DIR`, or the user's cache folder), max_bytes of it (default: 64 GiB),
    storage_options of fsspec's filesystem. Raises ConfigError when these cannot be used.
    """
    if not is_remote(where):
        return LocalFolder(Path(without_scheme(str(where))))
    from mpmae.loader.remote import RemoteFolder  # POSIX only, and local sets need none of it

    return RemoteFolder(str(where), cache_dir, max_bytes, storage_options)
