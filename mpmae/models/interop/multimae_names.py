"""Names of MultiMAE's weights: how they are told from others, and what they say of the model."""

import re
from collections.abc import Iterable

from mpmae.domains import NORM_HEAD, in_order

OURS, PUBLISHED, VIT = "multimae", "multimae-published", "timm-vit"
MULTIMAE_SCHEMES = (OURS, PUBLISHED, VIT)
_LEAF = r"(?:weight|bias)"
_BLOCK = rf"\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.{_LEAF}"
_OURS = re.compile(
    rf"global_tokens|log_vars|input_adapters\.[^.]+\.(?:proj\.{_LEAF}|class_emb\.weight)|encoder\.{_BLOCK}"
    rf"|decoders\.(?:mask_token|task_embeddings|heads\.[^.]+\.{_LEAF}|blocks\.{_BLOCK}"
    rf"|(?:proj_context|query_norm|context_norm|out_norm|cross\.(?:q|kv|proj)|mlp\.fc[12])\.{_LEAF})"
)


def multimae_scheme(names: Iterable[str]) -> str | None:
    """Which of MULTIMAE_SCHEMES the names follow; None for none of them."""
    names = list(names)
    if "patch_embed.proj.weight" in names and any(name.startswith("blocks.") for name in names):
        return VIT
    if not any(name.startswith("input_adapters.") for name in names):
        return None
    published = any(name.startswith("output_adapters.") or name.endswith(".pos_emb") for name in names)
    return PUBLISHED if published else OURS


def is_ours(name: str) -> bool:
    """Whether a MultiMAE may have a weight of this name."""
    return _OURS.fullmatch(name) is not None


def domains_of(names: Iterable[str]) -> tuple[str, ...]:
    """The input domains among our names or the published ones, in the order of the tokens."""
    return _sorted(match[1] for name in names if (match := re.match(r"input_adapters\.([^.]+)\.", name)))


def decoders_of(names: Iterable[str]) -> tuple[str, ...]:
    """The decoders among our names, in the order in which their weights are stacked."""
    return decoder_order(match[1] for name in names if (match := re.match(r"decoders\.heads\.([^.]+)\.", name)))


def decoder_order(found: Iterable[str]) -> tuple[str, ...]:
    """Names of decoders in the order of `MultiMAE.targets`: domains, then the one for rgb normalised per patch."""
    found = set(found)
    return (*_sorted(found - {NORM_HEAD}), *sorted(found & {NORM_HEAD}))


def _sorted(found: Iterable[str]) -> tuple[str, ...]:
    """Domains in their order; those that we do not know come last."""
    found = set(found)
    known = in_order(tuple(found))
    return (*known, *sorted(found - set(known)))
