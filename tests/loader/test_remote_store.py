"""A store that fails in every way a store fails: what arrives is right, or the error says what to do."""

import asyncio
import hashlib
import io
import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem

from mpmae.errors import ConfigError, ShardError
from mpmae.remote_store import RemoteStore, is_remote, without_scheme
from mpmae.retries import Retries, StoppedError
from tests.loader.http_server import serve

QUICK = Retries(max_failures=3, timeout_s=0.4, first_pause_s=0.01, longest_pause_s=0.05, min_bytes_per_s=100_000)
DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
NUM_BYTES = len(DATA)
HALF = NUM_BYTES // 2


@pytest.fixture
def server(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    with serve(tmp_path) as (url, faults):
        yield url, faults


def fetch(url, retries=QUICK, stop=None, num_bytes=NUM_BYTES, sha256=SHA256, **options):
    store, file = RemoteStore(url, options, retries), io.BytesIO()
    store.download("a.tar", num_bytes, sha256, file, stop or threading.Event())
    return file.getvalue(), store.statistics


def test_a_plain_download(server):
    url, faults = server
    data, statistics = fetch(url)
    assert data == DATA
    assert (statistics.bytes_downloaded, statistics.num_retries) == (len(DATA), 0)
    assert faults.requests == [("a.tar", "")]


@pytest.mark.parametrize("fault", ["truncate", "reset", "hang"])
def test_a_broken_download_goes_on_where_it_ended(server, fault, caplog):
    url, faults = server
    faults.add("a.tar", fault)
    with caplog.at_level(logging.WARNING):
        data, statistics = fetch(url)
    assert data == DATA
    assert faults.requests == [("a.tar", ""), ("a.tar", f"bytes={HALF}-")]
    assert (statistics.bytes_downloaded, statistics.num_retries) == (len(DATA), 1)
    assert f"{url}/a.tar: attempt 1 failed" in caplog.text


def test_a_store_without_ranges_starts_over(server):
    url, faults = server
    faults.ranges = False
    faults.add("a.tar", "truncate", "truncate")
    data, statistics = fetch(url)
    assert data == DATA
    assert statistics.bytes_downloaded == len(DATA) + 2 * HALF


def test_new_bytes_reset_the_count_of_failures(server):
    url, faults = server
    faults.add("a.tar", *["truncate"] * 6)
    assert fetch(url)[0] == DATA


def test_bytes_that_were_there_before_do_not(server):
    url, faults = server
    faults.ranges = False
    faults.add("a.tar", *["truncate"] * 9)
    with pytest.raises(ShardError, match=r"a\.tar: cannot be fetched, after 3 attempts: .*; check the network"):
        fetch(url)


def test_a_server_error_that_passes(server):
    url, faults = server
    faults.add("a.tar", 500, 503)
    data, statistics = fetch(url)
    assert data == DATA
    assert statistics.num_retries == 2


@pytest.mark.parametrize(
    ("status", "num_requests", "message"),
    [
        (500, 3, "after 3 attempts: HTTP 500 Internal Server Error; check the network and the store"),
        (429, 3, "after 3 attempts: HTTP 429"),
        (404, 1, "after 1 attempt: HTTP 404 Not Found; check the URL"),
        (403, 1, "after 1 attempt: HTTP 403 Forbidden; check the credentials"),
        (400, 1, "after 1 attempt: HTTP 400"),
    ],
)
def test_a_server_error_that_stays(server, status, num_requests, message):
    url, faults = server
    faults.add("a.tar", *[status] * 9)
    with pytest.raises(ShardError, match=message) as caught:
        fetch(url)
    assert f"{url}/a.tar" in str(caught.value)
    assert len(faults.requests) == num_requests


def test_wrong_bytes_are_fetched_once_more(server):
    url, faults = server
    faults.add("a.tar", "wrong")
    assert fetch(url)[0] == DATA
    faults.add("a.tar", "wrong", "wrong", "wrong")
    with pytest.raises(ShardError, match=r"after 2 attempts: its sha256 is .*, the manifest says .*do not belong together"):
        fetch(url)
    assert len(faults.requests) == 4


@pytest.mark.parametrize("num_bytes", [len(DATA) - 1, len(DATA) + 1])
def test_another_size_than_the_manifest_says(server, num_bytes):
    with pytest.raises(ShardError, match=f"has {len(DATA)} bytes, the manifest says {num_bytes}"):
        fetch(server[0], num_bytes=num_bytes)


def test_more_bytes_than_the_manifest_says_without_a_length(server):
    url, faults = server
    faults.add("a.tar", "unsized")
    assert fetch(url)[0] == DATA
    faults.add("a.tar", "unsized", "unsized")
    with pytest.raises(ShardError, match=f"after 2 attempts: it has more than the {NUM_BYTES} bytes"):
        fetch(url)


def test_nobody_listens(server, tmp_path):
    with serve(tmp_path) as (url, _):
        pass
    with pytest.raises(ShardError, match=r"after 3 attempts: ClientConnectorError"):
        fetch(url)


def test_a_silent_store_is_given_up_in_time(server):
    url, faults = server
    faults.pause_s = 60
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"after 3 attempts: TimeoutError: nothing arrived for 0\.4 s"):
        fetch(url)
    assert time.monotonic() - started < 3


