"""Sets of more shards than the process may have open files."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from mpmae.errors import ShardError
from mpmae.loader import ShardReader
from mpmae.loader.open_files import OpenFiles
from mpmae.shard_tools.build import build
from mpmae.shard_tools.synth import synth

READ_ALL = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from mpmae.loader import ShardReader

reader = ShardReader(sys.argv[1], "train")
with ThreadPoolExecutor(8) as pool:
    sizes = list(pool.map(lambda i: reader.pixels(i % len(reader), "sentinel2").shape, range(3 * len(reader))))
print(len(reader), set(sizes))
"""


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """120 training shards of one sample each."""
    folder = tmp_path_factory.mktemp("many")
    source = synth(folder / "source", num_tiles=120, tile_size_px=16, split_fractions=(1, 0, 0), progress=False)
    build(source, folder / "set", modalities=["sentinel2"], max_samples_per_shard=1, progress=False)
    return folder / "set"


def test_a_set_of_more_shards_than_open_files(many_shards):
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(many_shards)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "120 {(13, 16, 16)}\n"


def test_a_shard_that_vanishes_while_reading(many_shards, tmp_path):
    for path in many_shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    reader = ShardReader(tmp_path, "train")
    (tmp_path / "train-00002.tar").unlink()
    with pytest.raises(ShardError, match=r"train-00002\.tar: sample 0 .*sentinel2: cannot be read \(No such file"):
        reader.pixels(2, "sentinel2")


def test_threads_that_fight_over_few_descriptors(tmp_path):
    """A descriptor closed too early would be reused by the file that is opened next, whose bytes differ."""
    paths = [tmp_path / str(i) for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 64)
    files, wrong = OpenFiles(paths, max_open=3), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, len(paths), 400).tolist():
            data = files.read(number, 32, 16)
            if data != bytes([number]) * 32:
                wrong.append((number, data))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(open_descriptors(tmp_path)) == 3
    files.close()
    assert open_descriptors(tmp_path) == []


def test_a_file_being_read_stays_open(tmp_path):
    paths = [tmp_path / str(i) for i in range(4)]
    for path in paths:
        path.write_bytes(path.name.encode())
    files = OpenFiles(paths, max_open=1)
    with files.descriptor(0) as descriptor:
        assert [files.read(i, 1, 0) for i in (1, 2, 3)] == [b"1", b"2", b"3"]
        files.close()
        assert os.pread(descriptor, 1, 0) == b"0"
    assert open_descriptors(tmp_path) == []


def open_descriptors(folder) -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except OSError:  # the descriptor of the listing itself
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found
