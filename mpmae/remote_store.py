"""Files of a folder behind an fsspec URL (s3, gs, http, ...): fetched with retries, resumed, their hashes checked.

fsspec's filesystems run their requests on one event loop in a thread of their own; here every request has a limit in time
and can be called off. The filesystem is asked for anew before each fetch, so that a forked process gets one of its own.
"""

import asyncio
import concurrent.futures
import hashlib
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from mpmae.errors import ConfigError
from mpmae.retries import Attempts, RemoteStatistics, Retries, StoppedError, WrongBytesError

RANGE_BYTES = 8 * 2**20
POLL_S = 0.1
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LOCAL_SCHEMES = ("file", "local")


def is_remote(where: object) -> bool:
    """Whether `where` is the URL of a store: text with `://` that is not file://."""
    return isinstance(where, str) and bool(_URL.search(where)) and where.partition("://")[0].lower() not in _LOCAL_SCHEMES


def without_scheme(where: str) -> str:
    """The path of a file:// URL; other text as it is."""
    scheme, separator, path = where.partition("://")
    return path if separator and scheme.lower() in _LOCAL_SCHEMES else where


class RemoteStore:
    """The files of one folder of a store.

    storage_options: what fsspec's filesystem of the URL's scheme takes (`endpoint_url`, `anon`, ...). Raises ConfigError
    when the package for the scheme is not installed or the options do not suit it.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        retries: Retries | None = None,
        statistics: RemoteStatistics | None = None,
    ):
        self._url, self._options = url, dict(storage_options or {})
        self._retries = retries or Retries()
        self.statistics = statistics or RemoteStatistics()
        self._file_system()

    def __str__(self):
        return shown(self._url)

    def at(self, name: str) -> str:
        """Where the file `name` lies, for messages: without user, password and query, which may be secret."""
        return shown(_joined(self._url, name))

    def limit_s(self, num_bytes: int) -> float:
        """The longest that fetching `num_bytes` may take."""
        return self._retries.limit_s(num_bytes)

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """A whole small file. Raises ShardError when it cannot be had, or its hash is not `sha256`."""
        stop = threading.Event()
        attempts = Attempts(self.at(name), 0, self._retries, self.statistics, stop)
        while True:
            try:
                data = self._whole(name, stop)
                self.statistics.add(bytes_downloaded=len(data))
                if sha256 is not None:
                    _check_hash(hashlib.sha256(data).hexdigest(), sha256)
                return data
            except Exception as error:
                attempts.failed(error)

    def download(self, name: str, num_bytes: int, sha256: str, file: BinaryIO, stop: threading.Event) -> None:
        """Fill `file` with the file `name`, hashed while it arrives; a broken attempt is resumed where it ended.

        Raises ShardError when the file cannot be had or is not the one of that size and hash; StoppedError soon after `stop`
        is set; OSError of `file`.
        """
        attempts = Attempts(self.at(name), num_bytes, self._retries, self.statistics, stop)
        writer, furthest = _HashingWriter(file), 0
        while True:
            try:
                for offset, data in self._chunks(name, writer.position, num_bytes, attempts, stop):
                    self.statistics.add(bytes_downloaded=len(data))
                    if offset + len(data) > num_bytes:  # not written: the file's room is what was reserved for it
                        raise WrongBytesError(f"it has more than the {num_bytes} bytes that the manifest says")
                    writer.write(offset, data)
                if writer.position != num_bytes:
                    raise WrongBytesError(f"it has {writer.position} bytes, the manifest says {num_bytes}")
                _check_hash(writer.hexdigest(), sha256)
                return
            except LocalWriteError as error:
                raise error.cause from error
            except Exception as error:
                attempts.failed(error, progress=writer.position > furthest)
                furthest = max(furthest, writer.position)
                if isinstance(error, WrongBytesError):
                    writer.restart()

    def _file_system(self):
        import fsspec

        try:
            return fsspec.core.url_to_fs(_joined(self._url, ""), **self._options)[0]
        except ImportError as error:
            raise ConfigError(
                f"{self}: the package for this kind of URL is not installed ({error}); "
                "`pip install 'mpmae[remote]'` brings http(s) and s3, `pip install gcsfs` gs"
            ) from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self}: {error}; check the URL (data.shards) and data.storage_options") from error

    def _whole(self, name: str, stop: threading.Event) -> bytes:
        file_system, url = self._file_system(), _joined(self._url, name)
        if "http" in file_system.protocol:
            chunks = _http_chunks(file_system, url, 0, None, lambda: self._retries.timeout_s, stop)
            return b"".join(data for _, data in chunks)
        if not file_system.async_impl:
            return file_system.cat_file(url)
        return _finish(file_system.loop, file_system._cat_file(url), self._retries.silence_s(RANGE_BYTES), stop)

    def _chunks(
        self, name: str, start: int, num_bytes: int, attempts: Attempts, stop: threading.Event
    ) -> Iterator[tuple[int, bytes]]:
        """One attempt: (offset, bytes) from `start` on, or from 0 when the store cannot begin elsewhere."""
        file_system, url = self._file_system(), _joined(self._url, name)
        if "http" in file_system.protocol:

            def patience_s() -> float:
                return min(self._retries.timeout_s, attempts.left_s)

            yield from _http_chunks(file_system, url, start, num_bytes, patience_s, stop)
            return
        for offset in range(start, num_bytes, RANGE_BYTES):
            end = min(num_bytes, offset + RANGE_BYTES)
            if stop.is_set():
                raise StoppedError
            if file_system.async_impl:
                coroutine = file_system._cat_file(url, start=offset, end=end)
                limit_s = min(self._retries.silence_s(end - offset), attempts.left_s)
                data = _finish(file_system.loop, coroutine, limit_s, stop)
            else:
                data = file_system.cat_file(url, start=offset, end=end)
            yield offset, data
            if len(data) != end - offset:
                return


class LocalWriteError(Exception):
    """The file being filled cannot be written: no fault of the store."""

    def __init__(self, cause: OSError):
        super().__init__(str(cause))
        self.cause = cause


class _HashingWriter:
    """Writes what arrives in order, hashing it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.restart()

    def restart(self) -> None:
        self.position, self._hash = 0, hashlib.sha256()
        self._file.seek(0)

    def write(self, offset: int, data: bytes) -> None:
        if offset != self.position:
            self.restart()
        assert offset == self.position
        try:
            self._file.write(data)
        except OSError as error:
            raise LocalWriteError(error) from error
        self._hash.update(data)
        self.position += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _http_chunks(
    file_system, url: str, start: int, num_bytes: int | None, patience_s: Callable[[], float], stop: threading.Event
) -> Iterator[tuple[int, bytes]]:
    """A body as it arrives, over one connection: fsspec's own readers ask for its size first and hold blocks in memory."""
    import aiohttp

    loop = file_system.loop
    headers = {**file_system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    # aiohttp ends any response after 300 s by itself; `patience_s` bounds the silence between its parts instead.
    options = {**file_system.kwargs, "headers": headers, "timeout": aiohttp.ClientTimeout(total=None)}

    async def ask() -> aiohttp.ClientResponse:
        session = await file_system.set_session()
        response = await session.get(file_system.encode_url(url), **options)
        if response.status >= 400:
            response.close()
            response.raise_for_status()
        return response

    response = _finish(loop, ask(), patience_s(), stop)
    try:
        offset = start if response.status == 206 else 0
        length = response.content_length
        if num_bytes is not None and length is not None and offset + length != num_bytes:
            raise WrongBytesError(f"it has {offset + length} bytes, the manifest says {num_bytes}")
        while data := _finish(loop, response.content.readany(), patience_s(), stop):
            yield offset, data
            offset += len(data)
    finally:
        loop.call_soon_threadsafe(response.close)


def _finish(loop: asyncio.AbstractEventLoop, coroutine: Coroutine, limit_s: float, stop: threading.Event) -> Any:
    """The result of a coroutine of fsspec's loop; TimeoutError after `limit_s`, StoppedError soon after `stop` is set."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    limit_s = max(0.0, limit_s)
    end = time.monotonic() + limit_s
    try:
        while not concurrent.futures.wait([future], max(0.0, min(POLL_S, end - time.monotonic()))).done:
            if stop.is_set():
                raise StoppedError
            if time.monotonic() >= end:
                raise TimeoutError(f"nothing arrived for {limit_s:.1f} s")
        return future.result()
    finally:
        future.cancel()


def _check_hash(found: str, expected: str) -> None:
    if found != expected:
        raise WrongBytesError(f"its sha256 is {found[:12]}..., the manifest says {expected[:12]}...")


def _joined(url: str, name: str) -> str:
    """The URL of a file of the folder `url`; a query (an access token) stays at the end."""
    if not url.lower().startswith(("http://", "https://")):
        return f"{url.rstrip('/')}/{name}" if name else url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def shown(url: str) -> str:
    """The URL without user, password and query, which may be secret: for messages and records."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
