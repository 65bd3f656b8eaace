"""Which tokens the encoder sees."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmae.models.multimae.draw import draw_tokens, random_draw
from mpmae.models.multimae.sampler import domain_shares, sample_tokens, tokens_per_domain

DOMAINS, PATCHES = 3, 6


def draw(num=4, seed=0, alphas=(1.0,) * DOMAINS):
    return draw_tokens(seed, 0, np.arange(num), alphas, PATCHES)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), density=st.floats(0, 1), budget=st.integers(1, 18), flags=st.tuples(*[st.booleans()] * 2))
def test_always_the_budget_and_never_what_is_absent(seed, density, budget, flags):
    """V different tokens; every real one has data, and one that has none comes in only when all that have are in."""
    available = torch.rand(4, DOMAINS, PATCHES, generator=torch.Generator().manual_seed(seed)) < density
    sample = sample_tokens(draw(4, seed), available, budget, uniform=flags[0], quirks=flags[1])
    assert sample.index.shape == (4, budget)
    assert all(len(set(row)) == budget for row in sample.index.tolist())
    real = torch.ones(4, budget, dtype=torch.bool) if sample.real is None else sample.real
    assert torch.equal(real, available.flatten(1).gather(1, sample.index))
    assert real.sum(1).tolist() == [min(budget, int(count)) for count in available.flatten(1).sum(1)]


def test_domains_get_their_shares():
    """Where every rounded share fits its domain and they add up to the budget, the sample is just them."""
    numbers = draw(400)
    available = torch.ones(400, DOMAINS, PATCHES, dtype=torch.bool)
    sample = sample_tokens(numbers, available, 6)
    counts = torch.stack([(sample.index // PATCHES == k).sum(1) for k in range(DOMAINS)], dim=1)
    wanted = tokens_per_domain(domain_shares(numbers.log_gammas, available.any(2)), 6)
    fits = wanted.sum(1) == 6
    assert fits.sum() > 100
    assert torch.equal(counts[fits], wanted[fits])
    assert (counts - wanted).abs().max() == 1


def test_patches_of_a_domain_are_equally_likely():
    available = torch.ones(6000, DOMAINS, PATCHES, dtype=torch.bool)
    shown = sample_tokens(draw(6000), available, 6).index.flatten().bincount()
    assert (shown / 6000 - 1 / 3).abs().max() < 0.03  # five standard deviations: the domains' shares vary


def test_an_absent_domain_leaves_its_share_to_the_others():
    available = torch.ones(3000, DOMAINS, PATCHES, dtype=torch.bool)
    available[:, 1] = False
    sample = sample_tokens(draw(3000), available, 6)
    shares = torch.stack([(sample.index // PATCHES == k).float().mean(1) for k in range(DOMAINS)], dim=1)
    assert sample.real is None
    assert shares[:, 1].max() == 0
    assert (shares.mean(0) - torch.tensor([0.5, 0, 0.5])).abs().max() < 0.03
    assert shares[:, 0].std() > 0.25  # that of uniform shares is 0.29


@pytest.mark.parametrize("alphas", [(1.0, 1.0, 1.0), (0.05, 0.2, 3.0), (20.0, 20.0, 0.5)])
@pytest.mark.parametrize("source", ["counter", "torch"])
def test_shares_are_dirichlet(alphas, source):
    """Mean and variance of each share, to five standard errors."""
    num = 20_000
    torch.manual_seed(0)
    numbers = draw(num, 3, alphas) if source == "counter" else random_draw(num, torch.tensor(alphas), PATCHES)
    shares = domain_shares(numbers.log_gammas, torch.ones(num, DOMAINS, dtype=torch.bool)).double()
    alpha, total = torch.tensor(alphas, dtype=torch.float64), sum(alphas)
    mean = alpha / total
    variance = mean * (1 - mean) / (total + 1)
    assert ((shares.mean(0) - mean).abs() < 5 * (variance / num).sqrt()).all()
    fourth = (shares - mean).pow(4).mean(0)
    assert ((shares.var(0) - variance).abs() < 5 * ((fourth - variance**2) / num).sqrt()).all()


def test_a_uniform_choice_of_domains():
    """Every subset of the present domains but the empty one is equally likely, and only its domains are sampled."""
    num, budget = 7000, 5
    available = torch.ones(num, DOMAINS, PATCHES, dtype=torch.bool)
    sample = sample_tokens(draw(num, 1, (50.0,) * DOMAINS), available, budget, uniform=True)
    used = torch.stack([(sample.index // PATCHES == k).any(1) for k in range(DOMAINS)], dim=1)
    subsets = [subset for subset in itertools.product([False, True], repeat=DOMAINS) if any(subset)]
    counts = torch.tensor([int((used == torch.tensor(subset)).all(1).sum()) for subset in subsets])
    assert (counts / num - 1 / 7).abs().max() < 0.021  # five standard deviations
    available[:, 0] = False
    sample = sample_tokens(draw(num, 1, (50.0,) * DOMAINS), available, budget, uniform=True)
    used = torch.stack([(sample.index // PATCHES == k).any(1) for k in range(DOMAINS)], dim=1)
    assert sorted(used.unique(dim=0).tolist()) == [[False, False, True], [False, True, False], [False, True, True]]
    assert used[:, 1].float().mean() == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("quirks", [False, True])
def test_what_rounding_leaves_over_comes_from_the_chosen_domains(quirks):
    """Two domains with half of a budget of 5 each get 2 tokens each; the fifth is theirs too (quirk: anyone's)."""
    num = 2000
    numbers = draw(num)._replace(log_gammas=torch.zeros(num, DOMAINS))
    available = torch.ones(num, DOMAINS, PATCHES, dtype=torch.bool)
    sample = sample_tokens(numbers, available, 5, uniform=True, quirks=quirks)
    counts = torch.stack([(sample.index // PATCHES == k).sum(1) for k in range(DOMAINS)], dim=1)
    stray = (counts.sort(1).values == torch.tensor([1, 2, 2])).all(1)
    assert bool(stray.any())  # all three chosen: 5 / 3 is 2 each, one of which drops out
    two = (numbers.subset * 7).long() + 1
    two = torch.tensor([bin(code).count("1") for code in two.tolist()]) == 2
    assert bool(stray[two].any()) == quirks


def test_a_sample_depends_on_its_id_alone():
    ids = np.arange(10)
    together = draw_tokens(5, 2, ids, (1.0, 0.3, 2.0), PATCHES)
    for part in (ids[3:4], ids[::-1]):
        for got, expected in zip(draw_tokens(5, 2, part, (1.0, 0.3, 2.0), PATCHES), together, strict=True):
            assert torch.equal(got, expected[torch.from_numpy(part.copy())])
    others = [draw_tokens(6, 2, ids, (1.0,) * 3, PATCHES), draw_tokens(5, 3, ids, (1.0,) * 3, PATCHES)]
    assert not any(torch.equal(other.priority, together.priority) for other in others)


def test_numbers_stay_in_range():
    numbers = draw(500)
    for values in (numbers.subset, numbers.priority, numbers.refill):
        assert values.min() >= 0
        assert values.max() < 1
    assert draw(500, alphas=(1e-3,) * 3).log_gammas.isfinite().all()
