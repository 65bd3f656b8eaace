"""MultiMAE: a masked autoencoder with a ViT that reads any subset of domains and reconstructs domains from it.

Shapes: N samples, S image side in pixels, p patch side in pixels, G patches on a side, L = G*G patches, K input domains,
T = K*L tokens in the order of the domains, V visible ones, E encoder width.
Source: "MultiMAE meets Earth Observation", arXiv 2505.14951; Bachmann et al., "MultiMAE", arXiv 2204.01678.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mpmae.domains import NORM_DOMAIN, NORM_HEAD, Domain, modalities_of
from mpmae.loader.batch import Batch
from mpmae.modalities import band_indices
from mpmae.models.losses import weigh
from mpmae.models.multimae import checks
from mpmae.models.multimae.adapters import adapter_of
from mpmae.models.multimae.decoders import Decoders
from mpmae.models.multimae.draw import TokenDraw, draw_tokens, random_draw
from mpmae.models.multimae.losses import domain_share
from mpmae.models.multimae.positions import positions, sincos_table, table_side
from mpmae.models.multimae.sampler import TokenSample, sample_tokens
from mpmae.models.multimae.views import View, map_of, patches_of, view_of
from mpmae.models.multimae.vit import Block

if TYPE_CHECKING:  # a model needs torch and numpy alone
    from mpmae.shard_format import Manifest

_NORMS = ("norm.weight", "norm1.weight", "norm2.weight")


class MultiMAEOutput(NamedTuple):
    """What a forward pass gives.

    loss: scalar, this micro batch's share of the loss of the global batch (shares add up over micro batches and ranks).
    losses: decoder -> unweighted share, a scalar. log_vars: decoder -> s_i, detached; empty without uncertainty weighting.
    predictions: empty unless asked for; decoder -> [N, C, H, H], values or logits of the classes at the domain's resolution.
    latent: [N, V+1, E], the encoder's tokens, the global one last. tokens: which tokens it saw.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    log_vars: dict[str, Tensor]
    predictions: dict[str, Tensor]
    latent: Tensor
    tokens: TokenSample


class Features(NamedTuple):
    """What the encoder gives for all tokens of some domains.

    patches: domain -> [N, L, E]. available: domain -> bool [N, L], False for patches without data, which nothing attended
    and whose features say nothing. summary: [N, E], the global token.
    """

    patches: dict[str, Tensor]
    available: dict[str, Tensor]
    summary: Tensor


