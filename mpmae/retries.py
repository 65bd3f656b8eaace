"""Trying again within bounds: which failures of a store pass, how long to pause, when to give up."""

import logging
import random
import threading
import time
from dataclasses import dataclass

from mpmae.errors import ShardError

_LOG = logging.getLogger(__name__)

# Errors that the next attempt would meet again: what is not there or not allowed, and calls that no store understands.
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    NotImplementedError,
    ImportError,
)
_LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError")  # botocore's, which may not be installed
_PASSING_STATUS = (408, 425, 429)  # of HTTP's 4xx: request timeout, too early, too many requests


class WrongBytesError(Exception):
    """What arrived, or its size, is not what the manifest says."""


class StoppedError(Exception):
    """A fetch was called off."""


@dataclass(frozen=True)
class Retries:
    """How long a fetch keeps trying.

    max_failures: in a row, without a new byte between them. timeout_s: longest silence of the store within an attempt.
    Pauses double from `first_pause_s` to `longest_pause_s`, each times a random factor in 0.5-1.5, so that ranks do not come
    back all at once. min_bytes_per_s: a store slower than this on the whole counts as broken.
    """

    max_failures: int = 6
    timeout_s: float = 30.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 20.0
    min_bytes_per_s: float = 256 * 1024

    def silence_s(self, num_bytes: int = 0) -> float:
        """The longest that one request of `num_bytes` may take when nothing is seen of it until its end."""
        return self.timeout_s + num_bytes / self.min_bytes_per_s

    def limit_s(self, num_bytes: int) -> float:
        """The longest that a fetch may take, with all its attempts and pauses."""
        return self.max_failures * (self.timeout_s + self.longest_pause_s) + num_bytes / self.min_bytes_per_s

    def pause_s(self, num_failures: int) -> float:
        """The pause after the `num_failures`-th failure in a row."""
        # Its own generator: the run's seeded one stays as it is.
        factor = random.SystemRandom().uniform(0.5, 1.5)
        return min(self.longest_pause_s, self.first_pause_s * 2 ** (num_failures - 1)) * factor


class RemoteStatistics:
    """Counts of one process's remote reading: what the step log and benchmarks show.

    num_reads: ranges read. num_misses: those that had to wait until their shard was there. wait_s: how long, over all
    threads. bytes_downloaded: bytes that arrived, those of broken attempts too. num_retries: attempts after the first.
    num_downloads: shards and indices put into the cache by this process. num_evictions: files this process removed from it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.num_reads = self.num_misses = self.num_retries = self.num_downloads = self.num_evictions = 0
        self.bytes_downloaded = 0
        self.wait_s = 0.0

    def add(self, **counts: float) -> None:
        """Add to the fields named."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    @property
    def num_hits(self) -> int:
        """Reads that did not wait for a download."""
        return self.num_reads - self.num_misses

    def __str__(self):
        return (
            f"{self.num_hits} hits, {self.num_misses} misses, {self.bytes_downloaded / 2**20:.1f} MiB downloaded, "
            f"{self.num_retries} retries, {self.num_evictions} evictions, waited {self.wait_s:.1f} s"
        )


class Attempts:
    """The failures of one fetch. `failed` pauses, or raises ShardError when trying again has no prospect."""

    def __init__(self, url: str, num_bytes: int, retries: Retries, statistics: RemoteStatistics, stop: threading.Event):
        self._url, self._retries, self._statistics, self._stop = url, retries, statistics, stop
        self._limit_s = retries.limit_s(num_bytes)
        self._started = time.monotonic()
        self._num_attempts = self._num_in_row = self._num_wrong = 0

    @property
    def left_s(self) -> float:
        """Seconds until the fetch as a whole has taken too long."""
        return self._limit_s - (time.monotonic() - self._started)

    def failed(self, error: Exception, progress: bool = False) -> None:
        """Note a failure; returns after the pause. `progress`: the attempt brought bytes that no earlier one did.

        Raises ShardError from `error` when it is lasting, came too often or the time is up; StoppedError when called off.
        """
        self._num_attempts += 1
        self._num_in_row = 1 if progress else self._num_in_row + 1
        self._num_wrong += isinstance(error, WrongBytesError)
        if self._stop.is_set():
            raise StoppedError from error
        pause_s = self._retries.pause_s(self._num_in_row)
        advice = self._advice(error, pause_s)
        if advice:
            tries = f"after {self._num_attempts} attempt{'s' if self._num_attempts > 1 else ''}"
            raise ShardError(f"{self._url}: cannot be fetched, {tries}: {cause(error)}; {advice}") from error
        _LOG.warning("%s: attempt %d failed (%s); again in %.1f s", self._url, self._num_attempts, cause(error), pause_s)
        self._statistics.add(num_retries=1)
        if self._stop.wait(pause_s):
            raise StoppedError from error

    def _advice(self, error: Exception, pause_s: float) -> str:
        """What to do, when this failure is the last one; else nothing."""
        status = _status(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return "check the URL (data.shards), or put the file back"
        if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _LASTING_NAMES:
            return "check the credentials (the store's environment variables, or data.storage_options)"
        if isinstance(error, _LASTING) or (status is not None and 400 <= status < 500 and status not in _PASSING_STATUS):
            return "check the URL (data.shards) and data.storage_options"
        if isinstance(error, WrongBytesError) and self._num_wrong > 1:
            return "the store and the manifest do not belong together: upload the set again, the manifest last"
        if self._num_in_row >= self._retries.max_failures:
            return "check the network and the store, then start again"
        if self.left_s < pause_s:
            return f"no end within {self._limit_s:.0f} s: check the network and the store, then start again"
        return ""


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of aiohttp (`status`) or gcsfs (`code`) carries."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def cause(error: Exception) -> str:
    """A failure in a few words, without the URL, which may hold a token."""
    status = _status(error)
    if status is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, WrongBytesError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
