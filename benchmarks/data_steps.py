"""What the way from HDF5 to batches costs: build, verify and loader rates, bytes a tile.

python benchmarks/data_steps.py ../shared/data/data_real_v001 ../shared/data/data_real128_v001    (writes a record)
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import clean_commit, spread, write_record

from mpmae.loader import CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.modalities import TARGETS
from mpmae.shard_tools.build import build
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.verify import verify

CROP_PX = {64: 56, 128: 112}


def rates(action: Callable[[], Any], num_tiles: int, repeats: int) -> dict[str, float]:
    """Tiles/s of an action over `num_tiles`, after one run to fill the page cache."""
    action()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return spread([num_tiles / s for s in seconds])


def load_once(shards: Path, num_workers: int) -> None:
    """One pass over the training split in batches of 32, all targets."""
    reader = ShardReader(shards, "train")
    loader = CpuLoader(reader, TARGETS, CROP_PX[reader.manifest.tile_size_px], seed=0, num_workers=num_workers)
    order = TrainOrder(ExactOrder(len(reader)), 32, 0)
    batches = loader.training(order, plan_batches(32, None, 1), 0, 0)
    for _ in itertools.islice(batches, order.steps_per_epoch):
        pass
    batches.close()


def measure(source: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """All rates of one source."""
    with MMEarthSource(source) as tiles:
        num_tiles = tiles.num_tiles
        source_bytes = (source / f"{source.name}.h5").stat().st_size
    result: dict[str, Any] = {"num_tiles": num_tiles, "source_bytes_per_tile": source_bytes / num_tiles}
    for codec in ("lz4", "raw"):
        shards = folder / f"{source.name}-{codec}"

        def make(shards: Path = shards, codec: str = codec) -> None:
            build(source, shards, codec=codec, overwrite=True, progress=False)

        built = rates(make, num_tiles, repeats)
        reader = ShardReader(shards, "train")
        batched = len(reader) // 32 * 32
        result["tile_size_px"] = reader.manifest.tile_size_px
        num_bytes = sum(path.stat().st_size for path in shards.iterdir())
        result[codec] = {
            "build_tiles_per_s": built,
            "verify_against_source_tiles_per_s": rates(lambda s=shards: verify(s, source), num_tiles, repeats),
            "loader_samples_per_s": {
                f"{n} threads": rates(lambda s=shards, n=n: load_once(s, n), batched, repeats) for n in (1, 2)
            },
            "bytes_per_tile": num_bytes / num_tiles,
        }
    return result


def main() -> None:
    """Measure every source and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="folders in MMEarth's layout")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    clean_commit()
    with tempfile.TemporaryDirectory() as folder:
        results = {source.name: measure(source, Path(folder), options.repeats) for source in options.sources}
    case = {"page cache": "warm", "repeats": options.repeats, "loader": "all 12 targets, crop, flips, normalisation"}
    print(f"record: {write_record('data steps', case, results)}")


if __name__ == "__main__":
    main()
