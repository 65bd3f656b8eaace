"""launch/pretrain.py with a fault built in: python tests/train/faulty.py FAULT RANK STEP [arguments of pretrain.py].

The fault happens on rank RANK (-1: on all) in every step from STEP (counted from 0) on; FAULT names a function of this file.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpmae.loader import CpuLoader
from mpmae.models import MPMAEOutput
from mpmae.train import loop, start_checks

FOREVER_S = 600
running = {"step": 0}


def sleep_in_loader(first: int) -> None:
    original = CpuLoader.training

    def training(self, *arguments):
        for item in original(self, *arguments):
            if running["step"] >= first:
                time.sleep(FOREVER_S)
            yield item

    CpuLoader.training = training


def sleep_in_forward(first: int) -> None:
    before(loop.Run, "_visible", first, lambda: time.sleep(FOREVER_S))


def sleep_in_backward(first: int) -> None:
    before(loop, "with_loud_gradient", first, lambda: time.sleep(FOREVER_S))


def out_of_memory(first: int) -> None:
    before(loop.Run, "_visible", first, lambda: torch.empty(2**50))


def raise_an_error(first: int) -> None:
    def fail():
        raise ValueError("a bug of this rank alone")

    before(loop.Run, "_visible", first, fail)


def infinite_loss(first: int) -> None:
    """On this rank; its gradient stays finite."""
    original = loop.create_engine

    def create_engine(*arguments):
        engine = original(*arguments)
        forward = engine.forward

        def changed(*inputs) -> MPMAEOutput:
            out = forward(*inputs)
            if not torch.is_grad_enabled() or running["step"] < first:
                return out
            return out._replace(loss=out.loss + torch.inf, losses=out.losses | {"biome": out.losses["biome"] + torch.inf})

        engine.forward = changed
        return engine

    loop.create_engine = create_engine


def other_code(first: int) -> None:
    start_checks.source_digest = lambda: "changed"


def before(owner: Any, name: str, first: int, action: Callable[[], Any]) -> None:
    """Have `action` done before the function, from a step on."""
    original = getattr(owner, name)

    def patched(*arguments):
        if running["step"] >= first:
            action()
        return original(*arguments)

    setattr(owner, name, patched)


def keep_count() -> None:
    original = loop.Run._step

    def counted(self, step, micro_batches):
        running["step"] = step
        return original(self, step, micro_batches)

    loop.Run._step = counted


if __name__ == "__main__":
    fault, rank, step, *arguments = (each for each in sys.argv[1:] if not each.startswith("--local_rank"))
    keep_count()
    if int(rank) in (-1, int(os.environ.get("RANK", "0"))):
        globals()[fault](int(step))
    sys.argv = ["launch/pretrain.py", *arguments]
    runpy.run_path("launch/pretrain.py", run_name="__main__")
