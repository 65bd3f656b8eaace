"""A build that was killed anywhere goes on to the bytes of one that was not."""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from mpmae import files
from mpmae.errors import ShardError
from mpmae.shard_tools import journal, lock, output
from mpmae.shard_tools.build import build, build_from
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.verify import verify
from tests.shard_tools.test_shards_build import digests

FEW = ("sentinel2", "sentinel1", "biome", "month")


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of the code under test may do anything any more."""


class Killed:
    """From the n-th file operation on, every one raises."""

    def __init__(self, monkeypatch, n: int):
        self.num_calls, self.n = 0, n
        for owner, name in [
            (os, "fsync"),
            (os, "ftruncate"),
            (Path, "open"),
            (Path, "replace"),
            (Path, "unlink"),
            (Path, "mkdir"),
            (Path, "rmdir"),
            (files, "sync"),
            (output.ShardWriter, "_write"),
        ]:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.num_calls += 1
            if self.num_calls >= self.n:
                raise KilledError
            return function(*args, **kwargs)

        return wrapped


@pytest.fixture(scope="module")
def opened(source_32):
    with MMEarthSource(source_32, FEW) as source:
        yield source


class Computed:
    """A source without statistics: the build makes them, and a resumed one must make the same."""

    def __init__(self, source: MMEarthSource):
        self._source = source
        self.band_stats = None

    def __getattr__(self, name: str):
        return getattr(self._source, name)


def test_killed_at_each_file_operation(opened, tmp_path, monkeypatch):
    source = Computed(opened)
    options = {"max_samples_per_shard": 3, "progress": False}
    build_from(source, tmp_path / "whole", workers=1, **options)
    expected = digests(tmp_path / "whole")
    with monkeypatch.context() as patch:
        counter = Killed(patch, 10**9)
        build_from(source, tmp_path / "counted", workers=1, **options)
    assert counter.num_calls > 60
    assert digests(tmp_path / "counted") == expected
    for n in range(1, counter.num_calls + 1):
        folder = tmp_path / f"killed-{n}"
        with monkeypatch.context() as patch:
            Killed(patch, n)
            try:
                build_from(source, folder, workers=1, **options)
            except KilledError:
                pass
            else:
                # The last operation takes the lock away; its failure has no consequence.
                assert n >= counter.num_calls - 1
        build_from(source, folder, workers=2, resume=True, **options)
        assert digests(folder) == expected, n


def test_killed_while_it_replaces_a_set(opened, tmp_path, monkeypatch):
    """From the first file on that is removed, the old set is no set any more; what is left is still known to be ours."""
    options = {"max_samples_per_shard": 5, "progress": False}
    build_from(opened, tmp_path / "whole", seed=1, **options)
    expected = digests(tmp_path / "whole")
    for n in range(1, 20):
        folder = tmp_path / f"killed-{n}"
        build_from(opened, folder, seed=0, **options)
        with monkeypatch.context() as patch:
            Killed(patch, n)
            with pytest.raises(KilledError):
                build_from(opened, folder, seed=1, overwrite=True, **options)
        build_from(opened, folder, seed=1, overwrite=True, **options)
        assert digests(folder) == expected, n


def test_sigkill_at_random_moments(source_64, tmp_path):
    options = {"max_samples_per_shard": 2, "progress": False}
    started = time.monotonic()
    build(source_64, tmp_path / "whole", **options)
    seconds = time.monotonic() - started
    rng, fork, num_killed = random.Random(0), multiprocessing.get_context("fork"), 0
    for i in range(6):
        child = fork.Process(
            target=build, args=(source_64, tmp_path / "killed"), kwargs={**options, "workers": 1 + i % 3, "resume": True}
        )
        child.start()
        time.sleep(rng.uniform(0.1, 0.6) * seconds)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        num_killed += child.exitcode == -signal.SIGKILL
    assert num_killed > 2
    build(source_64, tmp_path / "killed", resume=True, **options)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert verify(tmp_path / "killed", source_64).ok


def interrupted(opened, folder: Path, monkeypatch, num_samples: int = 7, **options) -> None:
    """A build that stopped after some samples, in shards of two."""
    add, num_calls = output.ShardWriter.add, 0

    def stop(self, *args):
        nonlocal num_calls
        num_calls += 1
        if num_calls > num_samples:
            raise KilledError
        return add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(output.ShardWriter, "add", stop)
        with pytest.raises(KilledError):
            build_from(opened, folder, max_samples_per_shard=2, progress=False, **options)


def test_other_options_are_refused_with_every_difference(opened, source_32, tmp_path, monkeypatch):
    interrupted(opened, tmp_path / "set", monkeypatch)
    before = digests(tmp_path / "set")
    with pytest.raises(ShardError) as caught:
        build_from(opened, tmp_path / "set", seed=3, codec="raw", splits=["train"], progress=False, resume=True)
    text = str(caught.value)
    assert 'codec was "lz4" in the interrupted build, is "raw" now' in text
    assert "seed was 0 in the interrupted build, is 3 now" in text
    assert 'splits was {"train": 8, "val": 1, "test": 1} in the interrupted build, is {"train": 8} now' in text
    assert "max_samples_per_shard was 2" in text
    assert len(caught.value.problems) == 5
    with (
        MMEarthSource(source_32, [*FEW, "aster"]) as other,
        pytest.raises(ShardError, match=r"modalities was \[.*\] in the interrupted build"),
    ):
        build_from(other, tmp_path / "set", max_samples_per_shard=2, progress=False, resume=True)
    assert digests(tmp_path / "set") == before


def test_another_compressor_is_refused(opened, tmp_path, monkeypatch):
    interrupted(opened, tmp_path / "set", monkeypatch)
    path = tmp_path / "set" / "build.jsonl"
    header, *records = path.read_text().splitlines()
    changed = json.loads(header) | {"encoder": "0" * 64}
    path.write_text("\n".join([json.dumps(changed), *records]) + "\n")
    with pytest.raises(ShardError, match="the compressor of the interrupted build gave other bytes"):
        build_from(opened, tmp_path / "set", max_samples_per_shard=2, progress=False, resume=True)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda f: (f / "train-00001.tar").unlink(), "train-00001.tar was finished, but it or an index of it is gone"),
        (lambda f: (f / "train-00000.idx").unlink(), "train-00000.tar was finished, but"),
        (lambda f: (f / "train-00000.tar").write_bytes(b"x"), r"train-00000.tar was finished with \d+ bytes, it has 1"),
        (lambda f: (f / "train-00000.index.npy").write_bytes(b"x"), "train-00000.index.npy has changed"),
        (lambda f: (f / "build.jsonl").unlink(), "has no build.jsonl of a build to go on with"),
        (lambda f: (f / "build.jsonl").write_bytes(b"{}\n"), "build.jsonl cannot be read"),
        (lambda f: (f / "build.jsonl").write_bytes(b'{"format": "mpmae-build-journal"\n'), "build.jsonl cannot be read"),
    ],
)
def test_a_damaged_unfinished_build_is_refused(damage, why, opened, tmp_path, monkeypatch):
    interrupted(opened, tmp_path / "set", monkeypatch)
    damage(tmp_path / "set")
    with pytest.raises(ShardError, match=why):
        build_from(opened, tmp_path / "set", max_samples_per_shard=2, progress=False, resume=True)


def test_resume_begins_goes_on_and_knows_the_end(opened, tmp_path, monkeypatch, capsys):
    interrupted(opened, tmp_path / "set", monkeypatch, seed=4)
    with pytest.raises(
        ShardError, match=r"an unfinished build of \d+ files; give another folder, go on with it with --resume"
    ):
        build_from(opened, tmp_path / "set", progress=False)
    options = {"max_samples_per_shard": 2, "seed": 4, "resume": True}
    build_from(opened, tmp_path / "set", **options)
    assert "3 shards with 6 of 10 tiles are finished" in capsys.readouterr().err
    build_from(opened, tmp_path / "fresh", **options)
    assert digests(tmp_path / "set") == digests(tmp_path / "fresh")
    before = digests(tmp_path / "set")
    assert build_from(opened, tmp_path / "set", **options).num_samples("train") == 8
    assert "is finished already: nothing to do" in capsys.readouterr().err
    with pytest.raises(ShardError, match="holds a finished set that differs in seed"):
        build_from(opened, tmp_path / "set", seed=5, resume=True, progress=False)
    with pytest.raises(ShardError, match="differs in shard_size_mb, max_samples_per_shard"):
        build_from(opened, tmp_path / "set", **options | {"max_samples_per_shard": 1, "shard_size_mb": 0.01})
    assert digests(tmp_path / "set") == before
    with pytest.raises(ShardError, match="expected at most one of them"):
        build_from(opened, tmp_path / "set", resume=True, overwrite=True)


def test_a_full_disk_midway_loses_nothing(opened, tmp_path, monkeypatch):
    write, num_bytes = output.ShardWriter._write, 0

    def full(self, data):
        nonlocal num_bytes
        num_bytes += len(data)
        if num_bytes > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    options = {"max_samples_per_shard": 2, "progress": False}
    build_from(opened, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(output.ShardWriter, "_write", full)
        with pytest.raises(ShardError, match=r"the disk .* is full .*then go on with --resume"):
            build_from(opened, tmp_path / "set", **options)
    assert (tmp_path / "set" / "train-00000.tar").is_file()
    assert not list((tmp_path / "set").glob("*-tmp"))
    build_from(opened, tmp_path / "set", resume=True, **options)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


def limited(source_dir: Path, folder: Path, max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    try:
        build(source_dir, folder, modalities=FEW, progress=False)
    except ShardError as error:
        os._exit(3 if "cannot write to" in str(error) else 4)


def test_a_write_that_the_system_refuses(source_32, tmp_path):
    child = multiprocessing.get_context("fork").Process(target=limited, args=(source_32, tmp_path / "set", 100_000))
    child.start()
    child.join(60)
    assert child.exitcode == 3
    build(source_32, tmp_path / "set", modalities=FEW, resume=True, progress=False)
    assert verify(tmp_path / "set", source_32).ok


def hold(folder: Path, ready, done) -> None:
    with lock.locked(folder, lambda text: None):
        ready.set()
        done.wait(60)


def test_two_writers(opened, tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    child = fork.Process(target=hold, args=(tmp_path / "set", ready, done))
    child.start()
    assert ready.wait(30)
    try:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ShardError, match=rf"is being written by process {child.pid} on \S+; wait for it"):
                build_from(opened, tmp_path / "set", progress=False, **options)
    finally:
        done.set()
        child.join()
    build_from(opened, tmp_path / "set", progress=False)
    assert not (tmp_path / "set" / "build.lock").exists()


def test_a_killed_holder_leaves_no_lock(opened, tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=hold, args=(tmp_path / "set", ready, fork.Event()))
    child.start()
    assert ready.wait(30)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert (tmp_path / "set" / "build.lock").exists()
    build_from(opened, tmp_path / "set", progress=False)
    assert not (tmp_path / "set" / "build.lock").exists()


def test_a_filesystem_without_locks_is_told(opened, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    build_from(opened, tmp_path / "set")
    assert "has no locks; make sure that nothing else writes there" in capsys.readouterr().err


def test_a_lock_of_a_removed_file_is_taken_anew(tmp_path, monkeypatch):
    """The last holder may remove the file between our opening and our locking it."""
    flock, num_calls = lock.fcntl.flock, 0

    def removed_meanwhile(descriptor, how):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            (tmp_path / "build.lock").unlink()
        return flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed_meanwhile)
    with lock.locked(tmp_path, lambda text: None):
        assert num_calls == 2
        assert json.loads((tmp_path / "build.lock").read_text())["pid"] == os.getpid()


def test_a_torn_last_line_of_the_journal_does_not_count(tmp_path):
    options = {"a": 1}
    written = journal.Journal.begin(tmp_path, options, "e")
    with written.path.open("ab") as file:
        file.write(b'{"split": "train", "shard": {"na')
    resumed = journal.Journal.resume(tmp_path, options, "e")
    assert resumed.state("train").shards == []
    assert written.path.read_bytes().endswith(b"}\n")
    assert b"split" not in written.path.read_bytes()
