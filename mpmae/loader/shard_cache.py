"""A folder of downloaded files with a limit on its size, shared by all ranks and runs of a machine.

    HASH         a complete file, named by its sha256; its time of change is the last use
    HASH.part    one being downloaded: as long as the whole file from the start, and locked (flock) by who downloads
    lock         held (flock) while files come and go

The folder is the only record: the sizes of these files are what is used and reserved, a `.part` that nobody locks is what
a killed process left. So two sets with the same shard share it, a rebuilt set never meets old bytes, and a kill at any point
leaves nothing to repair. fsspec's own caches know neither a limit nor other processes, hence this one. The folder belongs on
a local disk.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from mpmae.errors import ConfigError, ShardError
from mpmae.loader.file_locks import is_at, open_if_locked, try_lock
from mpmae.retries import RemoteStatistics, StoppedError

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[0-9a-f]{64}(\.part)?")
_PART = ".part"
_LOCK = "lock"
DEFAULT_MAX_BYTES = 64 * 2**30
POLL_S = 0.03
ALWAYS_NS = sys.maxsize


def default_cache_dir() -> Path:
    """`MPMAE_CACHE_DIR`, or `mpmae/shards` in the user's cache folder (XDG base directory specification)."""
    own = os.environ.get("MPMAE_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "mpmae" / "shards"


@dataclass(frozen=True)
class _File:
    path: Path
    num_bytes: int
    used_ns: int


class ShardCache:
    """Files by hash, at most `max_bytes` of them at any time, those being downloaded included.

    The least recently used go first. Who has one open keeps reading it: only its name is gone. Raises ConfigError when the
    folder cannot be made or written. Safe with threads and processes.
    """

    def __init__(self, cache_dir: Path, max_bytes: int, statistics: RemoteStatistics | None = None):
        self.folder, self.max_bytes = Path(cache_dir), max_bytes
        self._statistics = statistics or RemoteStatistics()
        self._recreating = threading.Lock()
        self._recreated = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._make_room(0, ALWAYS_NS)
                self._warn_of_a_small_disk()
        except OSError as error:
            raise ConfigError(
                f"the shard cache {self.folder} cannot be used ({error.strerror or error}); "
                "point data.cache_dir to a folder on a local disk that can be written"
            ) from error

    def _warn_of_a_small_disk(self) -> None:
        room = shutil.disk_usage(self.folder).free + sum(file.num_bytes for file in self._files())
        if room < self.max_bytes:
            _LOG.warning(
                "the shard cache %s may grow to %.1f GiB, but its disk has room for %.1f GiB; lower data.cache_size_gb",
                self.folder,
                self.max_bytes / 2**30,
                room / 2**30,
            )

    def too_small_for(self, name: str, num_bytes: int) -> str:
        """The message when a shard does not fit."""
        return (
            f"the shard cache {self.folder} may hold {self.max_bytes} bytes ({self.max_bytes / 2**30:.2f} GiB), but {name} "
            f"alone has {num_bytes} ({num_bytes / 2**30:.2f} GiB); raise data.cache_size_gb"
        )

    def touch(self, descriptor: int) -> None:
        """Note that a file of the cache is in use now. Raises ShardError."""
        now_ns = time.time_ns()
        try:
            os.utime(descriptor, ns=(now_ns, now_ns))
        except OSError as error:
            raise self._error(error) from error

    def open_cached(self, sha256: str, num_bytes: int | None = None) -> int | None:
        """A descriptor of a file that is there, now the most recently used; None when it is not. The caller closes it."""
        path = self.folder / sha256
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from error
        found = os.fstat(descriptor).st_size
        if num_bytes is not None and found != num_bytes:
            os.close(descriptor)
            _LOG.warning("%s has %d bytes, expected %d: it was changed; fetching it again", path, found, num_bytes)
            self.drop(sha256)
            return None
        self.touch(descriptor)
        return descriptor

    def read(self, sha256: str) -> bytes | None:
        """The bytes of a file that is there, their hash checked, else None."""
        descriptor = self.open_cached(sha256)
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            _LOG.warning("%s: its bytes were changed; fetching it again", self.folder / sha256)
            self.drop(sha256)
            return None
        return data

    def add(self, sha256: str, data: bytes) -> None:
        """Keep bytes that are at hand; their hash is the caller's word."""
        os.close(self.open(sha256, len(data), lambda file: file.write(data)))

    def drop(self, sha256: str) -> None:
        """Remove a file, if it is there."""
        try:
            with self._locked():
                (self.folder / sha256).unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def open(
        self,
        sha256: str,
        num_bytes: int,
        fill: Callable[[BinaryIO], None],
        *,
        stop: threading.Event | None = None,
        patience_s: float = 3600.0,
    ) -> int:
        """A descriptor of a file, `fill`ed by this process or another when it is not there. The caller closes it.

        fill: writes exactly the bytes of that hash, or raises. Raises what `fill` raises; ShardError when the folder cannot
        be written, or when another process lets it wait for longer than `patience_s`; StoppedError soon after `stop` is set.
        """
        end = time.monotonic() + patience_s
        while True:
            descriptor = self.open_cached(sha256, num_bytes)
            if descriptor is not None:
                return descriptor
            claim = self._claim(sha256, num_bytes, ALWAYS_NS)
            if claim.state == "mine":
                return self._filled(claim.descriptor, sha256, fill)
            self._wait(claim, sha256, stop or threading.Event(), end)

    def reserve(
        self, sha256: str, num_bytes: int, unused_since_ns: int
    ) -> Callable[[Callable[[BinaryIO], None]], None] | None:
        """Take the room for a file, in place of files last used before `unused_since_ns` only; None when it does not fit so.

        Returns what gets the file with a `fill` as `open` takes it, to be called in any case; it does nothing when the file
        is there or another is at it, and raises as `open`.
        """
        descriptor = self.open_cached(sha256, num_bytes)
        claim = _Claim("there", descriptor) if descriptor is not None else self._claim(sha256, num_bytes, unused_since_ns)
        return None if claim.state == "full" else partial(self._fetch, claim, sha256)

    def _fetch(self, claim: "_Claim", sha256: str, fill: Callable[[BinaryIO], None]) -> None:
        descriptor = self._filled(claim.descriptor, sha256, fill) if claim.state == "mine" else claim.descriptor
        if descriptor is not None:
            os.close(descriptor)

    def _wait(self, claim: "_Claim", sha256: str, stop: threading.Event, end: float) -> None:
        """Until the one who downloads a file, or who holds the room for it, is done or dead."""
        if claim.state == "full":
            self._pause(sha256, stop, end)
        if claim.descriptor is None:
            return
        try:
            while not try_lock(claim.descriptor, fcntl.LOCK_SH):
                self._pause(sha256, stop, end)
        finally:
            os.close(claim.descriptor)

    def _pause(self, sha256: str, stop: threading.Event, end: float) -> None:
        if time.monotonic() > end:
            raise ShardError(
                f"the shard cache {self.folder}: another process has been busy for too long with {sha256}{_PART}, or with "
                f"all of the {self.max_bytes} bytes; find the one that hangs (`lsof {self.folder}/*{_PART}`) and end it"
            )
        if stop.wait(POLL_S):
            raise StoppedError

    def _claim(self, sha256: str, num_bytes: int, unused_since_ns: int) -> "_Claim":
        """Reserve name and room for a file, unless it is there, another is at it or there is no room."""
        if num_bytes > self.max_bytes:
            raise ConfigError(self.too_small_for(f"{sha256[:12]}...", num_bytes))
        path = self.folder / (sha256 + _PART)
        try:
            with self._locked():
                if (self.folder / sha256).exists():
                    return _Claim("there")
                other = open_if_locked(path)
                if other is not None:
                    return _Claim("busy", other)
                if not self._make_room(num_bytes, unused_since_ns):
                    return _Claim("full")
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                locked = try_lock(descriptor, fcntl.LOCK_EX)
                assert locked
                os.truncate(descriptor, num_bytes)
                return _Claim("mine", descriptor)
        except FileNotFoundError:  # somebody is removing the folder right now
            self._recreate()
            return _Claim("full")
        except OSError as error:
            raise self._error(error) from error

    def _filled(self, descriptor: int, sha256: str, fill: Callable[[BinaryIO], None]) -> int:
        path = self.folder / (sha256 + _PART)
        try:
            with os.fdopen(os.dup(descriptor), "r+b") as file:
                fill(file)
            # A hit is trusted by name and size alone, so the bytes have to be on the disk before the name is.
            os.fsync(descriptor)
            self.touch(descriptor)
            with self._locked():
                if is_at(descriptor, path):
                    path.rename(self.folder / sha256)
                else:
                    _LOG.warning("%s vanished during its download; it is read but not kept", path)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            self._statistics.add(num_downloads=1)
        except BaseException as error:
            self._abandon(descriptor, path)
            if isinstance(error, OSError):
                raise self._error(error) from error
            raise
        return descriptor

    def _abandon(self, descriptor: int, path: Path) -> None:
        try:
            with self._locked():
                if is_at(descriptor, path):
                    path.unlink()
        except OSError as error:
            _LOG.warning("%s stays behind (%s); whoever needs the room next removes it", path, error.strerror or error)
        finally:
            os.close(descriptor)

    def _make_room(self, num_bytes: int, unused_since_ns: int) -> bool:
        """Remove rests of killed processes, then the least recently used files if that suffices. Needs the lock."""
        complete, used = [], 0
        for file in self._files():
            if file.path.suffix != _PART:
                complete.append(file)
            elif (other := open_if_locked(file.path)) is None:
                continue
            else:
                os.close(other)
            used += file.num_bytes
        excess, out = used + num_bytes - self.max_bytes, []
        for file in sorted(complete, key=lambda file: file.used_ns):
            if excess <= 0 or file.used_ns >= unused_since_ns:
                break
            out.append(file)
            excess -= file.num_bytes
        if excess > 0:
            return False
        for file in out:
            file.path.unlink(missing_ok=True)
        self._statistics.add(num_evictions=len(out))
        return True

    def _files(self) -> Iterator[_File]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name):
                    status = entry.stat()
                    yield _File(Path(entry.path), status.st_size, status.st_mtime_ns)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all threads and processes that use the folder. Raises OSError."""
        path = self.folder / _LOCK
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                self._recreate()
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not is_at(descriptor, path):  # the folder was removed while this waited
                    continue
                yield
                return
            finally:
                os.close(descriptor)

    def _recreate(self) -> None:
        """Make the folder again after someone removed it: once, for who removes it twice does not want it there."""
        with self._recreating:
            if self.folder.exists():
                return
            if self._recreated:
                raise ShardError(
                    f"the shard cache {self.folder} has vanished for the second time; keep cleaners off it, or point "
                    "data.cache_dir elsewhere"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._recreated = True
            _LOG.warning("the shard cache %s has vanished; made it again", self.folder)

    def _error(self, error: OSError) -> ShardError:
        return ShardError(
            f"the shard cache {self.folder} cannot be used any more ({error.strerror or error}); check the disk's room and "
            "permissions, or change data.cache_dir or data.cache_size_gb"
        )


@dataclass(frozen=True)
class _Claim:
    """The outcome of reserving a file; `descriptor`: the file ("there") or its `.part`, ours ("mine") or not ("busy")."""

    state: Literal["mine", "busy", "full", "there"]
    descriptor: int | None = None
