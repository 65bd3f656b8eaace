"""Samples/s of this project's loaders beside other projects': the same real tiles, the same batches.

make bench-peers                              (in an environment with the peers; writes a record)
python benchmarks/loader.py                   (the cases whose packages are installed, and which are left out)
python benchmarks/loader.py --device cuda     (the DALI loader on the GPU)
python benchmarks/loader.py --repeats 2 --rounds 1 --seconds 0.5 --no-record

Every turn is a process of its own, so that no loader's threads, caches or imports touch another's; the cases take turns.
Before anything is measured each gives a batch that must equal the cpu loader's of the same tiles.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from loader_cases import CASES, GPU_CASES, HDF5, LZ4, RAW
from loader_gate import ULPS, gate_problems
from loader_limits import limits
from loader_tiles import decoded_bytes
from loader_work import Case, Work, prepare
from record import clean_commit, spread, write_record
from results_loader import table
from rich.console import Console

from mpmae.loader import ShardReader
from mpmae.modalities import TARGETS

HERE = Path(__file__).resolve().parent
PACKAGES = ("litdata", "mosaicml-streaming", "webdataset", "h5py", "cramjam", "numba", "nvidia-dali-cuda130")
TURN_SECONDS = 300
GPU_TARGET = 20_000


class Turns:
    """Runs cases by turns, in processes that share one folder of compiled loops and temporary files, empty at first."""

    def __init__(self, work: Work, scratch: str):
        self._work = work
        self._environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "NUMBA_CACHE_DIR": scratch,
            "TMPDIR": scratch,  # mosaicml-streaming leaves lock files there
            "LITDATA_DISABLE_VERSION_CHECK": "1",  # it would ask the package index
        }

    def take(self, case: Case, **options: Any) -> dict[str, Any]:
        """What `loader_turn.py` measures with these options; SystemExit with its last words when it fails."""
        for path in prepare(case, self._work).iterdir():
            path.read_bytes()  # into the page cache
        work = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self._work).items()}
        task = json.dumps({"case": case.name, "work": work, "started": time.monotonic(), **options})
        command = [sys.executable, HERE / "loader_turn.py", task]
        try:
            done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=TURN_SECONDS)
        except subprocess.TimeoutExpired as error:
            words = (error.stderr or b"")[-2000:].decode(errors="replace")
            raise SystemExit(f"{case.name}: no figures within {TURN_SECONDS} s:\n{words}") from error
        if done.returncode:
            raise SystemExit(f"{case.name} failed (status {done.returncode}):\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def check(cases: Sequence[Case], work: Work, turns: Turns) -> tuple[dict[str, float], int]:
    """Seconds from each case's first process to its first batch, and the bytes of one sample's tensors.

    SystemExit with everything that differs when a case's batch is not the cpu loader's.
    """
    seconds, red, num_bytes = {}, [], 0
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "batch.pt"
            seconds[case.name] = turns.take(case, gate=str(path))["process_to_first_batch_s"]
            batch = torch.load(path)
        red += [f"{case.name}: {problem}" for problem in gate_problems(batch, work)]
        tensors = [*batch["values"].values(), *batch["valid"].values()]
        num_bytes = sum(tensor.nbytes for tensor in tensors) // len(batch["rows"])
    if red:
        raise SystemExit("\n".join(["no figures: these batches are not what the cpu loader gives", *red]))
    return seconds, num_bytes


Samples = dict[str, list[float]]


def measure(
    cases: Sequence[Case], work: Work, turns: Turns, options: argparse.Namespace, delivered_bytes: int
) -> tuple[dict[str, Samples], Samples]:
    """Every figure of every case, and of the machine's limits, round after round."""
    console = Console(highlight=False)
    samples: dict[str, Samples] = {case.name: defaultdict(list) for case in cases}
    bounds: Samples = defaultdict(list)
    for number in range(options.rounds):
        for case in cases:
            result = turns.take(case, num_workers=options.num_workers, seconds=options.seconds)
            rates = result.pop("samples_per_s")
            for key, value in [*result.items(), *rates.items()]:
                samples[case.name][key].append(value)
            rounded = " and ".join(f"{rate:,.0f}" for rate in rates.values())
            console.print(f"round {number + 1} of {options.rounds}: {case.name}: {rounded} samples/s")
        for key, value in limits(prepare(LZ4, work), prepare(RAW, work), delivered_bytes, work.batch_size).items():
            bounds[key].append(value)
    return samples, bounds


