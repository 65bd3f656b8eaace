"""Memory does not follow the size of a dataset: a small constant a tile, whatever its JSON files weigh."""

import hashlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpmae.shard_tools import json_stream
from mpmae.shard_tools.build_plan import BuildOptions, empty_manifest
from mpmae.shard_tools.encode import TileEncoder
from mpmae.shard_tools.json_stream import ObjectStream
from mpmae.shard_tools.source import MMEarthSource

MMEARTH_TILES = 1_200_000
BYTES_PER_CHUNK, NUM_DATASETS = 12, 15


def large_folder(folder: Path, num_tiles: int, tile_info_bytes: int) -> Path:
    """An MMEarth folder of 4-px tiles; only the chunks of `month` are written."""
    folder.mkdir()
    levels = ["l1c", "l2a"]
    ids = [f"{i:012d}_sentinel_tile" for i in range(num_tiles)]
    metadata = np.array(
        [(i.encode(), levels[n % 2].encode()) for n, i in enumerate(ids)], [("tile_id", "S100"), ("S2_type", "S10")]
    )
    with h5py.File(folder / f"{folder.name}.h5", "w") as file:
        file["metadata"] = metadata
        file.create_dataset("sentinel2", (num_tiles, 13, 4, 4), "u2", chunks=(1, 13, 4, 4), compression="gzip", fillvalue=9)
        file.create_dataset("month", (num_tiles, 2), "f4", chunks=(1, 2))
        for row in range(0, num_tiles, 10):
            file["month"].id.write_direct_chunk((row, 0), np.float32([row, 1]).tobytes())
    filler = "x" * (tile_info_bytes - 60)
    with (folder / f"{folder.name}_tile_info.json").open("w") as file:
        entries = (f'"{i}": {{"S2_type": "{levels[n % 2]}", "era5": "{filler}"}}' for n, i in enumerate(ids))
        file.write("{" + ", ".join(entries) + "}")
    (folder / f"{folder.name}_splits.json").write_text(json.dumps({"train": list(range(num_tiles))}))
    stats = {key: {q: [1.0] * num for q in ("mean", "std", "min", "max")} for key, num in LENGTHS.items()}
    (folder / f"{folder.name}_band_stats.json").write_text(json.dumps(stats))
    return folder


LENGTHS = {"sentinel2_l1c": 13, "sentinel2_l2a": 13, "month": 2}


def peak_bytes(code: str, *args) -> int:
    """Peak memory of a process that runs `code`; ru_maxrss would count its parent's too."""
    code = f"import sys\n{code}\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-2]) * 1024


OPEN = """
from mpmae.shard_tools.source import MMEarthSource
with MMEarthSource(sys.argv[1]) as source:
    source.notes(), source.fingerprint
"""
BUILD = """
from mpmae.shard_tools.build import build
build(sys.argv[1], sys.argv[2], codec="raw", max_samples_per_shard=500, workers=2, progress=False)
"""


def test_a_million_tiles_open_in_bounded_memory(tmp_path):
    small = peak_bytes(OPEN, large_folder(tmp_path / "small", 20_000, 1000))
    large = peak_bytes(OPEN, large_folder(tmp_path / "large", 100_000, 1000))
    per_tile = (large - small) / 80_000
    # The addresses of the chunks that nobody wrote are pages that nobody touched.
    at_full_size = small + (per_tile + BYTES_PER_CHUNK * NUM_DATASETS) * MMEARTH_TILES
    assert per_tile < 500, "tile_info.json alone has 1000 bytes a tile"
    assert at_full_size < 1.2e9


