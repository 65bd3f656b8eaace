"""The decoders of all output domains, run as one batch on stacked weights.

Shapes: T decoders, N samples, K input domains, L patches, G on a side, V visible tokens, E encoder width, D decoder width,
Q values of a patch.
Source: MultiMAE (arXiv 2204.01678), section 3.2 and `output_adapters.py`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.models.multimae.positions import positions, sincos_table
from mpmae.models.multimae.sampler import TokenSample
from mpmae.models.multimae.vit import Block, CrossAttention, Mlp, StackedLinear, stacked

POSITION_MODE = "bilinear"


class Decoders(nn.Module):
    """T decoders: queries of a domain's patches attend to the visible tokens, then an MLP, ViT blocks and a linear head.

    The queries are the domain's own visible tokens and mask tokens for its hidden ones. No two decoders share a weight.

    heads: name of the decoder -> number of the input domain that gives its queries (None: mask tokens alone) and Q.
    """

    def __init__(
        self,
        heads: Mapping[str, tuple[int | None, int]],
        *,
        num_inputs: int,
        dim_in: int,
        dim: int,
        depth: int,
        num_heads: int,
        table_side: int,
    ):
        super().__init__()
        self.own = tuple(own for own, _ in heads.values())
        num = len(heads)
        layers = stacked(num)
        self.proj_context = StackedLinear(num, dim_in, dim)
        self.mask_token = nn.Parameter(torch.zeros(num, dim))
        self.task_embeddings = nn.Parameter(torch.zeros(num, num_inputs, dim))
        self.register_buffer("table", sincos_table(dim, table_side), persistent=False)
        self.query_norm = layers.norm(dim)
        self.context_norm = layers.norm(dim)
        self.cross = CrossAttention(dim, num_heads, layers)
        self.out_norm = layers.norm(dim)
        self.mlp = Mlp(dim, layers)
        self.blocks = nn.ModuleList(Block(dim, num_heads, layers) for _ in range(depth))
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, (_, size) in heads.items()})

    def forward(self, tokens: Tensor, sample: TokenSample, num_patches_side: int) -> dict[str, Tensor]:
        """Predictions [N, L, Q] of every decoder from the encoder's tokens [N, V+1, E], the global one last."""
        where = positions(self.table, num_patches_side, POSITION_MODE)
        projected = self.proj_context(tokens)
        context = self._context(projected, sample, where)
        queries = self._queries(projected, sample, where)
        real = None if sample.real is None else F.pad(sample.real, (0, 1), value=True)
        x = self.cross(self.query_norm(queries), self.context_norm(context), real)
        x = x + self.mlp(self.out_norm(x))
        for block in self.blocks:
            x = block(x)
        return {name: head(part) for (name, head), part in zip(self.heads.items(), x.unbind(), strict=True)}

    def _context(self, projected: Tensor, sample: TokenSample, where: Tensor) -> Tensor:
        """What the queries attend to, [T, N, V+1, D]: the tokens, the visible ones with domain and position added."""
        num_patches = len(where)
        # as a product, since the gradient of a look-up would be summed in no fixed order on a GPU
        domain = F.one_hot(sample.index // num_patches, self.task_embeddings.shape[1]).to(where.dtype)
        embedding = torch.einsum("nvk,tkd->tnvd", domain, self.task_embeddings) + where[sample.index % num_patches]
        return torch.cat([projected[:, :, :-1] + embedding, projected[:, :, -1:]], dim=2)

    def _queries(self, projected: Tensor, sample: TokenSample, where: Tensor) -> Tensor:
        """[T, N, L, D]: own visible tokens, mask tokens elsewhere, with the own domain's embedding and positions."""
        slots = self._slots(sample, len(where))
        num_visible = sample.index.shape[1]
        shown = (slots < num_visible)[..., None]
        slots = slots.clamp(max=num_visible - 1)[..., None].expand(-1, -1, -1, projected.shape[-1])
        nothing = torch.zeros_like(self.mask_token[0])
        own = [nothing if k is None else self.task_embeddings[decoder, k] for decoder, k in enumerate(self.own)]
        mask_token = self.mask_token[:, None, None].to(projected.dtype)
        x = torch.where(shown, projected.gather(2, slots), mask_token)
        return x + torch.stack(own)[:, None, None] + where

    def _slots(self, sample: TokenSample, num_patches: int) -> Tensor:
        """Which of the V tokens shows each patch of each decoder's domain: int64 [T, N, L], V where none does."""
        num, num_visible = sample.index.shape
        slot = torch.arange(num_visible, device=sample.index.device).expand(num, -1)
        if sample.real is not None:
            slot = torch.where(sample.real, slot, num_visible)
        num_inputs = self.task_embeddings.shape[1]
        slots = slot.new_full((num, (num_inputs + 1) * num_patches), num_visible)  # one domain more, never visible
        slots = slots.scatter(1, sample.index, slot).unflatten(1, (num_inputs + 1, num_patches))
        own = [num_inputs if k is None else k for k in self.own]
        return torch.stack([slots[:, k] for k in own])
