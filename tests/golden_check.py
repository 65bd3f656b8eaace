"""Run `python -m tests.golden_check DIR [CASE...]` to compare our models with the golden numbers of the published code.

DIR holds manifest.json and <case>.safetensors (see the README of the golden set). One line per case and precision, and one
per table of rates, parameter groups and initial weights; exit status 1 if any fails. Kinds of cases that this project has no
model for are skipped, which is said and is no failure. Tolerances: float64 predictions 1e-6 absolute, losses 1e-9, gradient
norms and trajectories 1e-7 relative; float32 5e-5, 1e-5, 1e-3, 1e-4.
"""

import logging
import sys
import time
from pathlib import Path

import torch

from tests.golden_cases import TOLERANCES, Case, Findings, read_manifest
from tests.golden_dense import check_dense
from tests.golden_fcmae import check_fcmae
from tests.golden_multimae import check_multimae, check_multimae_losses
from tests.golden_tables import check_tables


def cases(folder: Path) -> list[str]:
    """The cases of a set whose file is there, in the manifest's order."""
    return [name for name, entry in read_manifest(folder)["cases"].items() if (folder / entry["file"]).is_file()]


def kind_of(entry: dict) -> str | None:
    """ "fcmae" (MP-MAE), "multimae", its "multimae_losses", "dense" (classifier, U-Net), or None for something else."""
    if "loss_order" in entry and "params" in entry:
        return "fcmae"
    if "token_order" in entry:
        return "multimae"
    if set(entry) == {"file", "loss", "note"}:
        return "multimae_losses"
    return "dense" if str(entry.get("model", "")).startswith("convnextv2_") else None


def check(folder: Path, name: str, dtype: torch.dtype, trajectory: bool = True) -> Findings:
    """What our model gives for a case against what the published code gave; `trajectory`: with its training steps."""
    case = Case(folder, name)
    kind = kind_of(case.entry)
    assert kind, f"{name} is of no kind that can be checked"
    if kind == "multimae_losses":
        return check_multimae_losses(case, dtype)
    if kind == "multimae":
        return check_multimae(case, dtype, trajectory)
    return check_fcmae(case, dtype, trajectory) if kind == "fcmae" else check_dense(case, dtype)


def main(arguments: list[str]) -> int:
    """Exit status: 0 when every case that can be checked holds in float64 and float32."""
    if not arguments:
        print(__doc__.split("\n\n", 1)[0], file=sys.stderr)
        return 2
    folder, names = Path(arguments[0]), arguments[1:]
    entries = read_manifest(folder)["cases"]
    unknown = [name for name in names if name not in entries]
    if unknown:
        print(f"{folder} has no case {', '.join(unknown)}; it has {', '.join(entries)}", file=sys.stderr)
        return 2
    status = 0
    present = cases(folder)
    for name in names or entries:
        if name not in present:
            print(f"{name}: absent: no file {entries[name]['file']}")
            status |= bool(names)
            continue
        if kind_of(entries[name]) is None:
            print(f"{name}: skipped: this project has no model of that kind")
            continue
        for dtype in TOLERANCES:
            status |= _report(folder, name, dtype)
    tables = {} if names else check_tables(folder)
    for name, failures in tables.items():
        status |= _verdict(name, failures)
    return status


def _report(folder: Path, name: str, dtype: torch.dtype) -> bool:
    """Prints the line of a case; whether it failed."""
    start = time.perf_counter()
    found = check(folder, name, dtype)
    worst = ", ".join(f"{kind} {error:.1e}" for kind, error in found.worst.items())
    detail = f" ({worst}; {time.perf_counter() - start:.0f} s)"
    return _verdict(f"{name} {str(dtype).removeprefix('torch.')}", found.failures, detail)


def _verdict(what: str, failures: list[str], detail: str = "") -> bool:
    print(f"{what}: {'FAILED' if failures else 'ok'}{detail}", flush=True)
    for failure in failures[:8]:
        print(f"    {failure}")
    return bool(failures)


if __name__ == "__main__":
    logging.getLogger("mpmae").setLevel(logging.ERROR)  # a line per case and no more
    sys.exit(main(sys.argv[1:]))
