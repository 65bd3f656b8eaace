"""Which patches the encoder sees: a pure function of (seed, epoch, sample), as an index of visible patches.

Shapes: N samples, L patches of an image, V visible ones. Patches are numbered row by row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ConfigError


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """V = int(L * (1 - mask ratio)), as the published code counts (49 patches at 0.6: 19).

    A product that lies within rounding error below a whole number counts as that number (10 at 0.9: 1, although
    10 * (1 - 0.9) is 0.9999999999999998). Raises ConfigError for a ratio outside [0, 1) or when no patch stays visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ConfigError(f"mask_ratio = {mask_ratio!r}: expected the hidden fraction, in [0, 1)")
    count = int(num_patches * (1 - mask_ratio) + 1e-9 * num_patches)
    if count < 1:
        raise ConfigError(
            f"mask_ratio = {mask_ratio!r} leaves none of {num_patches} patches visible; lower it or use smaller patches"
        )
    return count


def draw_visible(
    seed: int, epoch: int, sample_ids: Tensor | np.ndarray | Sequence[int], num_patches: int, num_visible: int
) -> Tensor:
    """The visible patches of each sample in an epoch, ascending: int64 [N, V], on the CPU.

    A row depends on (seed, epoch, its sample id) alone: any rank, worker or batch cut draws the same. Every subset of V
    of the L = `num_patches` patches is equally likely. Raises ConfigError unless 1 <= V <= L.
    """
    if not 1 <= num_visible <= num_patches:
        raise ConfigError(f"draw_visible: num_visible = {num_visible}, expected 1..{num_patches} (the number of patches)")
    ids = sample_ids.cpu().numpy() if torch.is_tensor(sample_ids) else np.asarray(sample_ids, np.int64)
    order = np.argsort(random_bits(seed, Stream.MASK, epoch, ids, num_patches), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :num_visible], axis=1).astype(np.int64))


def visible_index(visible: Tensor | np.ndarray) -> Tensor:
    """The numbers of the True patches of each row, ascending: int64 [N, V] from bool [N, L].

    Raises ConfigError unless the input is bool [N, L] and all rows show the same number of patches.
    """
    visible = torch.as_tensor(visible)
    if visible.dtype != torch.bool or visible.ndim != 2:
        raise ConfigError(f"visible_index: got {visible.dtype} {list(visible.shape)}, expected bool [N, L]")
    counts = visible.sum(1).unique().tolist()
    if len(counts) > 1:
        raise ConfigError(
            f"visible_index: rows show between {counts[0]} and {counts[-1]} patches; all samples need the same number"
        )
    return visible.nonzero()[:, 1].view(visible.shape[0], -1)


def visible_bool(index: Tensor, num_patches: int) -> Tensor:
    """True at the visible patches: bool [N, L], the inverse of `visible_index`; `index` is int64 [N, V] in 0..L-1."""
    flags = torch.zeros(index.shape[0], num_patches, dtype=torch.bool, device=index.device)
    return flags.scatter(1, index, True)
