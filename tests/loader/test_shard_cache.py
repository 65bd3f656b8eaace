"""The cache folder: its limit at every moment, processes and threads at once, kills, folders that vanish."""

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpmae.errors import ConfigError, ShardError
from mpmae.loader.shard_cache import ShardCache, default_cache_dir
from mpmae.retries import StoppedError

KIB = 1024


def content(number: int, num_bytes: int = KIB) -> tuple[str, bytes]:
    data = (number.to_bytes(4, "little") * num_bytes)[:num_bytes]
    return hashlib.sha256(data).hexdigest(), data


def used(folder: Path) -> int:
    """Bytes of the cache's files; those that vanish meanwhile are gone."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size
        except FileNotFoundError:
            continue
    return total


def get(cache: ShardCache, number: int, num_bytes: int = KIB, during=lambda: None, **options) -> bytes:
    sha256, data = content(number, num_bytes)

    def fill(file):
        for part in (data[: num_bytes // 2], data[num_bytes // 2 :]):
            file.write(part)
            file.flush()
            during()

    descriptor = cache.open(sha256, num_bytes, fill, **options)
    try:
        return os.pread(descriptor, num_bytes + 1, 0)
    finally:
        os.close(descriptor)


def kept(cache: ShardCache, count: int) -> set[int]:
    return {number for number in range(count) if (cache.folder / content(number)[0]).exists()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    accesses=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40),
    sizes=st.lists(st.integers(1, 4 * KIB), min_size=10, max_size=10),
    max_bytes=st.integers(4 * KIB, 12 * KIB),
)
def test_the_limit_holds_and_bytes_are_right(tmp_path_factory, accesses, sizes, max_bytes):
    folder = tmp_path_factory.mktemp("cache")
    cache = ShardCache(folder, max_bytes)

    def within():
        assert used(folder) <= max_bytes

    for number, ahead in accesses:
        sha256, data = content(number, sizes[number])
        if ahead:
            there = (folder / sha256).exists()
            fits = fetch_ahead(cache, number, time.time_ns(), sizes[number])
            assert (folder / sha256).exists() == (fits or there)
        else:
            assert get(cache, number, sizes[number], within) == data
        within()
    shutil.rmtree(folder)


def test_the_least_recently_used_goes(tmp_path):
    cache = ShardCache(tmp_path, 3 * KIB)
    for number in (0, 1, 2, 0, 3):
        get(cache, number)
    assert kept(cache, 5) == {0, 2, 3}
    get(cache, 4)
    assert kept(cache, 5) == {0, 3, 4}


def test_fetching_ahead_spares_what_is_in_use(tmp_path):
    cache = ShardCache(tmp_path, 3 * KIB)
    get(cache, 0)
    since_ns = time.time_ns()
    get(cache, 1)
    fits = [fetch_ahead(cache, number, since_ns) for number in (2, 3, 4)]
    assert fits == [True, True, False]
    assert kept(cache, 5) == {1, 2, 3}


def fetch_ahead(cache, number, unused_since_ns, size=KIB) -> bool:
    sha256, data = content(number, size)
    fetch = cache.reserve(sha256, len(data), unused_since_ns)
    if fetch is not None:
        fetch(lambda file: file.write(data))
    return fetch is not None


def test_a_file_that_is_removed_stays_readable(tmp_path):
    cache = ShardCache(tmp_path, KIB)
    sha256, data = content(0)
    descriptor = cache.open(sha256, KIB, lambda file: file.write(data))
    get(cache, 1)
    assert kept(cache, 2) == {1}
    assert os.pread(descriptor, KIB, 0) == data
    os.close(descriptor)


def test_many_threads_fetch_each_file_once(tmp_path):
    cache, fetched = ShardCache(tmp_path, 8 * KIB), []
    barrier = threading.Barrier(8)

    def run(_):
        barrier.wait()
        return [get(cache, number, during=lambda number=number: fetched.append(number)) for number in range(8)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(8)))
    assert results == [[content(number)[1] for number in range(8)]] * 8
    assert sorted(fetched) == sorted([*range(8)] * 2)  # `during` is called twice a file


def test_room_that_others_hold_is_waited_for(tmp_path):
    cache, go = ShardCache(tmp_path, 2 * KIB), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(get, cache, number, during=lambda: go.wait(10)) for number in (0, 1)]
        while used(tmp_path) < 2 * KIB:
            time.sleep(0.01)
        with pytest.raises(ShardError, match=r"busy for too long .* or with all of the 2048 bytes"):
            get(cache, 2, patience_s=0.1)
        with pytest.raises(ShardError, match=r"busy for too long"):
            get(cache, 0, patience_s=0.1)
        stop = threading.Event()
        stop.set()
        with pytest.raises(StoppedError):
            get(cache, 2, stop=stop)
        threading.Timer(0.1, go.set).start()
        assert get(cache, 2) == content(2)[1]
        assert [job.result() for job in held] == [content(0)[1], content(1)[1]]
    assert used(tmp_path) <= 2 * KIB


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, KIB)

    def fill(file):
        file.write(b"some")
        raise ShardError("the store is gone")

    with pytest.raises(ShardError, match="the store is gone"):
        cache.open(content(0)[0], KIB, fill)
    assert used(tmp_path) == 0
    assert get(cache, 0) == content(0)[1]


SHARE = """
import sys
from pathlib import Path
import numpy as np
from mpmae.loader.shard_cache import ShardCache
from tests.loader.test_shard_cache import KIB, content, get, used

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
cache = ShardCache(folder, 4 * KIB)

