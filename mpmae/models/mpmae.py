"""MP-MAE: a masked autoencoder that reconstructs many Earth-observation modalities from Sentinel-2.

Shapes: N samples, B input bands, S image side in pixels, p patch side in pixels, G patches on a side, L = G*G patches,
V visible and M = L - V hidden ones, C channels.
Source: Nedungadi et al., "MMEarth", arXiv 2405.02771, section 4.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mpmae.errors import ConfigError
from mpmae.loader.batch import Batch
from mpmae.masking import draw_visible
from mpmae.modalities import band_indices, spec_of
from mpmae.models import blocks, losses
from mpmae.models.decoder import Decoder, Heads
from mpmae.models.encoder import DenseEncoder, SparseEncoder

if TYPE_CHECKING:  # a model needs torch and numpy alone
    from mpmae.shard_format import Manifest

INPUT = "sentinel2"
ENCODERS = ("sparse", "dense")


class MPMAEOutput(NamedTuple):
    """What a forward pass gives: a tuple, since DDP and ZeRO-3 find tensors in tuples but not in dataclasses.

    loss: scalar, this micro batch's share of the loss of the global batch (shares add up over micro batches and ranks).
    losses: modality -> unweighted share, a scalar. log_vars: modality -> s_i, detached; empty without uncertainty weighting.
    predictions: empty unless asked for; pixel [N, p*p*C, G, G] with channel (row*p + column)*C + c, tile [N, C].
    latent: [N, C, G, G], the encoder's features: 0 at hidden patches, unless the encoder is dense. visible: int64 [N, V].
    """

    loss: Tensor
    losses: dict[str, Tensor]
    log_vars: dict[str, Tensor]
    predictions: dict[str, Tensor]
    latent: Tensor
    visible: Tensor


class MPMAE(nn.Module):
    """Encoder, shared decoder, one head per modality and their losses. Built by `mpmae.create_model`.

    bands_out: modality -> bands to reconstruct, in the order of the losses. bands_available: modality -> bands that the
    tensors of a batch hold. Everything else as in `mpmae.create_model`.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        img_size: int,
        patch_size: int,
        num_visible: int,
        bands_in: tuple[str, ...],
        bands_out: dict[str, tuple[str, ...]],
        bands_available: dict[str, tuple[str, ...]],
        encoder: str,
        stem: str,
        loss_weighting: str,
        norm_pix_loss: bool,
        decoder_dim: int,
        decoder_depth: int,
        grn_scope: str,
        gelu: str,
        reference_quirks: bool,
    ):
        super().__init__()
        self.img_size, self.patch_size, self.num_visible = img_size, patch_size, num_visible
        self.num_patches_side = img_size // patch_size
        self.num_patches = self.num_patches_side**2
        self.bands_in, self.bands_out, self.bands_available = bands_in, bands_out, bands_available
        self.norm_pix_loss, self.reference_quirks, self.grn_scope = norm_pix_loss, reference_quirks, grn_scope
        if encoder == "sparse":
            self.encoder = SparseEncoder(
                dims,
                depths,
                num_bands=len(bands_in),
                img_size=img_size,
                patch_size=patch_size,
                stem=stem,
                grn_scope=grn_scope,
                gelu=gelu,
            )
        else:
            self.encoder = DenseEncoder(
                dims,
                depths,
                in_chans=len(bands_in),
                patch_size=patch_size,
                stem=stem,
                stem_padding="reference" if reference_quirks else "same",
            )
        self.decoder = Decoder(dims[-1], decoder_dim, decoder_depth, self.num_patches_side, gelu)
        channels = {name: spec_of(name).num_classes or len(bands) for name, bands in bands_out.items()}
        self.heads = Heads(channels, decoder_dim, patch_size)
        self.log_vars = nn.Parameter(torch.zeros(len(bands_out))) if loss_weighting == "uncertainty" else None
        # positions of the bands in the batch's tensors, as buffers so that picking them moves nothing to the device
        self.register_buffer("select_in", self._selection(INPUT, bands_in), persistent=False)
        for name, bands in bands_out.items():
            self.register_buffer(f"select_{name}", self._selection(name, bands), persistent=False)

    @property
    def modalities_out(self) -> tuple[str, ...]:
        """The reconstructed modalities, in the order of the losses and of `log_vars`."""
        return tuple(self.bands_out)

    @property
    def target_modalities(self) -> dict[str, str]:
        """Name of each loss, in their order, -> the modality whose tiles it is averaged over: the same."""
        return {name: name for name in self.bands_out}

    @property
    def class_targets(self) -> dict[str, int]:
        """Names of the losses whose targets are classes -> number of logits."""
        return {name: spec_of(name).num_classes for name in self.bands_out if spec_of(name).kind == "categorical"}

    def class_ids(self, batch: Batch, name: str) -> Tensor:
        """int64 [N, ...], the targets of the loss `name`, one of `class_targets`; negative where there is no data."""
        return batch.values[name]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that a batch must hold."""
        return tuple(dict.fromkeys((INPUT, *self.bands_out)))

    def draw(self, seed: int, epoch: int, sample_ids: Tensor) -> Tensor:
        """Visible patches of these samples as `forward` takes them: the same over any number of ranks and after a resume."""
        return draw_visible(seed, epoch, sample_ids, self.num_patches, self.num_visible)

    def input_record(self, manifest: "Manifest") -> dict[str, Any]:
        """What a checkpoint says of the input: `bands_in` and their `statistics` by product level, in raw units."""
        return {"bands_in": list(self.bands_in), "statistics": manifest.input_statistics(self.bands_in)}

    def forward(self, batch: Batch, visible: Tensor | None = None, return_predictions: bool = False) -> MPMAEOutput:
        """Loss share, latent and, if asked for, full predictions.

        visible: int64 [N, V], ascending patch numbers of each row, best left on the CPU: it is checked there and moved to
        the batch's device. Without it a random one is drawn from torch's generator; `mpmae.masking.draw_visible` gives one
        that is the same over any number of ranks and after a resume.
        Pixel heads run at hidden patches only, together with their losses; `return_predictions` runs them once more.
        Raises ConfigError for a batch or an index that does not fit the model. Duplicate or out-of-range patch numbers are
        looked for only in an index on the CPU: elsewhere the look would stall the device.
        """
        self._check_batch(batch)
        visible = self._visible(batch, visible)
        tokens, latent = self._encode(batch, visible)
        grid = self.decoder(tokens, visible)
        hidden = blocks.hidden_patches(visible, self.num_patches)
        tile = self.heads.tile_predictions(grid)
        loss, shares = self._loss(batch, tile, hidden, grid)
        predictions = {}
        if return_predictions:
            pixel = {name: _as_map(head(grid), self.num_patches_side) for name, head in self.heads.pixel.items()}
            predictions = {name: (pixel | tile)[name] for name in self.modalities_out}
        # copies, since ZeRO-3 and FSDP free a gathered parameter after the forward pass
        log_vars = {} if self.log_vars is None else dict(zip(shares, self.log_vars.detach().clone().unbind(), strict=True))
        return MPMAEOutput(loss, shares, log_vars, predictions, latent, visible)

    def encode(self, batch: Batch, visible: Tensor) -> Tensor:
        """Features of the visible patches, [N, V, C]; any V >= 1 goes. Needs `sentinel2` of the batch only.

        A value that is NaN or infinite counts as not valid, whatever the batch says.
        """
        return self._encode(batch, visible)[0]

    def _encode(self, batch: Batch, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the visible patches, [N, V, C], and the encoder's map, [N, C, G, G]."""
        values, valid = batch.values[INPUT], batch.valid[INPUT]
        if self.select_in is not None:
            values, valid = (t.index_select(1, self.select_in) for t in (values, valid))
        valid = valid & values.isfinite()
        image = torch.where(valid, values, 0)
        pixel_valid = (image != 0 if self.reference_quirks else valid).any(1)
        if self.grn_scope == "batch":
            pixel_valid = pixel_valid & ~batch.padding[:, None, None]  # padding must not enter the norm of the others
        features = self.encoder(image, pixel_valid, visible)
        if isinstance(self.encoder, DenseEncoder):
            return blocks.pack_patches(features, visible, patch_size=1).flatten(2), features
        latent = blocks.fill_hidden(features, visible, features.new_zeros(features.shape[-1]), self.num_patches)
        return features, _as_map(latent, self.num_patches_side)

    def _at_patches(self, grid: Tensor, patches: Tensor) -> Tensor:
        """The features [N, P, D] of `grid` [N, L, D] at `patches` int64 [N, P]."""
        sample = torch.arange(len(patches), device=patches.device)[:, None] * self.num_patches
        return blocks.pack_sites(grid.unflatten(1, (self.num_patches_side, -1)), patches + sample)

    def constant_shares(self, batch: Batch, visible: Tensor, constants: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unweighted loss shares of a predictor that says the same everywhere, whatever it sees.

        constants: per modality one value [1] for all bands (normalised units), or the logits of the classes [K].
        """
        hidden = blocks.hidden_patches(visible, self.num_patches)
        predictions = {}
        for name, constant in constants.items():
            spec = spec_of(name)
            if spec.kind == "categorical":
                values = constant.repeat(self.patch_size**2) if spec.scope == "pixel" else constant
            else:
                values = constant.expand(len(self.bands_out[name]) * (self.patch_size**2 if spec.scope == "pixel" else 1))
            predictions[name] = values.expand(len(batch), *(hidden.shape[1:] if spec.scope == "pixel" else ()), -1)
        return self._shares(batch, predictions, hidden)

    def _loss(self, batch: Batch, tile: dict[str, Tensor], hidden: Tensor, grid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        at_hidden = self._at_patches(grid, hidden) if self.heads.pixel else None
        if self.reference_quirks:
            predictions = tile | {name: head(at_hidden) for name, head in self.heads.pixel.items()}
            shares = self._shares(batch, predictions, hidden)
        else:
            fused = {name: self._fused_share(batch, name, hidden, at_hidden) for name in self.heads.pixel}
            shares = fused | self._shares(batch, tile, hidden)
        shares = {name: shares[name] for name in self.modalities_out}
        loss = losses.weigh(
            shares,
            self.log_vars,
            ~batch.padding,
            num_present=batch.num_present,
            global_batch_size=batch.global_batch_size,
            quirks=self.reference_quirks,
        )
        return loss, shares

    def _fused_share(self, batch: Batch, name: str, hidden: Tensor, at_hidden: Tensor) -> Tensor:
        """A pixel modality's share from the features [N, M, D] at the hidden patches: `modality_share` of the head's output.

        The head's parameters are read here and not in its own forward, for it is not called.
        """
        spec, head = spec_of(name), self.heads.pixel[name]
        return blocks.head_loss(
            at_hidden,
            head.weight,
            head.bias,
            batch.values[name],
            batch.valid[name],
            hidden,
            ~batch.padding,
            patch_size=self.patch_size,
            num_present=batch.num_present[name],
            num_classes=spec.num_classes or 0,
            normalise=losses.is_normalised(spec, self.norm_pix_loss),
            bands=getattr(self, f"select_{name}"),
        )

    def _shares(self, batch: Batch, predictions: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        shares = {}
        for name, prediction in predictions.items():
            target, valid = self._target(batch, name, hidden)
            shares[name] = losses.modality_share(
                spec_of(name),
                prediction,
                target,
                valid,
                ~batch.padding,
                num_present=batch.num_present[name],
                global_batch_size=batch.global_batch_size,
                norm_pix=self.norm_pix_loss,
                quirks=self.reference_quirks,
            )
        return shares

    def _target(self, batch: Batch, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Target and validity of a modality, laid out as its prediction; what is NaN, infinite or no class is not valid."""
        values, valid = batch.values[name], batch.valid[name]
        spec, selection = spec_of(name), getattr(self, f"select_{name}")
        if selection is not None:
            values, valid = (t.index_select(1, selection) for t in (values, valid))
        if spec.scope == "pixel":
            values, valid = (blocks.pack_patches(t, hidden, self.patch_size).flatten(2) for t in (values, valid))
        return values, valid & (values >= 0 if spec.kind == "categorical" else values.isfinite())

    def _selection(self, name: str, bands: tuple[str, ...]) -> Tensor | None:
        """Positions of `bands` in the batch's tensor; None when it holds just these."""
        available = self.bands_available.get(name, ())
        if spec_of(name).kind == "categorical" or tuple(bands) == tuple(available):
            return None
        return torch.tensor(band_indices(name, bands, available))

    def _visible(self, batch: Batch, visible: Tensor | None) -> Tensor:
        device = batch.sample_ids.device
        if visible is None:
            noise = torch.rand(len(batch), self.num_patches, device=device)
            return noise.argsort(1)[:, : self.num_visible].sort(1).values
        problems = []
        expected = (len(batch), self.num_visible)
        if not torch.is_tensor(visible):
            raise ConfigError(f"visible: a {type(visible).__name__}, expected an int64 tensor of shape {list(expected)}")
        if visible.dtype != torch.int64:
            problems.append(
                f"visible: dtype {visible.dtype}, expected torch.int64 patch numbers (see mpmae.masking.visible_index)"
            )
        if tuple(visible.shape) != expected:
            problems.append(f"visible: shape {list(visible.shape)}, expected {list(expected)} (samples, visible patches)")
        elif not problems and visible.device.type == "cpu" and not torch.compiler.is_compiling():
            if int(visible.min()) < 0 or int(visible.max()) >= self.num_patches:
                problems.append(
                    f"visible: patch numbers {int(visible.min())}..{int(visible.max())}, expected 0..{self.num_patches - 1}"
                )
            if bool((visible.diff(dim=1) <= 0).any()):
                problems.append("visible: a row is not strictly ascending; sort it and drop repeats")
        if problems:
            raise ConfigError(problems)
        return visible.to(device, non_blocking=True)

    def _check_batch(self, batch: Batch) -> None:
        problems = [] if len(batch) else ["batch: no samples in it"]
        for name in self.modalities:
            if name not in batch.values or name not in batch.valid:
                problems.append(
                    f"batch: no {name}; it has {', '.join(batch.values)}. Load it or take it out of modalities_out"
                )
                continue
            if name in self.bands_out and name not in batch.num_present:
                problems.append(f"batch.num_present: no {name}; expected its number of tiles in the global batch")
            expected = self._expected_shape(name, len(batch))
            problems += _dtype_problems(batch, name)
            shape, valid_shape = tuple(batch.values[name].shape), tuple(batch.valid[name].shape)
            if shape != expected:
                problems.append(f"batch.values[{name!r}]: shape {list(shape)}, expected {list(expected)}")
            if valid_shape != shape:
                problems.append(
                    f"batch.valid[{name!r}]: shape {list(valid_shape)}, expected that of the values, {list(shape)}"
                )
        if problems:
            raise ConfigError(problems)

    def _expected_shape(self, name: str, num_samples: int) -> tuple[int, ...]:
        spec = spec_of(name)
        if spec.one_hot:
            return (num_samples,)
        channels = 1 if spec.kind == "categorical" else len(self.bands_available[name])
        return (num_samples, channels, self.img_size, self.img_size) if spec.scope == "pixel" else (num_samples, channels)


def _dtype_problems(batch: Batch, name: str) -> list[str]:
    """What is wrong with the types of a modality and, where looking is cheap (on the CPU), with its class ids."""
    values, valid, spec = batch.values[name], batch.valid[name], spec_of(name)
    problems = []
    if valid.dtype != torch.bool:
        problems.append(f"batch.valid[{name!r}]: dtype {valid.dtype}, expected torch.bool")
    if spec.kind != "categorical":
        if not values.is_floating_point():
            problems.append(f"batch.values[{name!r}]: dtype {values.dtype}, expected floating-point numbers")
        return problems
    if values.dtype != torch.int64:
        problems.append(f"batch.values[{name!r}]: dtype {values.dtype}, expected torch.int64 class ids")
    elif not problems and values.shape == valid.shape and values.device.type == "cpu" and not torch.compiler.is_compiling():
        largest = int(torch.where(valid, values, -1).max()) if values.numel() else -1
        if largest >= spec.num_classes:
            problems.append(f"batch.values[{name!r}]: class id {largest}, expected at most {spec.num_classes - 1}")
    return problems


def _as_map(x: Tensor, side: int) -> Tensor:
    """[N, C, G, G] from [N, L, C]."""
    return x.transpose(1, 2).unflatten(2, (side, side))
