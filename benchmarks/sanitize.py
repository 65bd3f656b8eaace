"""Every kernel once on small problems, for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py
python benchmarks/sanitize.py --device cpu

All stages, 3 visible patches of 3 x 3, channels that leave remainders. Nothing runs but our kernels, what they call and what
draws their inputs, since the tools follow every kernel; right or wrong is for the tests to say. Status 1 when an output is
not finite or a kernel fails, 2 when there is none of ours to run. A hazard that racecheck reports in a kernel of cuBLAS
(its name holds "nvjet", "cutlass" or "gemm") is not ours.
"""

import argparse
import sys

import torch
from depthwise_cases import OPERATIONS as DEPTHWISE
from depthwise_cases import depthwise_case
from kernel_cases import Case, Setting
from module_cases import downsample_case, heads_case, stem_case
from pointwise_cases import OPERATIONS as POINTWISE
from pointwise_cases import pointwise_case

CHANNELS = (40, 72)


def small_cases(setting: Setting) -> dict[str, Case]:
    """One case for each kernel and stage."""
    cases = {}
    for tile_side, channels in zip((8, 4, 2, 1), CHANNELS * 2, strict=True):
        for operation in DEPTHWISE:
            cases[f"depthwise {operation}, s={tile_side}"] = depthwise_case(setting, operation, channels, tile_side)
        if tile_side <= 2:
            for operation in POINTWISE:
                cases[f"pointwise {operation}, s={tile_side}"] = pointwise_case(setting, operation, channels, tile_side)
    cases["stem"] = stem_case(setting, "atto")
    cases["downsample"] = downsample_case(setting, "atto", 2)
    cases["heads and losses"] = heads_case(setting, "atto")
    return cases


def main() -> int:
    """Run each of ours; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    setting = Setting(device, torch.bfloat16, 3, 2, 3, 24, False)
    num_run, red = 0, False
    for name, case in small_cases(setting).items():
        for way, how in case.ways.items():
            if not how.ours:
                continue
            num_run += 1
            try:
                problem = None if all(t.isfinite().all() for t in how.packed(how.run())) else "not finite"
            except Exception as error:  # the next kernel is to run all the same
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            red |= problem is not None
            print(f"{name}, {way}: {problem or 'ran'}", flush=True)
        for way, why in case.missing.items():
            print(f"{name}, {way}: not run, {why}", flush=True)
    print(f"{num_run} kernels run")
    return int(red) if num_run else 2


if __name__ == "__main__":
    sys.exit(main())
