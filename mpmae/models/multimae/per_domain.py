"""The decoders one by one, as the published code runs them: what `Decoders` must agree with and is measured against.

Shapes: N samples, L patches, V visible tokens, E encoder width, D decoder width, Q values of a patch.
Source: MultiMAE (arXiv 2204.01678), `output_adapters.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.models.multimae.decoders import POSITION_MODE, Decoders
from mpmae.models.multimae.positions import positions
from mpmae.models.multimae.sampler import TokenSample
from mpmae.models.multimae.vit import PLAIN, Block, CrossAttention, Mlp


class DomainDecoder(nn.Module):
    """One decoder of `Decoders`, the one called `name`, with a copy of its weights."""

    def __init__(self, stacked: Decoders, name: str):
        super().__init__()
        number = list(stacked.heads).index(name)
        dim_in, dim = stacked.proj_context.weight.shape[2], stacked.mask_token.shape[1]
        num_heads = stacked.cross.num_heads
        self.own = stacked.own[number]
        self.proj_context = nn.Linear(dim_in, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.task_embeddings = nn.Parameter(torch.empty(stacked.task_embeddings.shape[1:]))
        self.register_buffer("table", stacked.table, persistent=False)
        self.query_norm, self.context_norm, self.out_norm = PLAIN.norm(dim), PLAIN.norm(dim), PLAIN.norm(dim)
        self.cross = CrossAttention(dim, num_heads, PLAIN)
        self.mlp = Mlp(dim, PLAIN)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in stacked.blocks)
        self.head = nn.Linear(dim, stacked.heads[name].out_features)
        part = {key: value[number] for key, value in stacked.state_dict().items() if not key.startswith("heads.")}
        head = {f"head.{key}": value for key, value in stacked.heads[name].state_dict().items()}
        self.to(self.table.dtype).load_state_dict(part | head)

    def forward(self, tokens: Tensor, sample: TokenSample, num_patches_side: int) -> Tensor:
        """The decoder's part of what `Decoders.forward` gives, [N, L, Q]."""
        where = positions(self.table, num_patches_side, POSITION_MODE)
        queries, context = self.queries_and_context(self.proj_context(tokens), sample, where)
        real = None if sample.real is None else F.pad(sample.real, (0, 1), value=True)
        x = self.cross(self.query_norm(queries), self.context_norm(context), real)
        x = x + self.mlp(self.out_norm(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def queries_and_context(self, projected: Tensor, sample: TokenSample, where: Tensor) -> tuple[Tensor, Tensor]:
        """[N, L, D] and [N, V+1, D] of projected tokens [N, V+1, D] and the patches' positions [L, D]."""
        num_patches, num = len(where), len(projected)
        domain, patch = sample.index // num_patches, sample.index % num_patches
        placed = projected[:, :-1] + self.task_embeddings[domain] + where[patch]
        context = torch.cat([placed, projected[:, -1:]], dim=1)
        embedding = 0 if self.own is None else self.task_embeddings[self.own]
        queries = (self.mask_token + embedding + where).expand(num, -1, -1)
        shown = domain == -1 if self.own is None else domain == self.own
        if sample.real is not None:
            shown = shown & sample.real
        # one row more takes what is not shown
        queries = F.pad(queries, (0, 0, 0, 1))
        slot = torch.where(shown, patch, num_patches)[..., None].expand(-1, -1, queries.shape[2])
        return queries.scatter(1, slot, placed)[:, :-1], context


class PerDomainDecoders(nn.ModuleDict):
    """All decoders of `stacked` as modules of their own, with copies of their weights; called as it is."""

    def __init__(self, stacked: Decoders):
        super().__init__({name: DomainDecoder(stacked, name) for name in stacked.heads})

    def forward(self, tokens: Tensor, sample: TokenSample, num_patches_side: int) -> dict[str, Tensor]:
        """As `Decoders.forward`."""
        return {name: decoder(tokens, sample, num_patches_side) for name, decoder in self.items()}
