"""From tiles to a trained model and a report in a few minutes, on whatever machine this is.

python launch/demo.py                                  (= make demo: a synthetic set in MMEarth's layout)
MMEARTH_DIR=path/to/data_100k_v001 python launch/demo.py

A second run reuses the shards and the run that are there.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from mpmae.config import DataSection
from mpmae.errors import MpmaeError, SourceError
from mpmae.shard_files import load_manifest
from mpmae.shard_format import MANIFEST_NAME, Manifest
from mpmae.shard_tools.source import MMEarthSource
from mpmae.train import ensure_demo_shards

REPO = Path(__file__).resolve().parents[1]
LARGE_H5_BYTES = 2e9
BUILD_BYTES_PER_S = 40e6  # HDF5 bytes through `mpmae-shards build`, on real tiles and one core; README has the sets' hours
console = Console(highlight=False)


def run(title: str, shown: str, *command: str) -> None:
    """Run a command of this project, showing it as a user would type it; SystemExit with its status when it fails."""
    console.rule(f"[bold]{title}", align="left")
    console.print(f"$ {shown} {shlex.join(command)}", style="dim", soft_wrap=True)
    programs = {
        "mpmae-shards": ["-m", "mpmae.shard_tools"],
        "mpmae-report": ["-m", "mpmae.report"],
        "deepspeed": ["-m", "deepspeed.launcher.runner"],
    }
    quiet = {} if torch.cuda.device_count() else {"DS_ACCELERATOR": "cpu"}  # else the launcher warns that it found no GPU
    full = [sys.executable, *programs[shown], *command]
    status = subprocess.run(full, cwd=REPO, env=os.environ | quiet).returncode
    if status:
        console.print(f"[red]{shown} failed with status {status}; its message is above[/red]")
        raise SystemExit(status)


def shards_of(source: Path, output: Path) -> Manifest:
    """The shard set of a source folder, built unless an up-to-date one is there."""
    with MMEarthSource(source) as tiles:
        if (output / MANIFEST_NAME).is_file() and load_manifest(output).source.fingerprint == tiles.fingerprint:
            console.print(f"shards of {source} are there: {output}")
            return load_manifest(output)
        num_bytes = tiles.h5_path.stat().st_size
    if num_bytes > LARGE_H5_BYTES:
        console.print(f"[yellow]note:[/yellow] {resharding_cost(num_bytes, output)}", soft_wrap=True)
    run("1. Shards", "mpmae-shards", "build", str(source), str(output), "--overwrite")
    return load_manifest(output)


def resharding_cost(num_bytes: int, output: Path) -> str:
    """What building the shards of an HDF5 file of `num_bytes` takes, in time and disk."""
    hours = num_bytes / BUILD_BYTES_PER_S / 3600
    return (
        f"resharding {num_bytes / 1e9:.0f} GB takes about {hours:.1f} h (at {BUILD_BYTES_PER_S / 1e6:.0f} MB/s on one core, "
        f"see README, With MMEarth; a slow disk takes longer) and about as much disk again in {output}; Ctrl-C stops it"
    )


def ranks() -> tuple[int, str]:
    """How many ranks to start and the words for it: two, except where there is exactly one GPU."""
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1:
        return 1, "1 rank (this machine has one GPU)"
    return 2, "2 ranks on 2 GPUs" if num_gpus else "2 ranks on the CPU (no GPU)"


def main() -> int:
    """Shards, pretraining, report; the exit status."""
    os.chdir(REPO)
    source = os.environ.get("MMEARTH_DIR")
    try:
        if source:
            if not Path(source).is_dir():
                raise SourceError(f"MMEARTH_DIR = {source} is not a folder; it must hold NAME.h5 and its three JSON files")
            name = Path(source).resolve().name
            shards = Path("build/demo") / name
            manifest = shards_of(Path(source), shards)
        else:
            shards = DataSection().shards
            ensure_demo_shards(shards)
            manifest = load_manifest(shards)
            name = "synthetic"
    except MpmaeError as error:
        console.print(f"[red]error:[/red] {error}")
        return 2
    run_dir = Path("runs") / f"demo-{name}-{manifest.fingerprint[:8]}"
    arguments = ["--ds-config", "configs/ds/zero2.json", "--config", "configs/run/demo.yaml", "--resume", "auto"]
    arguments += [f"data.shards={shards}", f"run.dir={run_dir}"]
    num_ranks, words = ranks()
    launcher = ["--num_gpus", str(num_ranks), "--quiet"]
    run(f"2. Pretraining, {words}, ZeRO-2", "deepspeed", *launcher, "launch/pretrain.py", *arguments)
    run("3. Report", "mpmae-report", str(run_dir))
    console.rule("[bold]Made", align="left")
    console.print(f"shards        {shards}  ({sum(map(manifest.num_samples, manifest.splits))} tiles)")
    console.print(f"run           {run_dir}  (metrics.jsonl, validation.jsonl, run.json, checkpoints/)")
    console.print(f"report        {run_dir / 'report.html'}  <- open this in a browser")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the command that was running has said so
        sys.exit(130)
