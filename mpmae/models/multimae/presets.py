"""The sizes of MultiMAE and `create_multimae`, which checks every argument and builds one.

Source of the sizes: Dosovitskiy et al., arXiv 2010.11929, and Touvron et al., "DeiT", arXiv 2012.12877; of the rest:
arXiv 2505.14951 and the published `default-config.yaml`.
"""

import math
from collections.abc import Mapping, Sequence

from mpmae.domains import NORM_DOMAIN, PUBLISHED_DOMAINS, Domain, domain_of, in_order
from mpmae.errors import ConfigError
from mpmae.modalities import MODALITIES
from mpmae.models.multimae.init import initialise
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.positions import TABLE_SIZE_PX
from mpmae.models.named import band_problems, name_problems

# name -> width, depth, heads
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
LOSS_WEIGHTINGS = ("unweighted", "uncertainty")
_BUDGET_PART = 6  # a sixth of the tokens, as published


def create_multimae(
    name: str,
    *,
    img_size: int = 56,
    patch_size: int = 8,
    domains_in: Sequence[str] = PUBLISHED_DOMAINS,
    domains_out: Sequence[str] = PUBLISHED_DOMAINS,
    num_visible_tokens: int | None = None,
    alphas: float | Mapping[str, float] = 1.0,
    sample_domains_uniformly: bool = False,
    extra_norm_rgb: bool | None = None,
    loss_weighting: str = "unweighted",
    decoder_dim: int = 128,
    decoder_depth: int = 2,
    decoder_num_heads: int = 8,
    reference_quirks: bool = False,
    bands_available: Mapping[str, Sequence[str]] | None = None,
) -> MultiMAE:
    """A new MultiMAE with random weights.

    name: "multimae_" and one of SIZES. img_size, patch_size: pixels; patch_size divides img_size, and the stride of every
    domain divides patch_size (4 for class maps). domains_in, domains_out: names of `mpmae.domains.DOMAINS`:
    the published rgb, depth, semseg, ired, sired and ebands, or a map modality by its own name (sentinel1, ...) with all of
    its usual bands; kept in that table's order. num_visible_tokens: the budget, tokens of a sample that the encoder sees;
    None: a sixth of all. alphas: of the Dirichlet distribution that shares the budget out over the domains, one for all or
    one for each by name (1 for those not named); lower: less even. sample_domains_uniformly: share it out over a random
    subset of a sample's domains, every one equally likely. extra_norm_rgb: one more decoder, norm_rgb, for rgb normalised
    per patch; None: when rgb is an output. loss_weighting: "unweighted" (sum) or "uncertainty" (learned log variances, one
    for norm_rgb too). decoder_num_heads divides decoder_dim. reference_quirks: what the published code computes where that
    differs, see docs/quirks.md; loaders need no such switch. bands_available: bands that a batch's tensors hold, in order;
    default: those of `mpmae.modalities`.

    Raises ConfigError with every problem at once.
    """
    problems = name_problems(name, list_multimae())
    available = {key: spec.bands for key, spec in MODALITIES.items()}
    problems += [
        f"bands_available names an unknown modality {key!r}" for key in bands_available or {} if key not in MODALITIES
    ]
    available |= {key: tuple(bands) for key, bands in (bands_available or {}).items()}
    inputs = _domains("domains_in", domains_in, available, problems)
    outputs = _domains("domains_out", domains_out, available, problems)
    if extra_norm_rgb is None:
        extra_norm_rgb = any(domain.name == NORM_DOMAIN for domain in outputs)
    if extra_norm_rgb and NORM_DOMAIN not in {domain.name for domain in (*inputs, *outputs)}:
        problems.append(f"extra_norm_rgb needs {NORM_DOMAIN} among domains_in or domains_out; add it or leave it out")
    if loss_weighting not in LOSS_WEIGHTINGS:
        problems.append(f"loss_weighting = {loss_weighting!r}, expected one of {', '.join(LOSS_WEIGHTINGS)}")
    problems += size_problems(img_size, patch_size, (*inputs, *outputs))
    problems += _decoder_problems(decoder_dim, decoder_depth, decoder_num_heads)
    num_tokens = len(inputs) * (img_size // max(patch_size, 1)) ** 2
    budget = default_budget(num_tokens) if num_visible_tokens is None else num_visible_tokens
    if inputs and not problems:
        problems += _budget_problems(budget, num_tokens, inputs, outputs)
    alpha_of = _alphas(alphas, inputs, problems)
    if problems:
        raise ConfigError([f"create_model: {problem}" for problem in problems])
    dim, depth, num_heads = SIZES[name.removeprefix("multimae_")]
    model = MultiMAE(
        dim,
        depth,
        num_heads,
        img_size=img_size,
        patch_size=patch_size,
        domains_in=inputs,
        domains_out=outputs,
        num_visible=budget,
        alphas=alpha_of,
        sample_domains_uniformly=sample_domains_uniformly,
        extra_norm_rgb=extra_norm_rgb,
        loss_weighting=loss_weighting,
        decoder_dim=decoder_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_num_heads,
        bands_available=available,
        reference_quirks=reference_quirks,
    )
    initialise(model)
    return model


def list_multimae() -> list[str]:
    """The names that `create_multimae` knows, smallest first."""
    return [f"multimae_{size}" for size in SIZES]


def _domains(
    where: str, names: Sequence[str], available: dict[str, tuple[str, ...]], problems: list[str]
) -> tuple[Domain, ...]:
    """The known ones of the named domains, in the order of the table; what is wrong goes into `problems`."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        problems.append(f"{where} is empty; name at least one domain, such as {', '.join(PUBLISHED_DOMAINS)}")
    if len(set(names)) != len(names):
        problems.append(f"{where} names a domain twice: {', '.join(names)}")
    found = []
    for name in names:
        try:
            found.append(domain_of(name))
        except ConfigError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    for domain in found:
        if domain.loss != "classes":
            problems += band_problems(f"{where}, {domain.name}", domain.modality, domain.bands, available[domain.modality])
    return tuple(domain_of(name) for name in in_order([domain.name for domain in found]))


def default_budget(num_tokens: int) -> int:
    """How many of a sample's tokens the encoder sees where nothing says so."""
    return max(num_tokens // _BUDGET_PART, 1)


def size_problems(img_size: int, patch_size: int, domains: Sequence[Domain]) -> list[str]:
    """What is wrong with the sizes of images and patches for these domains."""
    if not 1 <= patch_size <= TABLE_SIZE_PX:
        return [f"patch_size = {patch_size}, expected 1 to {TABLE_SIZE_PX}"]
    problems = []
    if img_size <= 0 or img_size % patch_size:
        below = img_size // patch_size * patch_size
        near = f"{below} or {below + patch_size}" if below > 0 else f"{patch_size}"
        problems.append(f"img_size = {img_size} is not a multiple of patch_size = {patch_size}; use {near}")
    coarse = {domain.name: domain.stride for domain in domains if patch_size % domain.stride}
    problems += [
        f"patch_size = {patch_size} is not a multiple of {stride}, the stride of {name}; use one, or leave {name} out"
        for name, stride in coarse.items()
    ]
    return problems


def _decoder_problems(dim: int, depth: int, num_heads: int) -> list[str]:
    problems = []
    if num_heads < 1:
        problems.append(f"decoder_num_heads = {num_heads}, expected at least 1")
    if dim < 4 or dim % 4:
        problems.append(f"decoder_dim = {dim}, expected a multiple of 4 (sin and cos of row and column)")
    elif num_heads >= 1 and dim % num_heads:
        problems.append(f"decoder_dim = {dim} is not a multiple of decoder_num_heads = {num_heads}")
    if depth < 0:
        problems.append(f"decoder_depth = {depth}, expected at least 0")
    return problems


def _budget_problems(budget: int, num_tokens: int, inputs: Sequence[Domain], outputs: Sequence[Domain]) -> list[str]:
    if budget < 1:
        return [f"num_visible_tokens = {budget}, expected at least 1"]
    if budget > num_tokens:
        per_domain = num_tokens // len(inputs)
        return [
            f"num_visible_tokens = {budget} is more than the {num_tokens} tokens of {len(inputs)} input domains with "
            f"{per_domain} patches each; lower it, or add domains"
        ]
    if budget == num_tokens and set(outputs) <= set(inputs):
        return [f"num_visible_tokens = {budget} are all tokens, so that nothing is hidden to reconstruct; lower it"]
    return []


def _alphas(alphas: float | Mapping[str, float], inputs: Sequence[Domain], problems: list[str]) -> tuple[float, ...]:
    """One alpha per input domain; what is wrong goes into `problems`."""
    names = [domain.name for domain in inputs]
    if isinstance(alphas, Mapping):
        unknown = [name for name in alphas if name not in names]
        problems += [f"alphas names {name!r}, which is no input domain; those are {', '.join(names)}" for name in unknown]
        given = {f"alphas[{name!r}]": value for name, value in alphas.items()}
        found = [alphas.get(name, 1.0) for name in names]
    else:
        given, found = {"alphas": alphas}, [alphas] * len(names)
    wrong = [
        f"{where} = {value!r}, expected a finite number above 0"
        for where, value in given.items()
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0)
    ]
    problems += wrong
    return () if wrong else tuple(map(float, found))