def within():
    assert used(folder) <= 4 * KIB

for number in np.random.default_rng(seed).integers(0, 12, 150).tolist():
    assert get(cache, number, during=within) == content(number)[1]
    within()
print(cache._statistics.num_downloads)
"""


def python(code: str, *arguments: object, repo: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_cache_that_is_too_small(tmp_path, repo):
    processes = [python(SHARE, tmp_path, seed, repo=repo) for seed in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert int(out) > 20
    assert not list(tmp_path.glob("*.part"))
    assert used(tmp_path) <= 4 * KIB


HANG = """
import sys, time
from pathlib import Path
from mpmae.loader.shard_cache import ShardCache
from tests.loader.test_shard_cache import KIB, get

get(ShardCache(Path(sys.argv[1]), 2 * KIB), 0, during=lambda: (print("half", flush=True), time.sleep(60)))
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_during_a_download_leaves_no_harm(tmp_path, repo, number):
    """Another process waits for the file (0), or for its room (1), until the kill, then goes on."""
    process = python(HANG, tmp_path, repo=repo)
    assert process.stdout.readline() == "half\n"
    cache = ShardCache(tmp_path, 2 * KIB)
    num_bytes = KIB if number == 0 else 2 * KIB
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(get, cache, number, num_bytes)
        time.sleep(0.15)
        assert not waiting.done()
        assert used(tmp_path) == KIB
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
        assert waiting.result(timeout=5) == content(number, num_bytes)[1]
    assert not list(tmp_path.glob("*.part"))


def test_what_a_kill_left_goes_at_the_next_start(tmp_path):
    for number in range(2):
        (tmp_path / f"{content(number)[0]}.part").write_bytes(bytes(KIB))
    (tmp_path / content(2)[0]).write_bytes(content(2)[1])
    (tmp_path / "notes.txt").write_text("somebody's own")
    cache = ShardCache(tmp_path, KIB)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "notes.txt", content(2)[0]}
    get(cache, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "notes.txt", content(3)[0]}


def test_a_lower_limit_holds_from_the_start(tmp_path):
    cache = ShardCache(tmp_path, 4 * KIB)
    for number in range(4):
        get(cache, number)
    assert kept(ShardCache(tmp_path, 2 * KIB), 4) == {2, 3}


