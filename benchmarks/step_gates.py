"""Gates of a training step: two steps give the same bits, and so does its replay from a CUDA graph.

python benchmarks/step_gates.py                     (one CUDA GPU; status 1 when a gate is red)
python benchmarks/step_gates.py --device cpu --tiny
"""

import argparse
import sys

import torch
from gpu_timing import WARMUP_RUNS, Captured
from step_cases import MASK_RATIO, autocast
from synthetic import random_visible, synthetic_batch
from torch import Tensor

from mpmae.models.presets import create_model


def problems(device: torch.device, patch_size: int, batch_size: int, num_patches_side: int) -> list[str]:
    """What is wrong with the steps of a small model; nothing when all gates are green."""
    torch.manual_seed(0)
    model = create_model("mpmae_atto", img_size=num_patches_side * patch_size, patch_size=patch_size).to(device)
    batch = synthetic_batch(model, batch_size, device)
    visible = random_visible(batch_size, model.num_patches, MASK_RATIO, device)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients() -> tuple[Tensor, ...]:
        with autocast(device):
            loss = model(batch, visible).loss
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    first = [t.clone() for t in gradients()]
    found = []
    if not all(t.isfinite().all() for t in first):
        found.append("not all gradients are finite")
    found += differences("a second step", first, gradients(), names)
    if device.type == "cuda":
        replay = Captured(gradients)
        for _ in range(WARMUP_RUNS):
            for t in replay.outputs:
                t.fill_(torch.nan)
            found += differences("a replay of the graph", first, replay(), names)
    return found


def differences(what: str, wanted: list[Tensor], got: tuple[Tensor, ...], names: tuple[str, ...]) -> list[str]:
    """The names of what is not bit for bit the same."""
    pairs = zip(("loss", *names), wanted, got, strict=True)
    wrong = [name for name, a, b in pairs if not torch.equal(a, b)]
    return [f"{what} gives other bits for {len(wrong)} of {len(wanted)}: {', '.join(wrong[:5])}"] if wrong else []


def main() -> int:
    """Check both geometries; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two samples of 3 x 3 patches")
    options = parser.parse_args()
    batch_size, side = (2, 3) if options.tiny else (64, 7)
    red = False
    for patch_size in (8, 16)[: 1 if options.tiny else 2]:
        found = problems(torch.device(options.device), patch_size, batch_size, side)
        print(f"step gates, patch {patch_size}: {'; '.join(found) or 'green'}", flush=True)
        red |= bool(found)
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
