"""The ways to take a training step of a MultiMAE: the published code's, and ours in several precisions.

The published code is josesosajs/multimae-meets-eo: attention with its scores in memory, one decoder after the other,
each gathering queries and context out of all tokens, torch's usual AdamW (on a CPU tensor by tensor) and the gradient's norm
tensor by tensor. It asks for mixed precision on CUDA alone (float16 with a loss scaler, the class map's decoder in float32),
so on a CPU it computes in float32. Here it is built of this project's parts; its losses are ours.

Ours is what the engine `ddp` does with one rank: written out, since a GPU machine may lack what configurations need;
tests/benchmarks/test_multimae_step.py holds the two together. All ways share the encoder's and the embeddings' weights.
"""

import copy
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mpmae.loader.batch import Batch
from mpmae.models.multimae import vit
from mpmae.models.multimae.decoders import Decoders
from mpmae.models.multimae.draw import TokenDraw
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.per_domain import DomainDecoder, PerDomainDecoders
from mpmae.models.multimae.sampler import TokenSample

REFERENCE, PLAIN = "published code", "fp32"
GOAL_WAY = "bf16"  # what configs/run/multimae_base_mmearth64.yaml asks for
FLOAT32_DECODER = "semseg"
WEIGHT_DECAY, BETAS = 0.05, (0.9, 0.95)
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("embedding", "encoder", "decoders")
STEP = ("forward", "backward", "optimizer")


@dataclass
class Way:
    """One way to take a step.

    precision: of `DTYPES`, that of the products. part_s: seconds of each call by part of the forward pass, by the clock,
    which says nothing on a GPU.
    """

    name: str
    precision: str
    model: MultiMAE
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    update: Callable[[], Any]
    part_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self):
        _time_parts(self.model, self.part_s)

    def run(self) -> Tensor:
        """One step; its loss."""
        loss = self.forward()
        self.backward(loss)
        self.update()
        return loss.detach()

    def timed(self) -> dict[str, float]:
        """Milliseconds of one step on a CPU, and of its parts; cpu: of computing, whatever else kept the process waiting."""
        self.part_s.clear()
        marks, cpu_s = [time.perf_counter()], time.process_time()
        loss = self.forward()
        marks.append(time.perf_counter())
        self.backward(loss)
        marks.append(time.perf_counter())
        self.update()
        marks.append(time.perf_counter())
        cpu_s = time.process_time() - cpu_s
        ms = {name: 1e3 * (end - begin) for name, (begin, end) in zip(STEP, itertools.pairwise(marks), strict=True)}
        ms |= {"step": 1e3 * (marks[-1] - marks[0]), "cpu": 1e3 * cpu_s}
        return ms | {name: 1e3 * self.part_s[name][0] for name in PARTS}


def all_ways(model: MultiMAE, batch: Batch, tokens: TokenDraw, lr: float = 0.0, tiny: bool = False) -> Iterator[Way]:
    """Ours in fp32, the published code's, then the others, none compiled with `tiny`. A rate of 0 keeps the weights."""
    # copied before any way hangs its clocks on one
    plain, halved, apart, compiled = (sharing(model) for _ in range(4))
    apart.decoders = PerDomainDecoders(model.decoders)
    whole = fused_adamw(model, lr)
    yield ours(PLAIN, plain, whole, batch, tokens, "fp32")
    yield published(model, batch, tokens, lr)
    yield ours(GOAL_WAY, halved, whole, batch, tokens, "bf16")
    yield ours("bf16, decoders one by one", apart, fused_adamw(apart, lr), batch, tokens, "bf16")
    if not tiny:
        yield ours("bf16, compiled", with_compiled_blocks(compiled), whole, batch, tokens, "bf16")


def sharing(model: MultiMAE) -> MultiMAE:
    """A copy of the modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def ours(name: str, model: MultiMAE, optimizer: torch.optim.AdamW, batch: Batch, tokens: TokenDraw, precision: str) -> Way:
    """A step as the engine `ddp` takes it: autocast, the gradient's norm, a fused update that skips what is not finite."""
    device, dtype = batch.sample_ids.device, DTYPES[precision]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(batch, tokens).loss

    def update() -> None:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Way(name, precision, model, forward, Tensor.backward, update)


