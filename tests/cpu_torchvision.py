"""timm, torchgeo and TerraTorch import torchvision, whose wheel on PyPI is built for CUDA."""

import importlib.util
from importlib import metadata

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def let_it_import() -> None:
    """Lets that wheel import beside a CPU build of torch, where its operators (which nothing here uses) cannot load.

    On import it registers output shapes for two operators whether they are there or not; here they are declared first.
    """
    if torch.version.cuda or importlib.util.find_spec("torchvision") is None:
        return
    if "+cpu" in metadata.version("torchvision") or hasattr(torch.ops.torchvision, "nms"):
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", _SCHEMA)
