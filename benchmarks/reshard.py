"""Resharding against the row-by-row way and against inflate alone, on real tiles.

python benchmarks/reshard.py ../shared/data/data_real_v001 ../shared/data/data_real128_v001    (writes a record)

All ways take the same tiles, gzip chunks of one tile in MMEarth's layout, from the page cache, and alternate within one
process. Rates are given by wall clock and by CPU second, that is per core used; the latter also holds on a busy machine.
"""

import argparse
import hashlib
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import webdataset
from isal import isal_zlib
from record import clean_commit, spread, write_record
from reshard_tiles import repeat, stored_chunks

from mpmae.shard_codecs import encode_pixels
from mpmae.shard_files import load_manifest
from mpmae.shard_format import sample_key
from mpmae.shard_tools.build import build
from mpmae.shard_tools.output import sample_bytes
from mpmae.shard_tools.raw_chunks import DatasetReader
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.tile import SampleEncoder
from mpmae.shard_tools.verify import verify

READS, PUBLISHED, REFERENCE = "h5py row by row, reads alone", "h5py as MMEarth-train reads", "h5py row by row to tar"
INFLATE, BUILD = "inflate alone, isal, 1 thread", "build lz4, 1 worker"
NUM_TABLE_CHUNKS = 200_000


def read_rows(folder: Path) -> None:
    """Every modality of every tile through h5py."""
    with h5py.File(folder / f"{folder.name}.h5") as file:
        datasets = [dataset for name, dataset in file.items() if name != "metadata"]
        for row in range(len(datasets[0])):
            for dataset in datasets:
                dataset[row]


def read_rows_as_published(folder: Path) -> None:
    """Every modality of every tile, looked up by name and with its bands listed, as the published dataset class reads.

    Source: MMEarth-train `mmearth_dataset.py`, `MMEarthDataset.__getitem__`, reads alone.
    """
    with h5py.File(folder / f"{folder.name}.h5") as file:
        bands = {name: list(range(dataset.shape[1])) for name, dataset in file.items() if name != "metadata"}
        for row in range(len(file["metadata"])):
            for name, numbers in bands.items():
                file[name][row, ...] if name in ("biome", "eco_region") else file[name][row, numbers, ...]


def rows_to_tar(folder: Path, target: Path) -> None:
    """The row-by-row way: h5py, then plain arrays into one tar by webdataset's writer."""
    with h5py.File(folder / f"{folder.name}.h5") as file, webdataset.TarWriter(str(target)) as writer:
        datasets = {name: dataset for name, dataset in file.items() if name != "metadata"}
        for row in range(len(file["metadata"])):
            sample = {f"{name}.npy": dataset[row] for name, dataset in datasets.items()}
            writer.write({"__key__": f"{row:08d}", **sample})


def inflate(chunks: dict[str, list[bytes]], decompress: Callable[[bytes], bytes], num_threads: int) -> None:
    """Every chunk inflated, tile by tile."""
    tiles = list(zip(*chunks.values(), strict=True))

    def work(first: int) -> None:
        for tile in tiles[first::num_threads]:
            for chunk in tile:
                decompress(chunk)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def cases(folder: Path, output: Path) -> dict[str, Callable[[], Any]]:
    """The ways to measure, by name."""
    chunks = stored_chunks(folder)
    made: dict[str, Callable[[], Any]] = {
        READS: lambda: read_rows(folder),
        PUBLISHED: lambda: read_rows_as_published(folder),
        REFERENCE: lambda: rows_to_tar(folder, output / "rows.tar"),
    }
    for name, decompress in (("isal", isal_zlib.decompress), ("zlib", zlib.decompress)):
        for n in (1, 2):
            threads = f"{n} thread{'s' if n > 1 else ''}"
            made[f"inflate alone, {name}, {threads}"] = lambda d=decompress, n=n: inflate(chunks, d, n)
    for codec in ("lz4", "raw", "zstd"):
        for n in (1, 2):
            made[f"build {codec}, {n} worker{'s' if n > 1 else ''}"] = lambda codec=codec, n=n: build(
                folder, output / "shards", codec=codec, workers=n, overwrite=True, progress=False
            )
    return made


def alternate(ways: dict[str, Callable[[], Any]], num_tiles: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Tiles a second, by wall clock and by CPU second, of each way; all of them once a round."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {
            "tiles_per_s": spread([num_tiles / wall for wall, _ in pairs]),
            "tiles_per_cpu_s": spread([num_tiles / cpu for _, cpu in pairs]),
        }
        for name, pairs in samples.items()
    }


