"""What a training step costs on this machine: images/s and where the time goes, at one and two ranks.

python benchmarks/step.py                      (atto, 56 px, patch 8, fp32, DDP; writes a record)
python benchmarks/step.py --rounds 1 --steps 5 --no-record
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from record import clean_commit, spread, write_record
from rich.console import Console
from rich.table import Table
from torch import multiprocessing

from mpmae.config import DataSection, RunConfig, load_config
from mpmae.engine import create_engine, init_world
from mpmae.loader import ExactOrder, TrainOrder, plan_batches
from mpmae.masking import draw_visible
from mpmae.train.data import open_loader, open_reader
from mpmae.train.demo_data import ensure_demo_shards
from mpmae.train.plan import make_order
from mpmae.train.setup import build_model

CASES = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
PHASES = ("data wait", "forward", "backward", "optimizer")


def time_forward_parts(model: torch.nn.Module, seconds: dict[str, list[float]]) -> None:
    """Hooks that append the forward time of stem, stages (with their downsampling) and decoder to `seconds`."""
    parts = {"stem": model.encoder.stem, "decoder block": model.decoder}
    parts |= {f"stage {i}": block for i, stage in enumerate(model.encoder.stages) for block in [stage]}
    for name, part in parts.items():
        blocks = list(part) if isinstance(part, torch.nn.ModuleList) else [part]
        started: list[float] = []
        blocks[0].register_forward_pre_hook(lambda *_, s=started: s.append(time.perf_counter()))
        blocks[-1].register_forward_hook(lambda *_, s=started, n=name: seconds[n].append(time.perf_counter() - s.pop()))


def worker(rank: int, world_size: int, threads: int, port: int, config: RunConfig, steps: int, output: str) -> None:
    """One rank of one case; rank 0 writes its timings as JSON."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    torch.set_num_threads(threads)
    world = init_world("ddp")
    torch.set_num_threads(threads)
    reader = open_reader(config, "train")
    model = build_model(config, reader.manifest)
    plan = plan_batches(config.train.global_batch_size, None, world_size)
    engine = create_engine(config, model, world, None, plan.num_micro_steps, plan.micro_batch_size)
    loader = open_loader(config, reader, training=True)
    order = make_order(config, reader.manifest)
    seconds: dict[str, list[float]] = defaultdict(list)
    batches = loader.training(order, plan, rank, 0)
    for step in range(steps + 3):
        if step == 3:  # the first steps warm up caches and allocators
            seconds.clear()
            time_forward_parts(model, seconds)
        marks = [time.perf_counter()]
        epoch, batch = next(batches)
        visible = draw_visible(0, epoch, batch.sample_ids, model.num_patches, model.num_visible)
        marks.append(time.perf_counter())
        out = engine.forward(batch, visible)
        marks.append(time.perf_counter())
        engine.backward(out.loss)
        marks.append(time.perf_counter())
        engine.step(1e-4)
        marks.append(time.perf_counter())
        for name, (begin, end) in zip(PHASES, itertools.pairwise(marks), strict=True):
            seconds[name].append(end - begin)
        seconds["step"].append(marks[-1] - marks[0])
    if rank == 0:
        Path(output).write_text(json.dumps(seconds))
    batches.close()
    engine.close()
    world.close()


def run_case(world_size: int, threads: int, config: RunConfig, steps: int) -> dict[str, list[float]]:
    """Seconds by phase of every step of one fresh group of processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "seconds.json")
        multiprocessing.spawn(worker, (world_size, threads, port, config, steps, output), nprocs=world_size)
        return json.loads(Path(output).read_text())


def loader_rate(config: RunConfig, num_samples: int) -> float:
    """Samples/s of the loader alone, everything in the page cache."""
    reader = open_reader(config, "train")
    loader = open_loader(config, reader, training=True)
    batches = loader.training(TrainOrder(ExactOrder(len(reader)), 32, 0), plan_batches(32, None, 1), 0, 0)
    for _ in itertools.islice(batches, 4):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(batches, num_samples // 32):
        pass
    elapsed = time.perf_counter() - started
    batches.close()
    return num_samples // 32 * 32 / elapsed


def summarise(seconds: dict[str, list[float]], global_batch_size: int) -> dict[str, Any]:
    """images/s and milliseconds by phase of one case."""
    ms = {name: spread([1e3 * s for s in samples]) for name, samples in seconds.items()}
    return {"images_per_s": spread([global_batch_size / s for s in seconds["step"]]), "ms": ms}


def show(console: Console, cases: dict[str, Any], rate: float) -> None:
    """Print the results as a table."""
    table = Table(title="Training step, median ms")
    names = [*PHASES, "step", "stem", "stage 0", "stage 1", "stage 2", "stage 3", "decoder block"]
    for column in ("case", "images/s", *names):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case, result in cases.items():
        medians = [f"{result['ms'][name]['median']:.0f}" for name in names]
        table.add_row(case, f"{result['images_per_s']['median']:.0f}", *medians)
    console.print(table)
    console.print(f"loader alone, 2 threads, all modalities: {rate:.0f} samples/s")


def main() -> None:
    """Measure all cases in turn, several rounds, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=DataSection().shards)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="measured steps per case and round")
    parser.add_argument("--batch", type=int, default=64, help="global batch")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    if not options.no_record:
        clean_commit()
    ensure_demo_shards(options.shards)
    arguments = [f"data.shards={options.shards}", f"train.global_batch_size={options.batch}"]
    config = load_config(None, [*arguments, "data.num_workers=1"])
    samples: dict[str, dict[str, list[float]]] = {case: defaultdict(list) for case in CASES}
    console = Console(width=200)
    for number in range(options.rounds):  # cases alternate, so that a noisy spell does not fall on one alone
        for case, (world_size, threads) in CASES.items():
            console.print(f"round {number + 1}/{options.rounds}: {case}")
            for name, values in run_case(world_size, threads, config, options.steps).items():
                samples[case][name] += values
    cases = {case: summarise(seconds, options.batch) for case, seconds in samples.items()}
    rate = loader_rate(load_config(None, [*arguments, "data.num_workers=2"]), 640)
    show(console, cases, rate)
    if not options.no_record:
        medians = {case: statistics.median(samples[case]["step"]) for case in CASES}
        results = {
            "cases": cases,
            "loader_alone_samples_per_s": rate,
            "speedup_over_1_rank_1_thread": {c: medians["1 rank, 1 thread"] / m for c, m in medians.items()},
        }
        settings = {"model": "mpmae_atto", "img_size": 56, "patch_size": 8, "engine": "ddp", "precision": "fp32"}
        settings |= {"global_batch_size": options.batch, "rounds": options.rounds, "steps": options.steps, "warmup_steps": 3}
        print(f"record: {write_record('training step', settings, results)}")


if __name__ == "__main__":
    main()