def test_a_slow_store_is_given_up_in_time(server):
    """Bytes trickle in, so that no silence is too long; the whole is."""
    url, faults = server
    faults.bytes_per_s = 20_000
    retries = Retries(max_failures=2, timeout_s=0.2, first_pause_s=0.01, longest_pause_s=0.02, min_bytes_per_s=1e6)
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"no end within 1 s: check the network"):
        fetch(url, retries)
    assert time.monotonic() - started < 3


def test_a_slow_store_is_waited_for(server):
    url, faults = server
    faults.bytes_per_s = 1e6
    assert fetch(url)[1].num_retries == 0


@pytest.mark.parametrize("fault", ["hang", 500])
def test_stopping_is_prompt(server, fault):
    url, faults = server
    faults.add("a.tar", *[fault] * 9)
    stop, started = threading.Event(), time.monotonic()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(StoppedError):
        fetch(url, Retries(timeout_s=60, first_pause_s=30), stop)
    assert time.monotonic() - started < 3


def test_reading_small_files(server, tmp_path):
    url, faults = server
    store = RemoteStore(url, retries=QUICK)
    faults.add("a.tar", "truncate", 500)
    assert store.read("a.tar", SHA256) == DATA
    faults.add("a.tar", "wrong")
    assert store.read("a.tar", SHA256) == DATA
    with pytest.raises(ShardError, match=r"after 2 attempts: its sha256"):
        store.read("a.tar", "0" * 64)
    (tmp_path / "empty").write_bytes(b"")
    assert store.read("empty") == b""


def test_secrets_of_the_url_stay_out_of_messages(server):
    url, faults = server
    with pytest.raises(ShardError) as caught:
        RemoteStore(url.replace("http://", "http://me:word@") + "?token=secret", retries=QUICK).read("b.tar")
    assert str(caught.value).startswith(f"{url}/b.tar: ")
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value)
    assert faults.requests == [("b.tar", "")]


def test_stores_of_fsspec_without_an_event_loop():
    memory = fsspec.filesystem("memory")
    memory.pipe("/one/a.tar", DATA)
    try:
        assert fetch("memory://one")[0] == DATA
        with pytest.raises(ShardError, match=r"memory://one/b\.tar: .*after 1 attempt: it does not exist; check the URL"):
            RemoteStore("memory://one").read("b.tar")
        memory.pipe("/one/a.tar", DATA[:-1])
        with pytest.raises(ShardError, match=f"has {len(DATA) - 1} bytes, the manifest says {len(DATA)}"):
            fetch("memory://one")
    finally:
        memory.rm("/one", recursive=True)


class Flaky(AsyncFileSystem):
    """A store of ranges, as s3 and gs are read: requests take from `faults` what they do instead of answering."""

    protocol = "flaky"
    cachable = False
    faults: ClassVar[list] = []
    ranges: ClassVar[list] = []

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        self.ranges.append((start, end))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        await asyncio.sleep(fault or 0)
        return DATA[start:end]


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setattr("mpmae.remote_store.RANGE_BYTES", 100_000)
    monkeypatch.setattr(Flaky, "faults", [])
    monkeypatch.setattr(Flaky, "ranges", [])
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    return Flaky


def test_ranges_that_arrived_are_not_asked_for_again(flaky):
    first, second, third = (0, 100_000), (100_000, 200_000), (200_000, 300_000)
    flaky.faults += [None, OSError(5, "Slow Down"), None, 60]
    assert fetch("flaky://one", replace(QUICK, timeout_s=0.1))[0] == DATA
    assert flaky.ranges == [first, second, second, third, third]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Access Denied"), "after 1 attempt: PermissionError: Access Denied; check the credentials"),
        (FileNotFoundError("one/a.tar"), "after 1 attempt: it does not exist; check the URL"),
        (OSError(5, "Internal Error"), r"after 3 attempts: OSError: \[Errno 5\] Internal Error; check the network"),
    ],
)
def test_errors_of_ranges(flaky, error, message):
    flaky.faults += [error] * 9
    with pytest.raises(ShardError, match=message):
        fetch("flaky://one")
    flaky.faults[:] = [error] * 9
    with pytest.raises(ShardError, match=message):
        RemoteStore("flaky://one", retries=QUICK).read("a.tar")


def test_a_local_file_that_cannot_be_written_is_no_fault_of_the_store(server):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        RemoteStore(server[0], retries=QUICK).download("a.tar", len(DATA), SHA256, Full(), threading.Event())
    assert server[1].num_requests("a.tar") == 1


def test_what_fsspec_does_not_take(server):
    with pytest.raises(ConfigError, match=r"nosuch://a/b: Protocol not known: nosuch.*check the URL"):
        RemoteStore("nosuch://a/b")
    with pytest.raises(ShardError, match=r"after 1 attempt: TypeError: .*colour.*data\.storage_options"):
        fetch(server[0], colour="red")


def test_a_package_that_is_not_installed():
    code = (
        "import sys; sys.modules['s3fs'] = None\nfrom mpmae.remote_store import RemoteStore\nRemoteStore('s3://bucket/set')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError: s3://bucket/set: the package for this kind of URL is not installed" in done.stderr
    assert "pip install 'mpmae[remote]'" in done.stderr


def test_what_counts_as_remote():
    assert is_remote("s3://bucket/set")
    assert is_remote("https://host/set")
    assert not is_remote("file:///data/set")
    assert not is_remote("/data/set")
    assert not is_remote("runs/set")
    assert without_scheme("file:///data/set") == "/data/set"
    assert without_scheme("/data/set") == "/data/set"
