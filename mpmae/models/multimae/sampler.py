"""Which tokens the encoder sees: a pure function of random numbers and of what data the samples have.

Shapes: N samples, K input domains, L patches of each, T = K*L tokens in the order of the domains, V the budget.
Source: MultiMAE (arXiv 2204.01678), section 3.3; multimae-meets-eo, `multimae.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mpmae.models.multimae.draw import TokenDraw


class TokenSample(NamedTuple):
    """The tokens that the encoder sees.

    index: int64 [N, V], token numbers, domain * L + patch, each at most once in a row. real: bool [N, V], False for tokens
    that only fill up a sample with too little data: attended by none, scored nowhere; None when there are none.
    """

    index: Tensor
    real: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TokenSample":
        """The sample on `device`."""
        return TokenSample(*(t if t is None else t.to(device, non_blocking=non_blocking) for t in self))


def sample_tokens(
    draw: TokenDraw, available: Tensor, budget: int, *, uniform: bool = False, quirks: bool = False
) -> TokenSample:
    """V = `budget` tokens of each sample, of those `available` (bool [N, K, L]).

    The present domains share the budget by a Dirichlet distribution; with `uniform` only those of a random subset do,
    every subset but the empty one being equally likely. quirks: what a rounded budget lacks comes from any domain, not from
    those of the subset first.
    """
    present = available.any(2)
    chosen = _subset(present, draw.subset) if uniform else present
    shares = domain_shares(draw.log_gammas, chosen)
    first = chosen if not quirks else present
    return choose_tokens(tokens_per_domain(shares, budget), first, draw.priority, draw.refill, available, budget)


def domain_shares(log_gammas: Tensor, chosen: Tensor) -> Tensor:
    """Each domain's share of the budget, [N, K]: gamma variables normalised over the `chosen` (bool) ones, 0 elsewhere."""
    return torch.where(chosen, log_gammas, -torch.inf).softmax(1).nan_to_num(0)  # 0/0 where no domain is chosen


def tokens_per_domain(shares: Tensor, budget: int) -> Tensor:
    """The shares [N, K] of `budget` as whole numbers, each rounded by itself: int64 [N, K]; their sum may differ from it."""
    return (shares * budget).round().long()


def choose_tokens(
    counts: Tensor, first: Tensor, priority: Tensor, refill: Tensor, available: Tensor, budget: int
) -> TokenSample:
    """`budget` tokens of each sample: from each domain the `counts` ones of the lowest priority number, then made exact.

    counts: int64 [N, K]. first: bool [N, K], domains that fill what is missing before others do. priority, refill: numbers
    [N, K, L]. available: bool [N, K, L].
    When the counts do not add up to the budget, those of the largest refill number drop out, or available ones of the lowest
    one join. When there are fewer available tokens than the budget, others follow, not real. Rows are ascending, what is not
    real last.
    """
    rank = torch.where(available, priority, torch.inf).argsort(dim=2, stable=True).argsort(dim=2)
    kept = (rank < counts[:, :, None]) & available
    turn = torch.where(first[:, :, None], 1, 2)
    turn = torch.where(kept, 0, torch.where(available, turn, 3))
    order = (turn + refill).flatten(1).argsort(dim=1, stable=True)[:, :budget]
    available = available.flatten(1)
    num_tokens = available.shape[1]
    order = torch.where(available.gather(1, order), order, order + num_tokens).sort(1).values
    real = order < num_tokens
    return TokenSample(order % num_tokens, None if _all(real) else real)


def _subset(present: Tensor, subset: Tensor) -> Tensor:
    """A choice of the present domains, bool [N, K], for numbers [N] in [0, 1): never empty unless none is present."""
    num = present.sum(1)
    code = 1 + (subset * (2.0**num - 1)).long().clamp(min=0)
    code = torch.minimum(code, (2.0**num - 1).long().clamp(min=1))
    bit = (present.cumsum(1) - 1).clamp(min=0)
    return present & ((code[:, None] >> bit) & 1).bool()


def _all(flags: Tensor) -> bool:
    """Whether all are known to be True: a GPU would have to wait for the answer, and a compiler must not branch on it."""
    return flags.device.type == "cpu" and not torch.compiler.is_compiling() and bool(flags.all())
