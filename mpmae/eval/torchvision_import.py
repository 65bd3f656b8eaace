"""torchmetrics and timm import torchvision where it is installed, also for parts that use nothing of it."""

import importlib.util
from importlib import metadata

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def let_torchvision_import() -> None:
    """Lets a torchvision built for CUDA (PyPI's) import beside a CPU build of torch, which it otherwise refuses to.

    Its compiled operators cannot load there; on import it registers output shapes for two of them whether they are there
    or not, so they are declared first. Calling them still fails. Does nothing where the two fit, or torchvision is absent.
    """
    if torch.version.cuda or importlib.util.find_spec("torchvision") is None:
        return
    if "+cpu" in metadata.version("torchvision") or hasattr(torch.ops.torchvision, "nms"):
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", _SCHEMA)
