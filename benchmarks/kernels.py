"""Each kernel alone on a GPU, beside the roofline measured in the same process and beside its baselines.

python benchmarks/kernels.py                          (one CUDA GPU; writes a record)
python benchmarks/kernels.py --seconds 120 --records FOLDER
python benchmarks/kernels.py --device cpu --tiny      (a smoke test, no record)

First a device-to-device copy and a bf16 matrix product give the ceilings. Then, case by case, every way to compute an
operator is compared with float32, ours are run twice for the same bits, and all are timed in turns. A way that fails is
named and not timed, and the exit status is 1. After `--seconds` no case is begun; what was not reached is listed.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from depthwise_cases import OPERATIONS as DEPTHWISE
from depthwise_cases import depthwise_case
from gpu_timing import Captured, Run, Timer, ceilings, device_facts
from kernel_cases import Case, Setting, Way, full_setting, tiny_setting
from kernel_tables import table
from module_cases import downsample_case, heads_case, stem_case
from pointwise_cases import OPERATIONS as POINTWISE
from pointwise_cases import pointwise_case
from record import RECORDS, clean_commit, spread, write_record
from torch import Tensor

from mpmae.models.presets import SIZES

MODELS = ("tiny", "atto", "base")
# of an output's difference from float32, in norm over its norm: what bf16 operands give, and what sums that cancel may give
TOLERANCE, LOOSE = 0.02, 0.1
OURS_OVER_OTHERS = 3.0


def planned(setting: Setting) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The cases in order of worth: a name, and a function that makes it."""
    for size in MODELS if setting.channels is None else MODELS[:1]:
        stages = [(setting.channels or channels, 8 >> stage) for stage, channels in enumerate(SIZES[size][0])]
        for operation in DEPTHWISE:
            for channels, side in stages:
                yield f"depthwise {operation}, {size}, s={side}", partial(depthwise_case, setting, operation, channels, side)
        for operation in POINTWISE:
            for channels, side in stages:
                yield f"pointwise {operation}, {size}, s={side}", partial(pointwise_case, setting, operation, channels, side)
    yield "heads and losses", partial(heads_case, setting, "atto")
    for size in MODELS[:2] if setting.channels is None else MODELS[1:2]:
        yield f"stem, {size}", partial(stem_case, setting, size)
        for stage in range(3):
            yield f"downsample, {size}, s={8 >> stage}", partial(downsample_case, setting, size, stage)


def entry_of(name: str, make: Callable[[], Case], timer: Timer, rates: dict[str, float]) -> dict[str, Any]:
    """The entry of a case in the record; one that cannot be made has failed as a whole."""
    try:
        case = make()
        wanted = [t.float() for t in case.expected()]
    except Exception as error:  # a red case must not take the others with it
        return {"name": name, "goals": {}, "ways": {}, "missing": {}, "failed": {"case": reason(error)}}
    return {"name": name, **measure(case, wanted, timer, rates)}


def measure(case: Case, wanted: list[Tensor], timer: Timer, rates: dict[str, float]) -> dict[str, Any]:
    """Every way of a case that is right, timed; why the others are not."""
    runs, timed, errors, failed = {}, {}, {}, {}
    for way in sorted(case.ways, key=lambda way: case.ways[way].ours):  # the others first: they are the yardstick
        how = case.ways[way]
        try:
            outputs = compared(case, how)
            errors[way] = [relative_error(*pair) for pair in zip(outputs, wanted, strict=True)]
            problem = too_wrong(case, errors, way)
            if not problem and how.ours and not all(map(torch.equal, outputs, compared(case, how))):
                problem = "a second run gave other bits"
            if problem:
                (failed if how.ours else case.missing)[way] = problem
            else:
                runs[way], timed[way] = replayed(how.run, timer.device)
        except torch.OutOfMemoryError:
            case.missing[way] = "does not fit in memory"
        except Exception as error:
            (failed if how.ours else case.missing)[way] = reason(error)
    samples = timer.alternate(runs)
    bandwidth, flops = rates["copy_bytes_per_s"], rates["matrix_flops_per_s"]
    floor_s, bound = case.work.floor_s(bandwidth, flops), case.work.bound(bandwidth, flops)
    ways = {}
    for way, values in samples.items():
        ms = spread(values)
        seconds = ms["median"] / 1e3
        ways[way] = {
            "ms": ms,
            "timed": timed[way],
            "ours": case.ways[way].ours,
            "relative_error": max(errors[way]),
            "copy_fraction": case.work.num_bytes / seconds / bandwidth,
            "matrix_fraction": case.work.matrix_flops / seconds / flops,
            "floor_fraction": floor_s / seconds,
        }
    return {
        **case.facts,
        **case.work._asdict(),
        "floor_ms": 1e3 * floor_s,
        "bound": bound,
        "goals": {key: value for key, value in case.goals.items() if key == "matrix" or bound == "memory"},
        "ways": ways,
        "missing": case.missing,
        "failed": failed,
    }


