"""Operations and bytes of a MultiMAE's training step, from the model itself: a count, made once and timed by nobody.

What counts and what does not is said in `mpmae.cost.parts`. The encoder counts the V visible tokens and the global one,
whatever data the samples have. An operator is a matrix product, or one attention, with the elementwise work before and after
it (norm, GELU, bias, residual): each reads its inputs once and writes its output once, and attention keeps no scores.
Parts: embedding, encoder, decoders, heads (the linear layers to pixels, with the losses).

Shapes: K input domains, L patches of each, V visible tokens, T decoders, E encoder width, D decoder width.
"""

from dataclasses import replace

from mpmae.cost import operators
from mpmae.cost.operators import PARAMETER_BYTES, Work
from mpmae.cost.parts import (
    CLASS_BYTES,
    ITEM_BYTES,
    PIXEL_BYTES,
    Cost,
    Part,
    linear,
    pixel_head,
    pixel_target_bytes,
    size_of,
    together,
)
from mpmae.domains import Domain
from mpmae.models.multimae.adapters import CLASS_DIM
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.vit import MLP_RATIO

_NORM_PARAMETERS = 5  # a channel: weight and bias read in the forward, weight in the backward, two gradients written


def multimae_cost(model: MultiMAE, precision: str) -> Cost:
    """The cost of a training step of `model`; arguments as in `mpmae.cost.model_cost`."""
    item_bytes, num_shown = ITEM_BYTES[precision], model.num_visible + 1
    dim, decoders = model.global_tokens.shape[2], model.decoders
    encoder = [part for _ in model.encoder for part in _block(dim, num_shown, item_bytes)]
    parts = {
        "embedding": _embedding(model, dim, item_bytes),
        "encoder": together(encoder, size_of(model.encoder)),
        "decoders": together(_decoders(model, num_shown, item_bytes), size_of(decoders) - size_of(decoders.heads)),
        "heads": together(_heads(model, item_bytes), size_of(decoders.heads)),
    }
    return Cost(parts, precision, size_of(model))


def _embedding(model: MultiMAE, dim: int, item_bytes: int) -> Part:
    """Tokens of all patches of all input domains, of which the visible ones are picked."""
    parts = [_adapter(model, domain, dim, item_bytes) for domain in model.domains_in.values()]
    parts.append(_moved(2 * model.num_visible * dim * item_bytes))
    return together(parts, size_of(model.input_adapters) + model.global_tokens.numel())


def _adapter(model: MultiMAE, domain: Domain, dim: int, item_bytes: int) -> Part:
    num_patches, num_pixels = model.num_patches, (model.patch_size // domain.stride) ** 2
    if domain.num_classes:
        table = 3 * domain.num_classes * CLASS_DIM * PARAMETER_BYTES
        classes = Part(*[Work(num_patches * num_pixels * CLASS_BYTES)] * 2, table, domain.num_classes * CLASS_DIM)
        layer = linear(CLASS_DIM * num_pixels, dim, num_patches, item_bytes)
        return together([classes, layer], classes.num_parameters + layer.num_parameters)
    width = domain.num_channels * num_pixels
    layer = linear(width, dim, num_patches, item_bytes)
    # pixels are read as they are, forward and backward, and get no gradient: no product makes it
    num_bytes = num_patches * (width * PIXEL_BYTES + dim * item_bytes)
    return replace(layer, forward=layer.forward._replace(num_bytes=num_bytes), backward=Work(num_bytes, layer.forward.flops))


def _decoders(model: MultiMAE, num_shown: int, item_bytes: int) -> list[Part]:
    """All T decoders up to their heads; they read the encoder's tokens once, together."""
    decoders, num_patches = model.decoders, model.num_patches
    num, dim, dim_in = decoders.proj_context.weight.shape
    one = [
        linear(dim, dim, num_patches, item_bytes),
        linear(dim, 2 * dim, num_shown, item_bytes),
        _attention(num_patches, num_shown, dim, item_bytes),
        linear(dim, dim, num_patches, item_bytes),
        *_mlp(dim, num_patches, item_bytes),
        *[_norm(dim)] * 2,
        *(part for _ in decoders.blocks for part in _block(dim, num_patches, item_bytes)),
    ]
    return [linear(dim_in, num * dim, num_shown, item_bytes), *one * num]


def _heads(model: MultiMAE, item_bytes: int) -> list[Part]:
    """Linear layers to the pixels of all patches, with the losses."""
    parts = []
    for name, domain in model.targets.items():
        target_bytes = (model.patch_size // domain.stride) ** 2 * pixel_target_bytes(domain.modality, domain.num_channels)
        parts.append(pixel_head(model.decoders.heads[name], model.num_patches, item_bytes, target_bytes))
    return parts


def _block(dim: int, num_tokens: int, item_bytes: int) -> list[Part]:
    """A pre-norm transformer block."""
    return [
        _norm(dim),
        linear(dim, 3 * dim, num_tokens, item_bytes),
        _attention(num_tokens, num_tokens, dim, item_bytes),
        linear(dim, dim, num_tokens, item_bytes),
        _moved(num_tokens * dim * item_bytes),
        *_mlp(dim, num_tokens, item_bytes),
    ]


def _mlp(dim: int, num_tokens: int, item_bytes: int) -> list[Part]:
    """A norm, two linear layers and the residual."""
    return [
        _norm(dim),
        linear(dim, MLP_RATIO * dim, num_tokens, item_bytes),
        linear(MLP_RATIO * dim, dim, num_tokens, item_bytes),
        _moved(num_tokens * dim * item_bytes),
    ]


def _attention(num_queries: int, num_keys: int, dim: int, item_bytes: int) -> Part:
    sizes = (num_queries, num_keys, dim, item_bytes)
    return Part(operators.attention_forward(*sizes), operators.attention_backward(*sizes), 0, 0)


def _norm(dim: int) -> Part:
    """A norm's parameters; its elements are those of the product after it."""
    return Part(Work(0), Work(0), _NORM_PARAMETERS * dim * PARAMETER_BYTES, 2 * dim)


def _moved(num_bytes: int) -> Part:
    """So many bytes more, forward and backward: a residual is read, and its gradient."""
    return Part(Work(num_bytes), Work(num_bytes), 0, 0)
