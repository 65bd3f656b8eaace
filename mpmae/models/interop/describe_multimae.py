"""What MultiMAE a canonical state dict is of, read off names and shapes."""

import re
from dataclasses import dataclass, field

from torch import Tensor

from mpmae.domains import CLASS_STRIDE, DOMAINS, NORM_DOMAIN, NORM_HEAD
from mpmae.errors import CheckpointError
from mpmae.models.interop.multimae_names import decoders_of, domains_of
from mpmae.models.multimae.presets import SIZES

_HEAD_DIM = 64  # of every usual ViT


@dataclass(frozen=True)
class MultiMAEArchitecture:
    """The facts of a MultiMAE that its weights show.

    dim, depth: width and blocks of the encoder. num_heads: those of the usual size with this width; weights do not show
    them, so that a model of another size may have others; None where no usual size has this width. patch_size: pixels of the
    image. domains_in: input domain -> bands, or classes with the one for no data, in the order of the tokens. decoders: the
    same of the outputs, in the order of the losses. decoder_dim, decoder_depth: 0 without decoders (depth 0 may also be a
    decoder without ViT blocks); their heads are not shown either.
    """

    dim: int
    depth: int
    patch_size: int
    domains_in: dict[str, int] = field(default_factory=dict)
    decoders: dict[str, int] = field(default_factory=dict)
    decoder_dim: int = 0
    decoder_depth: int = 0
    has_log_vars: bool = False

    @property
    def size(self) -> str | None:
        """The name of width and depth: "tiny", ..., "large"; None for other ones."""
        return next((name for name, sizes in SIZES.items() if sizes[:2] == (self.dim, self.depth)), None)

    @property
    def num_heads(self) -> int | None:
        """Heads of the encoder's attention in the usual size of this width, see above."""
        return next((heads for dim, _, heads in SIZES.values() if dim == self.dim), None)

    def __str__(self) -> str:
        size = f"a MultiMAE, {self.size or 'no usual size'} (width {self.dim}, {self.depth} blocks)"
        parts = [size, f"patch size {self.patch_size}", f"input domains {', '.join(self.domains_in)}"]
        if self.decoders:
            parts.append(f"decoders {', '.join(self.decoders)} of {self.decoder_dim} x {self.decoder_depth}")
        parts += ["log variances"] if self.has_log_vars else []
        return ", ".join(parts)


def describe_multimae(state: dict[str, Tensor], where: str = "the state dict") -> MultiMAEArchitecture:
    """The architecture of a MultiMAE's canonical state dict, whose source `where` names.

    Raises CheckpointError if its encoder is not whole, or its parts are not of one model.
    """
    blocks = {int(match[1]) for name in state if (match := re.fullmatch(r"encoder\.(\d+)\.norm1\.weight", name))}
    adapters = {domain: f"input_adapters.{domain}.proj.weight" for domain in domains_of(state)}
    problems = [f"missing {name}" for name in ("global_tokens", *adapters.values()) if name not in state]
    problems += [f"missing encoder.{i}.norm1.weight" for i in range(max(blocks, default=0) + 1) if i not in blocks]
    problems += [
        f"{name} has shape {list(state[name].shape)}, expected [D, C, P, P]"
        for name in adapters.values()
        if name in state and state[name].ndim != 4
    ]
    if problems:
        raise CheckpointError([f"{where}: no whole MultiMAE encoder among {len(state)} tensors: {p}" for p in problems])
    channels, patch_sizes = {}, {}
    for domain, name in adapters.items():
        classes = state.get(f"input_adapters.{domain}.class_emb.weight")
        channels[domain] = state[name].shape[1] if classes is None else classes.shape[0]
        patch_sizes[domain] = state[name].shape[-1] * _stride(domain, state)
    if len(set(patch_sizes.values())) > 1:
        shown = ", ".join(f"{domain} {size}" for domain, size in patch_sizes.items())
        raise CheckpointError(f"{where}: input adapters of different patch sizes ({shown} px) are not of one model")
    patch_size = next(iter(patch_sizes.values()))
    context = state.get("decoders.proj_context.weight")
    return MultiMAEArchitecture(
        dim=state["global_tokens"].shape[-1],
        depth=len(blocks),
        patch_size=patch_size,
        domains_in=channels,
        decoders={name: _out_channels(name, state, patch_size) for name in decoders_of(state)},
        decoder_dim=0 if context is None or context.ndim != 3 else context.shape[1],
        decoder_depth=len({name.split(".")[2] for name in state if name.startswith("decoders.blocks.")}),
        has_log_vars="log_vars" in state,
    )


def _stride(domain: str, state: dict[str, Tensor]) -> int:
    """Pixels of the image on a side of one pixel of the domain; that of class maps for an unknown one with an embedding."""
    if domain in DOMAINS:
        return DOMAINS[domain].stride
    return CLASS_STRIDE if f"input_adapters.{domain}.class_emb.weight" in state else 1


def _out_channels(decoder: str, state: dict[str, Tensor], patch_size: int) -> int:
    domain = NORM_DOMAIN if decoder == NORM_HEAD else decoder
    bias = state.get(f"decoders.heads.{decoder}.bias", state.get(f"decoders.heads.{decoder}.weight"))
    return bias.shape[0] // (patch_size // _stride(domain, state)) ** 2