def limits(folder: Path, shards: Path, output: Path, num_tiles: int) -> dict[str, float]:
    """CPU microseconds that each step of a build takes of a tile, measured one by one on one thread."""
    manifest = load_manifest(shards)
    encoder = SampleEncoder(manifest)
    with MMEarthSource(folder) as source, (output / "written").open("wb") as file:
        tiles = [source.read_tile(row) for row in range(num_tiles)]
        samples = [sample_bytes(manifest, sample_key(0), encoder.encode(tile)[1]) for tile in tiles]
        steps: dict[str, Callable[[int], Any]] = {
            "read and inflate": source.read_tile,
            "filter and LZ4": lambda i: [encode_pixels(e, tiles[i].values[e.name]) for e in manifest.pixels],
            "sha256": lambda i: hashlib.sha256(samples[i]).digest(),
            "write": lambda i: file.write(samples[i]),
        }
        result = {}
        for name, step in steps.items():
            started = time.process_time()
            for i in range(num_tiles):
                step(i)
            result[name] = (time.process_time() - started) / num_tiles * 1e6
    return result


def chunk_table(folder: Path) -> dict[str, float]:
    """What taking the addresses of the chunks of one dataset costs, with the B-tree that MMEarth's files have."""
    path = folder / "table.h5"
    with h5py.File(path, "w", libver="earliest") as file:
        dataset = file.create_dataset("a", (NUM_TABLE_CHUNKS, 1, 4, 4), "u1", chunks=(1, 1, 4, 4), compression="gzip")
        data = zlib.compress(bytes(16))
        for row in range(NUM_TABLE_CHUNKS):
            dataset.id.write_direct_chunk((row, 0, 0, 0), data)
    descriptor = os.open(path, os.O_RDONLY)
    with h5py.File(path) as file:
        started = time.process_time()
        DatasetReader(file["a"], descriptor).load()
        seconds = time.process_time() - started
    os.close(descriptor)
    path.unlink()
    return {"num_chunks": NUM_TABLE_CHUNKS, "us_per_chunk": seconds / NUM_TABLE_CHUNKS * 1e6, "bytes_per_chunk": 12}


def measure(source: Path, work: Path, num_tiles: int, rounds: int) -> dict[str, Any]:
    """Everything about one source."""
    folder, output = repeat(source, work / f"{source.name}_{num_tiles}", num_tiles), work / "out"
    output.mkdir(exist_ok=True)
    # No speed of a set that is not right; compiles the loops and fills the page cache too.
    build(folder, output / "shards", progress=False)
    if problems := verify(output / "shards", folder).problems:
        raise SystemExit(f"the built set is not its source: {problems[:3]}")
    with MMEarthSource(folder) as tiles:
        raw_bytes = sum(int(np.prod(tiles.shapes[n])) * tiles.dtypes[n].itemsize for n in tiles.modalities)
        result: dict[str, Any] = {
            "num_tiles": num_tiles,
            "tile_size_px": tiles.tile_size_px,
            "raw_bytes_per_tile": raw_bytes,
            "source_bytes_per_tile": (folder / f"{folder.name}.h5").stat().st_size / num_tiles,
            "cpu_us_per_tile": limits(folder, output / "shards", output, min(num_tiles, 500)),
        }
    result["ways"] = alternate(cases(folder, output), num_tiles, rounds)
    per_core = {name: way["tiles_per_cpu_s"]["median"] for name, way in result["ways"].items()}
    result["ratios"] = {
        **{f"build over {way}": per_core[BUILD] / per_core[way] for way in (READS, PUBLISHED, REFERENCE)},
        "inflate alone over build": per_core[INFLATE] / per_core[BUILD],
        "inflate alone over h5py row by row to tar": per_core[INFLATE] / per_core[REFERENCE],
    }
    shutil.rmtree(folder)
    shutil.rmtree(output)
    return result


def main() -> None:
    """Measure every source and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="folders in MMEarth's layout")
    parser.add_argument("--megabytes", type=float, default=250, help="size of the repeated HDF5 file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for temporary files; the system's if not given")
    options = parser.parse_args()
    clean_commit()
    results: dict[str, Any] = {"sources": {}}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        results["chunk_table"] = chunk_table(Path(work))
        for source in options.sources:
            with MMEarthSource(source) as tiles:
                per_tile = (source / f"{source.name}.h5").stat().st_size / tiles.num_tiles
            num_tiles = int(options.megabytes * 1e6 / per_tile)
            results["sources"][source.name] = measure(source, Path(work), num_tiles, options.rounds)
            print(source.name, results["sources"][source.name]["ratios"], flush=True)
    case = {
        "page cache": "warm",
        "rounds": options.rounds,
        "source": "gzip chunks of one tile",
        "megabytes": options.megabytes,
    }
    print(f"record: {write_record('reshard', case, results)}")


if __name__ == "__main__":
    main()