def reason(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compared(case: Case, way: Way) -> list[Tensor]:
    """The outputs of a way as `expected` gives them; a memory full of NaN comes before, so that nothing unwritten passes."""
    poison()
    outputs = way.packed(way.run())
    if case.probe is not None:
        outputs = [t[case.probe] if i < case.num_activations else t for i, t in enumerate(outputs)]
    return [t.detach().float() for t in outputs]


def poison() -> None:
    """NaN in the blocks that the allocator will hand out next, on a GPU."""
    if torch.cuda.is_available():
        blocks = [torch.full((1 << exponent,), torch.nan, device="cuda") for exponent in range(10, 29)]
        del blocks


def too_wrong(case: Case, errors: dict[str, list[float]], way: str) -> str | None:
    """Which output of a way lies too far from float32, ours by the measure of the other ways; None when none does."""
    others = [errors[name] for name in errors if not case.ways[name].ours]
    for i, error in enumerate(errors[way]):
        allowed = LOOSE
        if case.ways[way].ours:
            allowed = max(TOLERANCE, OURS_OVER_OTHERS * min((other[i] for other in others), default=0))
        if not error <= allowed:
            return f"output {i}: relative error {error:.3g}, expected at most {allowed:.3g}"
    return None


def relative_error(output: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm, NaN for NaN."""
    difference = torch.linalg.vector_norm(output.flatten() - wanted.flatten(), dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(wanted, dtype=torch.float64).clamp(min=1e-30))


def replayed(run: Run, device: torch.device) -> tuple[Run, str]:
    """What to time, and what it is: a replay of a CUDA graph, or on a CPU the call itself."""
    return (Captured(run), "graph") if device.type == "cuda" else (run, "call")


def main() -> int:
    """Measure, print, write the record; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="problems of a few sites, nothing compiled, no record")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=900, help="time for everything")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("kernels.py: no CUDA GPU here; --device cpu --tiny is a smoke test")
    with_record = not (options.tiny or options.no_record)
    if with_record:
        clean_commit()
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 256  # one compiled version for each shape
    setting = (tiny_setting if options.tiny else full_setting)(device)
    timer = Timer(device, seconds=0.02 if options.tiny else 0.25, min_runs=2 if options.tiny else 7)
    rates = {name: spread(values) for name, values in ceilings(timer, options.tiny).items()}
    copy, matrix = (rate["median"] for rate in rates.values())
    print(f"copy {copy / 1e9:,.0f} GB/s read and written, bf16 products {matrix / 1e12:,.1f} TFLOP/s", flush=True)
    entries, not_reached = [], []
    for name, make in planned(setting):
        if options.only not in name:
            continue
        if time.monotonic() - started > options.seconds:
            not_reached.append(name)
            continue
        entries.append(entry_of(name, make, timer, {key: rate["median"] for key, rate in rates.items()}))
        print("\n".join(table(entries[-1:])[1:]), flush=True)
        gc.collect()  # graphs and their memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n=== summary\n" + "\n".join(table(entries)))
    if not_reached:
        print(f"not reached in {options.seconds:.0f} s: {'; '.join(not_reached)}")
    failed = [entry["name"] for entry in entries if entry["failed"]]
    if with_record:
        case = {"dtype": "bfloat16", "mask_ratio": 0.6, "setting": {k: str(v) for k, v in setting._asdict().items()}}
        results = {"device": device_facts(device), "rates": rates, "cases": entries, "not_reached": not_reached}
        print(f"record: {write_record('gpu kernels', case, results, options.records, failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
