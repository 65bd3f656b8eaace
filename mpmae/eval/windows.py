"""Feature vectors of images that are prepared as windows: the one place where these are batched and averaged.

Shapes: N images, T windows of an image, C channels, S image side, D features.
"""

from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor

MAX_WINDOWS = 64  # at a time through the encoder, unless told otherwise


@torch.inference_mode()
def window_means(
    encode: Callable[[Tensor], Tensor], images: Iterable[Tensor], device: torch.device | str, max_windows: int = MAX_WINDOWS
) -> Tensor:
    """The vectors float32 [N, D] on the CPU of images [T, C, S, S] each: the mean over an image's windows.

    Images may differ in T and S; neighbours of one size go through `encode` together, at most `max_windows` at a time.
    """
    vectors: list[Tensor] = []
    for _, group in groupby(images, key=lambda image: image.shape[1:]):
        alike = list(group)
        parts = torch.cat(alike).split(max_windows)
        found = torch.cat([encode(part.to(device, non_blocking=True)).float().cpu() for part in parts])
        vectors += [windows.mean(0) for windows in found.split([len(image) for image in alike])]
    return torch.stack(vectors)