def test_a_build_keeps_no_tiles(tmp_path):
    """What is left of the 2 GB that a build may take is for the tiles in flight: 0.6 GB, 500 of MMEarth's largest."""
    peaks = []
    for num_tiles in (2000, 12_000):
        source = large_folder(tmp_path / f"n{num_tiles}", num_tiles, 100)
        peaks.append(peak_bytes(BUILD, source, tmp_path / f"out{num_tiles}"))
    at_full_size = peaks[0] + ((peaks[1] - peaks[0]) / 10_000 + BYTES_PER_CHUNK * NUM_DATASETS) * MMEARTH_TILES
    assert at_full_size < 1.4e9


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_few_tiles_are_in_flight(num_workers, source_32):
    rows, begun, taken, most = np.tile(np.arange(10), 20), itertools.count(), 0, 0
    with MMEarthSource(source_32, ["sentinel2"]) as source:
        encoder = TileEncoder(source, empty_manifest(source, BuildOptions()))
        one, num_begun = encoder.one, 0

        def counted(row: int):
            nonlocal num_begun
            num_begun = max(num_begun, next(begun) + 1)
            return one(row)

        encoder.one = counted
        for _ in encoder.ordered(rows, num_workers):
            if taken % 10 == 0:
                time.sleep(0.01)  # long enough for the threads to run ahead as far as they may
            most, taken = max(most, num_begun - taken), taken + 1
    assert taken == len(rows)
    assert num_workers * 4 <= most <= num_workers * 8 + 8


def test_a_source_keeps_twelve_bytes_a_chunk(tmp_path):
    with MMEarthSource(large_folder(tmp_path / "tiles", 1000, 100)) as source:
        source.notes()
        for reader in source._readers.values():
            assert reader._offset.nbytes + reader._size.nbytes == BYTES_PER_CHUNK * 1000
        assert source.read_tile(10).values["month"].tolist() == [10, 1]
        assert source.read_tile(11).values["month"].tolist() == [0, 0]
        assert source.read_tile(11).values["sentinel2"].max() == 9


TEXT = '\n{"aé": {"x": NaN, "n": 12345} , "b" : 123456,"c":"q\\"w{", "d":[] ,"e":-1.5e3, "f": {"g": [1, {"h": null}]}} \n'


@pytest.mark.parametrize("window_bytes", [1, 2, 3, 5, 64, 1 << 20])
def test_a_stream_gives_what_json_gives(window_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", window_bytes)
    path = tmp_path / "a.json"
    for text in (TEXT, "{}", " { } ", json.dumps({str(i): [i] for i in range(50)}, indent=1), "\ufeff" + TEXT.strip()):
        path.write_bytes(text.encode())
        stream = ObjectStream(path)
        assert repr(dict(stream)) == repr(json.loads(text.encode().decode("utf-8-sig")))
        assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected '{', found nothing"),
        ("[1, 2]", r"expected '\{', found '\[1, 2\]'"),
        ("{", "expected a key in double quotes, found nothing"),
        ('{"a": 1', "expected '}', found nothing"),
        ('{"a": 1,}', "expected a key in double quotes, found '}'"),
        ('{"a" 1}', "expected ':', found '1}'"),
        ('{"a": 1} x', "expected the end of the file, found 'x'"),
        ("{a: 1}", "expected a key in double quotes"),
        ('{"a": tru}', "Expecting value"),
        ('{"a": "x}', "Unterminated string"),
        ('{"a": 12x}', "expected '}', found 'x}'"),
        ('{"a": 1 "b": 2}', "expected '}', found '\"b\": 2}'"),
        (b'{"a": "\xff"}', "invalid start byte"),
    ],
)
def test_a_stream_refuses_what_is_not_json(text, why, tmp_path, monkeypatch):
    for window_bytes in (3, 1 << 20):
        monkeypatch.setattr(json_stream, "WINDOW_BYTES", window_bytes)
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=why):
            dict(ObjectStream(tmp_path / "a.json"))


def test_an_entry_without_end_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", 10)
    monkeypatch.setattr(json_stream, "MAX_ENTRY_CHARS", 100)
    (tmp_path / "a.json").write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(ValueError, match="Unterminated string"):
        dict(ObjectStream(tmp_path / "a.json"))