def summary(case: Case, samples: Samples, work: Work, written_bytes: int, tile_bytes: int) -> dict[str, Any]:
    """The record's entry of a case."""
    rates = {key: values for key, values in samples.items() if key.isdigit()}
    return {
        "ours": case.is_ours,
        "samples_per_s": {key: spread(values) for key, values in rates.items()},
        "decoded_mb_per_s": {key: spread([value * tile_bytes / 1e6 for value in values]) for key, values in rates.items()},
        "process_to_first_batch_s": spread(samples["process_to_first_batch_s"]),
        "open_to_first_batch_s": spread(samples["open_to_first_batch_s"]),
        "bytes_per_tile": written_bytes / work.num_tiles,
        "bytes_per_tile_in_use": folder_bytes(work.folder / case.files) / work.num_tiles,
    }


def folder_bytes(folder: Path, with_inflated: bool = True) -> int:
    """Size of a folder's files, those that a loader has inflated beside their compressed selves too or not."""
    paths = [path for path in folder.iterdir() if with_inflated or not path.with_name(f"{path.name}.zstd").exists()]
    return sum(path.stat().st_size for path in paths)


def run(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Kind, case and results of the record."""
    console = Console(highlight=False)
    chosen = GPU_CASES if options.device == "cuda" else CASES
    left_out = {case.name: case.missing() for case in chosen if case.missing()}
    for name, modules in left_out.items():
        console.print(f"left out: {name} (not installed: {', '.join(modules)})")
    cases = [case for case in chosen if case.name not in left_out and (not options.only or options.only in case.name)]
    if not cases:
        raise SystemExit(f"no case to measure; there are {', '.join(case.name for case in chosen)}")
    work = Work(options.source.resolve(), folder.resolve(), options.repeats, options.batch_size, options.img_size)
    written: dict[str, int] = {}
    for case in (HDF5, RAW, LZ4, *cases):  # RAW is what the gate compares with, both codecs what the limits are measured on
        if case.files not in written:
            started = time.perf_counter()
            written[case.files] = folder_bytes(prepare(case, work), with_inflated=False)
            console.print(f"{case.files}: {written[case.files] / 1e6:,.0f} MB in {time.perf_counter() - started:.1f} s")
    with tempfile.TemporaryDirectory(prefix="loader-turns-") as scratch:
        turns = Turns(work, scratch)
        first_ever, delivered_bytes = check(cases, work, turns)
        samples, bounds = measure(cases, work, turns, options, delivered_bytes)
    tile_bytes = decoded_bytes(work.original)
    case = {
        "command": "python benchmarks/loader.py --device cuda" if options.device == "cuda" else "make bench-peers",
        "source": work.original.name,
        "num_tiles": work.num_tiles,
        "repeats": work.repeats,
        "tile_size_px": ShardReader(prepare(RAW, work), "train").manifest.tile_size_px,
        "img_size_px": work.img_size_px,
        "batch_size": work.batch_size,
        "modalities": list(TARGETS),
        "transform": "random crop and flips shared by the maps, normalisation by product level, class ids, valid flags",
        "decoded_bytes_per_tile": tile_bytes,
        "delivered_bytes_per_sample": delivered_bytes,
        "page_cache": "warm: the files are read once before every turn",
        "rounds": options.rounds,
        "seconds": options.seconds,
        "gate": f"a batch of every case equals the cpu loader's: integers and flags exactly, floats to {ULPS} ulp",
        "packages": {name: installed_version(name) for name in PACKAGES},
    }
    if options.device == "cuda":
        case["target_samples_per_s"] = GPU_TARGET
    results = {
        "cases": {
            c.name: summary(c, samples[c.name], work, written[c.files], tile_bytes)
            | {"first_process_to_first_batch_s": first_ever[c.name]}
            for c in cases
        },
        "left_out": left_out,
        "limits": {key: spread(values) for key, values in bounds.items()},
    }
    return ("loader on a GPU" if options.device == "cuda" else "loader"), case, results


def installed_version(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; what the device decides is filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=HERE.parent.parent / "shared" / "data" / "data_real_v001")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="keep the files here for the next time (default: a temporary folder)")
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--repeats", type=int, default=21, help="of the tiles; 21 times 361 tiles are 2 GB")
    parser.add_argument("--img-size", type=int, default=56)
    parser.add_argument("--batch-size", type=int, help="default: 64, on a GPU 512")
    parser.add_argument(
        "--num-workers", type=int, nargs="+", help="the first of them starts cold; default: 2 1, on a GPU 8 2"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement, at least")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args(arguments)
    is_cuda = options.device == "cuda"
    options.batch_size = options.batch_size or (512 if is_cuda else 64)
    options.num_workers = options.num_workers or ([8, 2] if is_cuda else [2, 1])
    return options


def main() -> None:
    """Measure, show the table, write the record."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no CUDA GPU; nothing was measured")
    if not options.no_record:
        clean_commit()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-benchmark-")))
        what, case, results = run(options, folder)
    print(f"\n{table(results['cases'])}\n")
    for name, value in results["limits"].items():
        print(f"{name}: {value['median']:,.1f}")
    if not options.no_record:
        print(f"record: {write_record(what, case, results)}")


if __name__ == "__main__":
    main()