def test_a_file_of_another_size_is_fetched_again(tmp_path, caplog):
    cache = ShardCache(tmp_path, 2 * KIB)
    get(cache, 0)
    with (tmp_path / content(0)[0]).open("r+b") as file:
        file.truncate(100)
    assert get(cache, 0) == content(0)[1]
    assert "has 100 bytes, expected 1024" in caplog.text


def test_a_folder_that_vanishes_is_made_again_once(tmp_path, caplog):
    cache = ShardCache(tmp_path / "cache", 2 * KIB)
    get(cache, 0)
    shutil.rmtree(cache.folder)
    with caplog.at_level(logging.WARNING):
        assert get(cache, 0) == content(0)[1]
    assert "has vanished; made it again" in caplog.text
    shutil.rmtree(cache.folder)
    with pytest.raises(ShardError, match="vanished for the second time"):
        get(cache, 0)


def test_a_folder_that_vanishes_during_a_download(tmp_path, caplog):
    cache = ShardCache(tmp_path / "cache", 2 * KIB)
    assert get(cache, 0, during=lambda: shutil.rmtree(cache.folder, ignore_errors=True)) == content(0)[1]
    assert "vanished during its download; it is read but not kept" in caplog.text
    assert get(cache, 0) == content(0)[1]
    assert kept(cache, 1) == {0}


def test_another_download_of_that_name_is_not_taken_for_ones_own(tmp_path):
    """The folder vanishes and another process begins the same file: renaming by path would publish its half."""
    cache, name = ShardCache(tmp_path / "cache", 2 * KIB), content(0)[0]

    def replace():
        shutil.rmtree(cache.folder, ignore_errors=True)
        cache.folder.mkdir()
        (cache.folder / f"{name}.part").write_bytes(b"another's half")

    assert get(cache, 0, during=replace) == content(0)[1]
    assert not (cache.folder / name).exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "cache"
    cache = ShardCache(folder, 2 * KIB)
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    with pytest.raises(ShardError, match=r"the shard cache .*cache cannot be used any more \(Not a directory\); check"):
        get(cache, 0)
    with pytest.raises(ConfigError, match=r"the shard cache .* cannot be used \(.*\); point data.cache_dir to"):
        ShardCache(folder / "in", 2 * KIB)


def test_a_full_disk_is_said(tmp_path):
    cache = ShardCache(tmp_path, 2 * KIB)

    def fill(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(ShardError, match=r"No space left on device\); check the disk's room .*data\.cache_size_gb"):
        cache.open(content(0)[0], KIB, fill)
    assert used(tmp_path) == 0


def test_a_limit_beyond_the_disk_is_warned_of(tmp_path, caplog):
    ShardCache(tmp_path, 2**60)
    assert "may grow to 1073741824.0 GiB, but its disk has room for" in caplog.text


def test_a_cache_opens_while_files_come_and_go(tmp_path):
    """As when one rank fetches before another has begun."""
    cache, stop = ShardCache(tmp_path, 4 * KIB), threading.Event()

    def churn():
        for number in range(10**6):
            if stop.is_set():
                return
            cache.add(*content(number % 20))

    with ThreadPoolExecutor(2) as pool:
        churning = [pool.submit(churn) for _ in range(2)]
        try:
            for _ in range(100):
                ShardCache(tmp_path, 4 * KIB)
        finally:
            stop.set()
        assert [future.result() for future in churning] == [None, None]


def test_a_file_larger_than_the_cache(tmp_path):
    with pytest.raises(ConfigError, match=r"may hold 1024 bytes .* alone has 2048 .*raise data.cache_size_gb"):
        get(ShardCache(tmp_path, KIB), 0, 2 * KIB)


def test_where_the_cache_is_by_default(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    monkeypatch.delenv("MPMAE_CACHE_DIR", raising=False)
    assert default_cache_dir() == Path("/var/x/mpmae/shards")
    monkeypatch.setenv("MPMAE_CACHE_DIR", "/scratch/shards")
    assert default_cache_dir() == Path("/scratch/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("MPMAE_CACHE_DIR")
    assert default_cache_dir() == Path.home() / ".cache/mpmae/shards"
