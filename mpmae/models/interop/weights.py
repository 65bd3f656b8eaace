"""`Weights`: a state dict under our names, with what stood beside it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mpmae.errors import CheckpointError
from mpmae.modalities import spec_of
from mpmae.models.dense import FIRST_TILE_SIDE, REFERENCE_GRN_EPS, SPARSE_GRN_EPS, STEM_PADDINGS
from mpmae.models.interop.multimae_names import MULTIMAE_SCHEMES, domains_of

# Input of the published MMEarth checkpoints by number of bands (MMEarth-train, MODALITIES.py); its rgb is blue, green, red.
# The one of patch size 32 among them was trained on photographs.
_DEFAULT_BANDS = spec_of("sentinel2").model_bands
_MMEARTH_BANDS = {12: _DEFAULT_BANDS, 3: ("B2", "B3", "B4")}
_IMAGENET_PATCH_SIZE = 32


@dataclass(frozen=True)
class Weights:
    """A state dict under our names and where it comes from.

    state: see `names_in`, and of a MultiMAE `multimae`. scheme: whose names it had, one of `names_in.SCHEMES`. source: file
    or folder, for messages. config: what stood beside the weights (checkpoint.json, an exported config.json, or the command
    line in a published MultiMAE checkpoint), or None. unknown: names in the source that mean nothing in its scheme, which
    are not in `state`. reshaped: "name [shape] -> name [shape]", where that changed.
    """

    state: dict[str, Tensor]
    scheme: str
    source: str
    config: dict[str, Any] | None = None
    unknown: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = field(default=(), repr=False)

    @property
    def family(self) -> Literal["convnext", "multimae"]:
        """What model these are of: a ConvNeXt V2, MP-MAE's encoder included, or a MultiMAE."""
        return "multimae" if self.scheme in MULTIMAE_SCHEMES else "convnext"

    def recorded(self, key: str) -> Any:
        """What `config` says of `key`: at its top, or in our part of a config.json that another program owns; else None."""
        return self._own_config().get(key)

    def _own_config(self) -> dict[str, Any]:
        config = self.config or {}
        ours = config.get("mpmae")
        return config | ours if isinstance(ours, dict) else config

    def option(self, key: str) -> Any:
        """The argument `key` of `mpmae.create_model` with which the model was built; None where nothing beside it says."""
        value = self.recorded(key)
        return self._run_model().get(key) if value is None else value

    def _run_model(self) -> dict[str, Any]:
        """The section `model` of the run's configuration."""
        run = self.recorded("config") or (self.recorded("provenance") or {}).get("run_config") or {}
        return run.get("model") or {}

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the training's input in raw units, as they stand beside the weights; empty where nothing does."""
        return self.recorded("statistics") or {}

    @property
    def img_size(self) -> int | None:
        """Side of the images of the training in pixels; None where nothing says."""
        return self.option("img_size")

    @property
    def domains_in(self) -> tuple[str, ...] | None:
        """The input domains of a MultiMAE, in the order of its tokens; None for another model.

        Raises CheckpointError if what stands beside the weights names others.
        """
        if self.family != "multimae":
            return None
        found, said = domains_of(self.state), self.recorded("domains_in")
        if said is not None and set(said) != set(found):
            raise CheckpointError(
                f"{self.source}: its config names the input domains {', '.join(said)}, its weights read {', '.join(found)}; "
                "the weights and the file beside them are not of one model"
            )
        return found

    @property
    def bands_in(self) -> tuple[str, ...] | None:
        """Sentinel-2 bands that the stem reads, in the order of its channels; None where nothing says.

        Those recorded beside the weights, else `bands_by_convention`.
        """
        if "bands_in" in self._own_config():
            bands = self.recorded("bands_in")
        else:  # a checkpoint of an earlier version holds the configuration alone
            run = (self.recorded("config") or {}).get("model") or {}
            bands = run.get("bands_in") or self.bands_by_convention
        return None if bands is None else tuple(bands)

    @property
    def bands_by_convention(self) -> tuple[str, ...] | None:
        """The bands of a stem like this in MMEarth's published checkpoints, or in a run of ours that names none."""
        conv = self.state.get("encoder.stem.conv.weight")
        if conv is None or conv.ndim != 4:
            return None
        pool = self.state.get("encoder.stem.pool.weight", conv)
        if self.recorded("config"):
            table = {len(_DEFAULT_BANDS): _DEFAULT_BANDS}
        elif self.scheme.startswith("mmearth") and pool.shape[-1] * FIRST_TILE_SIDE != _IMAGENET_PATCH_SIZE:
            table = _MMEARTH_BANDS
        else:
            table = {}
        return table.get(conv.shape[1])

    @property
    def stem_padding(self) -> str:
        """With which the dense model computes what these weights were trained for: see `mpmae.models.dense.Backbone`."""
        unet = any(name.startswith("upsamples.") for name in self.state)  # the published one pads as ours does
        recorded = self.recorded("stem_padding")
        if recorded not in (None, *STEM_PADDINGS):
            raise CheckpointError(
                f"{self.source}: its config has stem_padding {recorded!r}, expected one of {', '.join(STEM_PADDINGS)}"
            )
        return recorded or ("reference" if self._as_published and not unet else "same")

    @property
    def grn_eps(self) -> float:
        """As `stem_padding`, for the epsilon of GRN."""
        recorded = self.recorded("grn_eps")
        if recorded is not None and not (isinstance(recorded, int | float) and recorded > 0):
            raise CheckpointError(f"{self.source}: its config has grn_eps {recorded!r}, expected a small positive number")
        return recorded or (REFERENCE_GRN_EPS if self._as_published else SPARSE_GRN_EPS)

    @property
    def _as_published(self) -> bool:
        """Whether these were trained as the published dense model, by its own code or by a run of ours with its quirks."""
        run = (self.recorded("config") or {}).get("model") or {}
        return self.scheme == "mmearth-dense" or (run.get("encoder") == "dense" and run.get("reference_quirks") is True)
