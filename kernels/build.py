"""Fill a cache of compiled CUDA kernels before a run, on a machine with or without a GPU.

    python -m mpmae.kernels.build --arch sm_80 sm_90 --folder /shared/kernels --dims 40 80 160 320 --decoder-dim 512

compiles what a model of these sizes asks for with `MPMAE_KERNEL_CACHE=/shared/kernels`: the encoder's stages and the
decoder's grid, at the patches per side, visible patches and batch size given. What a run then finds missing it compiles.
"""

import argparse
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from mpmae.kernels import cuda_driver, kernel_cache
from mpmae.kernels.cuda_runtime import Specialisation, compiled_for

# each offers specialisations(case, architecture), an iterable of `Specialisation`; architecture: 80, 90, ...
PLANS = ("mpmae.kernels.depthwise.cuda",)
PLANNED = (80, 90)
FIRST_TILE_SIDE = 8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """One use of the ops: N samples of V visible patches of G*G, tiles of s*s sites, C channels, activations of a dtype."""

    num_samples: int
    num_visible: int
    num_patches_side: int
    tile_side: int
    channels: int
    dtype: torch.dtype


def cases(
    dims: Sequence[int],
    decoder_dim: int,
    *,
    num_samples: int,
    num_visible: int,
    num_patches_side: int,
    dtypes: Iterable[torch.dtype],
) -> Iterator[Case]:
    """The uses that a model makes of the ops: one per encoder stage, and the decoder's whole grid."""
    for dtype in dtypes:
        for stage, dim in enumerate(dims):
            yield Case(num_samples, num_visible, num_patches_side, FIRST_TILE_SIDE >> stage, dim, dtype)
        yield Case(num_samples, num_patches_side**2, num_patches_side, 1, decoder_dim, dtype)


def specialisations(wanted: Iterable[Case], target: str) -> list[Specialisation]:
    """What has to be compiled for these uses on an architecture ("sm_90"), each once."""
    architecture = int(target.removeprefix("sm_"))
    plans = [importlib.import_module(name) for name in PLANS]
    found = {}
    for case in wanted:
        for plan in plans:
            for item in plan.specialisations(case, architecture):
                found[item.source_path, item.kernel_name, tuple(sorted(item.defines.items()))] = item
    return list(found.values())


def build(wanted: Sequence[Case], targets: Iterable[str], folder: Path) -> int:
    """Compile for each target ("sm_90") into `folder`; the number of kernels that are now in it."""
    jobs = [(item, target) for target in targets for item in specialisations(wanted, target)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs outside of the interpreter's lock
        for _ in pool.map(lambda job: compiled_for(*job, folder), jobs):
            pass
    return len(jobs)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mpmae.kernels.build", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], help="architectures, as sm_90")
    parser.add_argument("--folder", type=Path, default=None, help="the cache to fill; default: the one that runs look in")
    parser.add_argument("--dims", nargs="+", type=int, default=[40, 80, 160, 320], help="channels of the encoder's stages")
    parser.add_argument("--decoder-dim", type=int, default=512)
    parser.add_argument("--num-patches-side", type=int, default=7)
    parser.add_argument("--num-visible", type=int, default=19, help="visible patches of a sample")
    parser.add_argument("--batch-size", type=int, default=256, help="samples of a micro batch")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    options = parser.parse_args(arguments)
    cuda_driver.require()
    known = [f"sm_{architecture}" for architecture in cuda_driver.architectures() if architecture in PLANNED]
    unknown = [target for target in options.arch if target not in known]
    if unknown:
        parser.error(f"--arch {' '.join(unknown)}: known ahead of a run are {' '.join(known)}; others compile as they run")
    folder = options.folder or kernel_cache.default_folder()
    wanted = cases(
        options.dims,
        options.decoder_dim,
        num_samples=options.batch_size,
        num_visible=options.num_visible,
        num_patches_side=options.num_patches_side,
        dtypes=[DTYPES[name] for name in options.dtypes],
    )
    number = build(list(wanted), options.arch, folder)
    print(f"{number} kernels for {' '.join(options.arch)} in {folder}")


if __name__ == "__main__":
    main()
