"""A shard set behind a URL: whole shards are fetched into a bounded cache on a local disk and read from there."""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpmae.errors import ConfigError
from mpmae.loader.open_files import MAX_OPEN_FILES, Descriptors
from mpmae.loader.prefetch import Fetch, Prefetcher
from mpmae.loader.shard_cache import DEFAULT_MAX_BYTES, ShardCache, default_cache_dir
from mpmae.remote_store import RemoteStore
from mpmae.retries import RemoteStatistics, Retries
from mpmae.shard_files import parse_index, parse_manifest
from mpmae.shard_format import MANIFEST_NAME, Manifest, ShardEntry, index_name

_LOG = logging.getLogger(__name__)
TOUCH_S = 3.0
NUM_INDEX_THREADS = 8


class RemoteFolder:
    """A shard set's folder in a store; see `mpmae.loader.folder.ShardFolder`.

    The manifest is read afresh each time, for it says which bytes are the current ones; indices and shards are cached by
    their hashes. Whether a shard is there and whole shows when it arrives: asking for thousands of sizes first would take
    minutes. All readers made from one folder share its cache and `statistics`. Raises ConfigError for a URL, options or a
    cache that cannot be used.
    """

    def __init__(
        self,
        url: str,
        cache_dir: Path | None = None,
        max_bytes: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        retries: Retries | None = None,
    ):
        self.statistics = RemoteStatistics()
        self._store = RemoteStore(url, storage_options, retries, self.statistics)
        max_bytes = DEFAULT_MAX_BYTES if max_bytes is None else max_bytes
        self._cache = ShardCache(cache_dir or default_cache_dir(), max_bytes, self.statistics)

    def __str__(self):
        return str(self._store)

    def __truediv__(self, name: str) -> str:
        return self._store.at(name)

    @property
    def check_hint(self) -> str:
        """What to do about bytes that do not decode."""
        return f"remove the shard cache {self._cache.folder}; if it happens again, verify the set where it was built"

    def manifest(self) -> Manifest:
        """The set's manifest; ShardError when it cannot be had."""
        return parse_manifest(self._store.read(MANIFEST_NAME), self / MANIFEST_NAME)

    def indices(self, manifest: Manifest, shards: Sequence[ShardEntry]) -> list[np.ndarray]:
        """The index rows of each shard; ShardError when one cannot be had or does not fit the manifest."""
        with ThreadPoolExecutor(NUM_INDEX_THREADS, thread_name_prefix="index") as pool:
            return list(pool.map(partial(self._index, manifest), shards))

    def _index(self, manifest: Manifest, shard: ShardEntry) -> np.ndarray:
        name, key = index_name(shard.name), shard.index_sha256
        data = self._cache.read(key)
        if data is None:
            data = self._store.read(name, key)
            self._cache.add(key, data)
        return parse_index(data, self / name, manifest, shard)

    def files(self, shards: Sequence[ShardEntry]) -> "CachedFiles":
        """The shards' bytes. Raises ConfigError when one is larger than the cache."""
        largest = max(shards, key=lambda shard: shard.num_bytes, default=None)
        if largest is not None and largest.num_bytes > self._cache.max_bytes:
            raise ConfigError(self._cache.too_small_for(self / largest.name, largest.num_bytes))
        total = sum(shard.num_bytes for shard in shards)
        if total > self._cache.max_bytes:
            _LOG.warning(
                "%s: %d shards have %.1f GiB, their cache may hold %.1f GiB: every epoch downloads them again, and an "
                "`exact` order each of them many times; raise data.cache_size_gb or read in `window` order",
                self,
                len(shards),
                total / 2**30,
                self._cache.max_bytes / 2**30,
            )
        return CachedFiles(self._store, self._cache, shards, self.statistics)


class CachedFiles:
    """The shards of a remote set, as a `ShardReader` reads them: a read of an absent shard waits for its download."""

    def __init__(
        self,
        store: RemoteStore,
        cache: ShardCache,
        shards: Sequence[ShardEntry],
        statistics: RemoteStatistics,
        max_open: int = MAX_OPEN_FILES,
    ):
        self._store, self._cache, self._shards, self._statistics = store, cache, shards, statistics
        self._descriptors = Descriptors(self._open, max_open)
        self._prefetcher = Prefetcher(self._reserve)
        self._touched_s: dict[int, float] = {}
        self._tidied_s = time.monotonic()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes of the `number`-th shard from `offset` on. Raises ShardError, OSError."""
        self._statistics.add(num_reads=1)
        now_s = time.monotonic()
        if now_s > self._tidied_s + TOUCH_S:
            self._tidied_s = now_s
            self._descriptors.close_unlinked()
        if now_s > self._touched_s.get(number, 0.0) + TOUCH_S:
            self._touched_s[number] = now_s
            with self._descriptors.descriptor(number) as descriptor:
                self._cache.touch(descriptor)
        return self._descriptors.read(number, size, offset)

    def _open(self, number: int) -> int:
        shard = self._shards[number]
        descriptor = self._cache.open_cached(shard.sha256, shard.num_bytes)
        if descriptor is not None:
            return descriptor
        started_s = time.monotonic()
        fill = partial(self._download, shard, threading.Event())
        try:
            # A download by another process ends, well or not, within the limit too; one more may follow it.
            patience_s = 2 * self._store.limit_s(shard.num_bytes)
            return self._cache.open(shard.sha256, shard.num_bytes, fill, patience_s=patience_s)
        finally:
            self._statistics.add(num_misses=1, wait_s=time.monotonic() - started_s)

    def _download(self, shard: ShardEntry, stop: threading.Event, file) -> None:
        self._store.download(shard.name, shard.num_bytes, shard.sha256, file, stop)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch these shards in the background, in the order of need; an earlier request's rest is forgotten.

        Name those in use now, too: what is there counts as used now, and room is made only of files last used before that.
        When no such room is left, the rest waits for the reads that need it.
        """
        requested_ns = time.time_ns()
        absent = []
        for number in numbers:
            descriptor = self._cache.open_cached(self._shards[number].sha256, self._shards[number].num_bytes)
            if descriptor is None:
                absent.append(number)
            else:
                os.close(descriptor)
        self._prefetcher.request(absent, requested_ns)

    def _reserve(self, number: int, requested_ns: int) -> Fetch | None:
        shard = self._shards[number]
        get = self._cache.reserve(shard.sha256, shard.num_bytes, unused_since_ns=requested_ns)
        return None if get is None else lambda stop: get(partial(self._download, shard, stop))

    def close(self) -> None:
        """Stop fetching ahead and close the shards."""
        self._prefetcher.close()
        self._descriptors.close()