class MultiMAE(nn.Module):
    """Input adapters, ViT encoder, the stacked decoders and their losses. Built by `mpmae.create_model`.

    alphas: one per input domain. bands_available: modality -> bands that the tensors of a batch hold. num_visible: V.
    Everything else as in `mpmae.models.multimae.presets.create_multimae`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        img_size: int,
        patch_size: int,
        domains_in: tuple[Domain, ...],
        domains_out: tuple[Domain, ...],
        num_visible: int,
        alphas: tuple[float, ...],
        sample_domains_uniformly: bool,
        extra_norm_rgb: bool,
        loss_weighting: str,
        decoder_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        bands_available: dict[str, tuple[str, ...]],
        reference_quirks: bool,
    ):
        super().__init__()
        self.img_size, self.patch_size, self.num_visible = img_size, patch_size, num_visible
        self.num_patches_side = img_size // patch_size
        self.num_patches = self.num_patches_side**2
        self.num_tokens = len(domains_in) * self.num_patches
        self.domains_in = {domain.name: domain for domain in domains_in}
        self.targets = {domain.name: domain for domain in domains_out}
        if extra_norm_rgb:
            self.targets[NORM_HEAD] = next(d for d in (*domains_in, *domains_out) if d.name == NORM_DOMAIN)
        self.alphas, self.sample_domains_uniformly = alphas, sample_domains_uniformly
        self.bands_available, self.reference_quirks = bands_available, reference_quirks

        self.input_adapters = nn.ModuleDict({d.name: adapter_of(d, dim, patch_size) for d in domains_in})
        self.register_buffer("table", sincos_table(dim, table_side(patch_size)), persistent=False)
        self.global_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.encoder = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        names_in = list(self.domains_in)
        heads = {
            name: (
                names_in.index(domain.name) if domain.name in names_in else None,
                domain.num_channels * (patch_size // domain.stride) ** 2,
            )
            for name, domain in self.targets.items()
        }
        self.decoders = Decoders(
            heads,
            num_inputs=len(names_in),
            dim_in=dim,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            table_side=table_side(patch_size),
        )
        self.log_vars = nn.Parameter(torch.zeros(len(heads))) if loss_weighting == "uncertainty" else None
        # as buffers, so that picking bands and drawing tokens move nothing to the device
        self.register_buffer("alpha_values", torch.tensor(alphas), persistent=False)
        for domain in {**self.domains_in, **self.targets}.values():
            self.register_buffer(f"select_{domain.name}", self._selection(domain), persistent=False)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that a batch must hold."""
        return modalities_of(domain.name for domain in (*self.domains_in.values(), *self.targets.values()))

    @property
    def target_modalities(self) -> dict[str, str]:
        """Name of each loss, in their order, -> the modality whose tiles it is averaged over."""
        return {name: domain.modality for name, domain in self.targets.items()}

    @property
    def class_targets(self) -> dict[str, int]:
        """Names of the losses whose targets are classes -> number of logits."""
        return {name: domain.num_classes for name, domain in self.targets.items() if domain.num_classes}

    def class_ids(self, batch: Batch, name: str) -> Tensor:
        """int64 [N, H, H], the targets of the loss `name`, one of `class_targets`; negative where there is no data."""
        values, valid = self._view(batch, self.targets[name])
        return torch.where(valid, values, -1)

    def decays(self, name: str) -> bool:
        """Whether weight decay acts on the parameter of that name: on matrices, and with the quirks on everything."""
        return self.reference_quirks or (name.endswith(".weight") and not name.endswith(_NORMS))

    def input_record(self, manifest: "Manifest") -> dict[str, Any]:
        """What a checkpoint says of the input: `domains_in`, and the `statistics` of their continuous bands in raw units.

        statistics: key of `manifest.band_stats`, such as "sentinel2_l2a" or "aster", -> {"bands", "mean", "std"}.
        """
        bands: dict[str, list[str]] = {}
        for domain in self.domains_in.values():
            if domain.bands:
                bands.setdefault(domain.modality, []).extend(domain.bands)
        statistics = {}
        for modality, names in bands.items():
            statistics |= manifest.statistics_of(modality, tuple(dict.fromkeys(names)))
        return {"domains_in": list(self.domains_in), "statistics": statistics}

    def draw(self, seed: int, epoch: int, sample_ids: Tensor) -> TokenDraw:
        """The random numbers behind the tokens of these samples: the same over any number of ranks and after a resume."""
        return draw_tokens(seed, epoch, sample_ids, self.alphas, self.num_patches)

    def forward(
        self, batch: Batch, tokens: TokenDraw | TokenSample | None = None, return_predictions: bool = False
    ) -> MultiMAEOutput:
        """Loss share, latent and, if asked for, predictions.

        tokens: random numbers (`draw`) that the sampler makes V tokens of, where the samples have data; or the tokens
        themselves. None: random numbers from torch's generator.
        Raises ConfigError for a batch or tokens that do not fit the model, and for a sample without any data in the input
        domains. What the values must be (class ids, that some data is there, token numbers) is looked for only on the CPU:
        elsewhere the look would stall the device; there a sample without data has a loss that knows of nothing.
        """
        checks.check_batch(self, batch, self.modalities, scored={d.modality for d in self.targets.values()})
        views = {name: self._view(batch, domain) for name, domain in {**self.domains_in, **self._plain_targets()}.items()}
        sample = self._sample(batch, views, tokens)
        embedded = self._embed(views, tuple(self.domains_in))
        latent = self._encode(embedded.gather(1, sample.index[:, :, None].expand(-1, -1, embedded.shape[2])), sample.real)
        flat = self.decoders(latent, sample, self.num_patches_side)
        loss, shares = self._loss(batch, views, flat, sample)
        predictions = {}
        if return_predictions:
            channels = {name: domain.num_channels for name, domain in self.targets.items()}
            predictions = {name: map_of(flat[name], channels[name], self.num_patches_side) for name in flat}
        # copies, since ZeRO-3 and FSDP free a gathered parameter after the forward pass
        log_vars = {} if self.log_vars is None else dict(zip(shares, self.log_vars.detach().clone().unbind(), strict=True))
        return MultiMAEOutput(loss, shares, log_vars, predictions, latent, sample)

    def encode(self, batch: Batch, domains: Sequence[str] | None = None) -> Features:
        """Features of all patches of some input domains (None: of all), which may be any subset and need no other data.

        Raises ConfigError for a domain that is none of the inputs, and for a batch as `forward` does.
        """
        names = checks.domain_subset(self, domains)
        modalities = tuple(dict.fromkeys(self.domains_in[name].modality for name in names))
        checks.check_batch(self, batch, modalities, scored=set())
        views = {name: self._view(batch, self.domains_in[name]) for name in names}
        available = self._available(views, names)
        checks.check_data(batch, available, names)
        x = self._encode(self._embed(views, names), None if checks.known_full(available) else available.flatten(1))
        patches = x[:, :-1].unflatten(1, (len(names), -1)).unbind(1)
        return Features(dict(zip(names, patches, strict=True)), dict(zip(names, available.unbind(1), strict=True)), x[:, -1])

    def _plain_targets(self) -> dict[str, Domain]:
        return {domain.name: domain for domain in self.targets.values()}

    def _view(self, batch: Batch, domain: Domain) -> View:
        dtype = torch.float64 if self.global_tokens.dtype == torch.float64 else torch.float32
        return view_of(domain, batch, getattr(self, f"select_{domain.name}"), dtype, self.reference_quirks)

    def _available(self, views: dict[str, View], names: Sequence[str]) -> Tensor:
        """Which patches have any data: bool [N, number of names, L]."""
        return torch.stack([self._patches(views[name].valid).any(2) for name in names], dim=1)

    def _patches(self, values: Tensor) -> Tensor:
        """[N, L, Q] of a domain's values, or [N, L, P*P] of its class ids."""
        return patches_of(values if values.ndim == 4 else values[:, None], self.num_patches_side)

    def _sample(self, batch: Batch, views: dict[str, View], tokens: TokenDraw | TokenSample | None) -> TokenSample:
        device = batch.sample_ids.device
        available = self._available(views, tuple(self.domains_in))
        checks.check_data(batch, available, tuple(self.domains_in))
        if isinstance(tokens, TokenSample):
            checks.check_sample(self, tokens, len(batch))
            return tokens.to(device)
        if tokens is None:
            tokens = random_draw(len(batch), self.alpha_values, self.num_patches)
        checks.check_draw(self, tokens, len(batch))
        return sample_tokens(
            tokens.to(device),
            available,
            self.num_visible,
            uniform=self.sample_domains_uniformly,
            quirks=self.reference_quirks,
        )

    def _embed(self, views: dict[str, View], names: Sequence[str]) -> Tensor:
        """The tokens of the domains with their positions, [N, number of names * L, E]."""
        dtype, tokens = self.global_tokens.dtype, []
        for name in names:
            adapter, values = self.input_adapters[name], views[name].values
            where = positions(self.table, self.num_patches_side, adapter.position_mode)
            # the table stays float32 where an engine keeps the weights, and so the blocks, in bf16
            tokens.append((adapter(values if not values.is_floating_point() else values.to(dtype)) + where).to(dtype))
        return torch.cat(tokens, dim=1)

    def _encode(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """[N, V+1, E] of tokens [N, V, E], the global one last; `real` bool [N, V] or None as in TokenSample."""
        shared = self.global_tokens.expand(len(tokens), -1, -1).to(tokens.dtype)
        x = torch.cat([tokens, shared], dim=1)
        if real is not None:
            real = nn.functional.pad(real, (0, 1), value=True)
        for block in self.encoder:
            x = block(x, real)
        return x

    def constant_shares(self, batch: Batch, tokens: TokenDraw, constants: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unweighted loss shares of a predictor that says the same everywhere, whatever it sees.

        tokens: as `draw` gives them. constants: per target one value [1] for all bands (normalised units), or the logits of
        the classes [K].
        """
        views = {domain.name: self._view(batch, domain) for domain in (*self.domains_in.values(), *self.targets.values())}
        flat = {}
        for name, domain in self.targets.items():
            values = constants[name].expand(domain.num_channels)
            flat[name] = values.repeat_interleave((self.patch_size // domain.stride) ** 2).expand(
                len(batch), self.num_patches, -1
            )
        return self._shares(batch, views, flat, self._sample(batch, views, tokens))

    def _loss(
        self, batch: Batch, views: dict[str, View], flat: dict[str, Tensor], sample: TokenSample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        shares = self._shares(batch, views, flat, sample)
        loss = weigh(
            shares,
            self.log_vars,
            ~batch.padding,
            num_present={name: batch.num_present[modality] for name, modality in self.target_modalities.items()},
            global_batch_size=batch.global_batch_size,
            quirks=self.reference_quirks,
        )
        return loss, shares

    def _shares(
        self, batch: Batch, views: dict[str, View], flat: dict[str, Tensor], sample: TokenSample
    ) -> dict[str, Tensor]:
        """Unweighted loss shares of predictions [N, L, Q]."""
        hidden, shares = self._hidden(sample), {}
        for name, domain in self.targets.items():
            values, valid = views[domain.name]
            shares[name] = domain_share(
                domain,
                flat[name],
                self._patches(values),
                self._patches(valid),
                hidden[domain.name],
                ~batch.padding,
                num_present=batch.num_present[domain.modality],
                global_batch_size=batch.global_batch_size,
                norm_pix=name == NORM_HEAD,
                quirks=self.reference_quirks,
            )
        return shares

    def _hidden(self, sample: TokenSample) -> dict[str, Tensor]:
        """Domain -> which of its patches the encoder did not see, bool [N, L]: all of a domain that is no input."""
        num = len(sample.index)
        seen = torch.ones_like(sample.index, dtype=torch.bool) if sample.real is None else sample.real
        hidden = torch.ones(num, self.num_tokens, dtype=torch.bool, device=seen.device).scatter(1, sample.index, ~seen)
        split = dict(zip(self.domains_in, hidden.unflatten(1, (-1, self.num_patches)).unbind(1), strict=True))
        everything = torch.ones_like(hidden[:, : self.num_patches])
        return {domain.name: split.get(domain.name, everything) for domain in self.targets.values()}

    def _selection(self, domain: Domain) -> Tensor | None:
        """Positions of the domain's bands in the batch's tensor; None when it holds just these."""
        available = self.bands_available.get(domain.modality, ())
        if domain.loss == "classes" or tuple(domain.bands) == tuple(available):
            return None
        return torch.tensor(band_indices(domain.modality, domain.bands, available))
