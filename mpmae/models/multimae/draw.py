"""The random numbers behind a token sample: a pure function of (seed, epoch, sample id), the same on any number of ranks.

Shapes: N samples, K input domains, L patches of each.
Source: Marsaglia and Tsang, "A simple method for generating gamma variables", ACM TOMS 26, 2000.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Gamma

from mpmae.counter_rng import Stream, random_bits

_TRIES = 4  # of a round; more than four are needed once in 1e5 numbers
_PER_TRY = 3


class TokenDraw(NamedTuple):
    """Random numbers of N samples: what the sampler makes a token sample of, whatever data the samples lack.

    log_gammas: float32 [N, K], logarithms of gamma variables of the domains' alphas; normalised over any choice of domains,
    the variables are Dirichlet over it. subset: float64 [N] in [0, 1), which of the present domains take part. priority,
    refill: float32 [N, K, L] in [0, 1): the order of a domain's patches, and of what fills the budget or is too much.
    """

    log_gammas: Tensor
    subset: Tensor
    priority: Tensor
    refill: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TokenDraw":
        """The numbers on `device`."""
        return TokenDraw(*(t.to(device, non_blocking=non_blocking) for t in self))


def draw_tokens(
    seed: int, epoch: int, sample_ids: Tensor | np.ndarray | Sequence[int], alphas: Sequence[float], num_patches: int
) -> TokenDraw:
    """The numbers of these samples in an epoch, on the CPU; a row depends on (seed, epoch, its sample id) alone."""
    ids = sample_ids.cpu().numpy() if torch.is_tensor(sample_ids) else np.asarray(sample_ids, np.int64)
    num_tokens = len(alphas) * num_patches
    bits = random_bits(seed, Stream.TOKENS, epoch, ids, 2 * num_tokens + 1)
    # 24 bits are what float32 holds of a number below 1 without rounding up to it
    orders = (bits[:, 1:] >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    orders = torch.from_numpy(orders).view(len(ids), 2, len(alphas), num_patches)
    gammas = _log_gammas(seed, epoch, ids, np.asarray(alphas, np.float64))
    subset = torch.from_numpy((bits[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    return TokenDraw(torch.from_numpy(gammas.astype(np.float32)), subset, orders[:, 0], orders[:, 1])


def random_draw(num: int, alphas: Tensor, num_patches: int) -> TokenDraw:
    """The numbers of `num` samples from torch's generator, on the device of `alphas` float32 [K]."""
    shape, device = (num, len(alphas), num_patches), alphas.device
    ones = torch.ones_like(alphas, dtype=torch.float64)
    gammas = Gamma(alphas.double(), ones, validate_args=False).sample((num,))  # a GPU would have to wait for the answer
    tiny = torch.finfo(torch.float64).tiny
    return TokenDraw(
        gammas.clamp(min=tiny).log().float(),
        torch.rand(num, dtype=torch.float64, device=device),
        torch.rand(shape, device=device),
        torch.rand(shape, device=device),
    )


def _log_gammas(seed: int, epoch: int, ids: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Logarithms, so that the tiny values of a small alpha do not all become 0: float64 [N, K].

    A gamma variable of shape a < 1 is one of shape a + 1 times a uniform number to the power 1 / a.
    """
    small, num = alphas < 1, len(alphas)
    d = np.where(small, alphas + 1, alphas) - 1 / 3
    c = 1 / np.sqrt(9 * d)
    found, tries = np.full((len(ids), num), np.nan), _TRIES
    while np.isnan(found).any():
        bits = random_bits(seed, Stream.SHARES, epoch, ids, num * (1 + _PER_TRY * tries))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0, never 1
        boost, trials = uniform[:, :num], uniform[:, num:].reshape(len(ids), tries, _PER_TRY, num)
        normal = np.sqrt(-2 * np.log(trials[:, :, 0])) * np.cos(2 * np.pi * trials[:, :, 1])
        v = np.maximum(1 + c * normal, 0) ** 3
        with np.errstate(divide="ignore", invalid="ignore"):
            accepted = np.log(trials[:, :, 2]) < normal**2 / 2 + d * (1 - v + np.log(v))
        first = accepted.argmax(1)[:, None]
        at = np.take_along_axis(v, first, 1)[:, 0]
        with np.errstate(divide="ignore"):
            found = np.where(accepted.any(1), np.log(d * at), np.nan)
        tries *= 2
    return found + np.where(small, np.log(boost) / alphas, 0)
