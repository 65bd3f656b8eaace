"""Timing of ways to do the same thing: in turns, in one process, by CUDA events (on a CPU by the clock, as a smoke test).

On a GPU each run is a replay of a CUDA graph, so that Python's launch gaps stay out of the numbers, and a write of more than
the L2 goes before it: inputs come from memory, and the lines that a run leaves unwritten are made up for by those it finds.
"""

import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]
FLUSH_BYTES = 1 << 28
WARMUP_RUNS = 3


class Timer:
    """Times runs on a device; `seconds` is about what the turns of one call of `alternate` may take."""

    def __init__(self, device: torch.device, seconds: float = 0.5, min_runs: int = 7, max_runs: int = 100):
        self.device, self.seconds, self.min_runs, self.max_runs = device, seconds, min_runs, max_runs
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device.type == "cuda" else None

    def alternate(self, runs: dict[str, Run]) -> dict[str, list[float]]:
        """Milliseconds of every measured run by name: all take turns, after a warm-up of each."""
        spent = 0.0
        for run in runs.values():
            for _ in range(WARMUP_RUNS if self.flush is not None else 1):
                last = self._once(run)
            spent += last
        turns = int(1e3 * self.seconds / max(spent, 1e-6))
        turns = max(self.min_runs, min(self.max_runs, turns))
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                samples[name].append(self._once(run))
        return samples

    def _once(self, run: Run) -> float:
        if self.flush is None:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


class Captured:
    """A run as a CUDA graph; `outputs` are its results, overwritten by each replay.

    pool: memory shared with other graphs that never run at the same time.
    """

    def __init__(self, run: Run, pool: Any = None):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = run()

    def __call__(self) -> Any:
        """Replay; the outputs are those of the capture, filled anew."""
        self.graph.replay()
        return self.outputs


def ceilings(timer: Timer, tiny: bool) -> dict[str, list[float]]:
    """Measured rates of the device: `copy_bytes_per_s`, read and written, and `matrix_flops_per_s` of bf16 products."""
    num_bytes, side = (1 << 20, 64) if tiny else (1 << 32, 8192)
    source = torch.randint(0, 1 << 30, (num_bytes // 4,), dtype=torch.int32, device=timer.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=timer.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    ms = timer.alternate({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)})
    return {
        "copy_bytes_per_s": [2e3 * num_bytes / value for value in ms["copy"]],
        "matrix_flops_per_s": [2e3 * side**3 / value for value in ms["product"]],
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the device says of itself."""
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "driver": None}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        driver = None
    return {
        "name": properties.name,
        "driver": driver,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
    }