def fused_adamw(model: MultiMAE, lr: float) -> torch.optim.AdamW:
    """The engines' optimizer."""
    on_gpu = next(model.parameters()).is_cuda
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        (decayed if model.decays(name) else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True, capturable=on_gpu)


def with_compiled_blocks(model: MultiMAE) -> MultiMAE:
    """The model with each block's forward compiled, as the engines do with `engine.compile`."""
    for block in (*model.encoder, *model.decoders.blocks):
        block.forward = torch.compile(block.forward, isolate_recompiles=True)
    return model


class PublishedDecoder(DomainDecoder):
    """A decoder that puts all tokens in order, mask tokens among them, and takes queries and visible ones out of them."""

    def queries_and_context(self, projected: Tensor, sample: TokenSample, where: Tensor) -> tuple[Tensor, Tensor]:
        """As `DomainDecoder.queries_and_context`."""
        num, num_patches, width = len(projected), len(where), projected.shape[2]
        num_hidden = len(self.task_embeddings) * num_patches - sample.index.shape[1]
        mask_tokens = self.mask_token.repeat(num, num_hidden, 1)
        everything = torch.cat([projected[:, :-1], mask_tokens], 1).gather(1, _wide(restoring(sample, num_hidden), width))
        embeddings = [embedding.repeat(num, num_patches, 1) + where for embedding in self.task_embeddings]
        everything = everything + torch.cat(embeddings, 1)
        context = torch.cat([everything.gather(1, _wide(sample.index, width)), projected[:, -1:]], 1)
        return everything[:, self.own * num_patches : (self.own + 1) * num_patches], context


def restoring(sample: TokenSample, num_hidden: int) -> Tensor:
    """Where each token lies when the visible ones come first: int64 [N, T]."""
    hidden = torch.ones(len(sample.index), sample.index.shape[1] + num_hidden, device=sample.index.device)
    hidden = hidden.scatter(1, sample.index, 0.0)
    return hidden.argsort(dim=1, stable=True).argsort(dim=1)  # the index of visible tokens ascends


def _wide(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)


class PublishedDecoders(nn.ModuleDict):
    """One decoder after the other, the class map's in float32 whatever the others compute in."""

    def __init__(self, stacked: Decoders):
        super().__init__({name: PublishedDecoder(stacked, name) for name in stacked.heads})

    def forward(self, tokens: Tensor, sample: TokenSample, num_patches_side: int) -> dict[str, Tensor]:
        """As `Decoders.forward`."""
        predictions = {}
        for name, decoder in self.items():
            if name == FLOAT32_DECODER:
                with torch.autocast(tokens.device.type, enabled=False):
                    predictions[name] = decoder(tokens.float(), sample, num_patches_side)
            else:
                predictions[name] = decoder(tokens, sample, num_patches_side)
        return predictions


def published(model: MultiMAE, batch: Batch, tokens: TokenDraw, lr: float) -> Way:
    """A step as the published code takes it."""
    model = sharing(model)
    model.decoders = PublishedDecoders(model.decoders)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    device = batch.sample_ids.device
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=on_gpu), patch.object(vit, "attend", explicit_attention):
            return model(batch, tokens).loss

    def update() -> Tensor:
        scaler.unscale_(optimizer)
        norm = torch.norm(torch.stack([torch.norm(parameter.grad) for parameter in parameters]))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return norm

    return Way(REFERENCE, "fp16" if on_gpu else "fp32", model, forward, lambda loss: scaler.scale(loss).backward(), update)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """`vit.attend` with scores and their softmax in memory."""
    assert real is None, "a synthetic batch lacks nothing"
    q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def _time_parts(model: MultiMAE, part_s: dict[str, list[float]]) -> None:
    """Hooks that append the seconds of each part of a forward pass; the embedding lasts until the first block begins."""
    started: dict[str, float] = {}

    def begin(part: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(part, time.perf_counter())

    def end(part: str) -> Callable[..., None]:
        return lambda *_: part_s[part].append(time.perf_counter() - started[part])

    first, *_, last = model.encoder
    next(iter(model.input_adapters.values())).register_forward_pre_hook(begin("embedding"))
    first.register_forward_pre_hook(end("embedding"))
    first.register_forward_pre_hook(begin("encoder"))
    last.register_forward_hook(end("encoder"))
    model.decoders.register_forward_pre_hook(begin("decoders"))
    model.decoders.register_forward_hook(end("decoders"))
