"""What config.json says of a ConvNeXt V2, gathered from its weights, from what stood beside them and from a shard set."""

from pathlib import Path

from mpmae.errors import CheckpointError
from mpmae.export.config import ArchitectureEntry, BandStatistics, ExportConfig, Target
from mpmae.export.facts_shared import SharedFacts
from mpmae.models.interop import Architecture, Weights

# What of a model goes into each layout, by the beginning of our names; into the others everything does
DENSE = ("encoder.", "norm.", "head.")
PRETRAINING = ("encoder.", "decoder.", "heads.", "log_vars", "norm.", "head.")
KEPT = {"timm": DENSE, "hub": DENSE, "hf": DENSE, "mmearth": PRETRAINING}


class Facts(SharedFacts):
    """See `SharedFacts`; found: what the weights show."""

    own_schemes = ("mpmae",)

    def __init__(self, weights: Weights, found: Architecture, licence: str | None, shards: Path | None, name: str | None):
        super().__init__(weights, licence, shards, name)
        self._found = found

    def config(self, target: Target) -> ExportConfig:
        """The whole config. Raises CheckpointError or ShardError for facts that contradict each other."""
        found, weights = self._found, self._weights
        bands = self._bands()
        statistics = self._statistics(bands)
        licence = self._checked_licence()
        self._note_unknown()
        if target in KEPT:
            self._note_left_out(target, KEPT[target])
        if target in ("timm", "hub", "hf") and "norm.weight" not in weights.state:
            self._note("the pretraining has no final norm, so that one starts with ones and zeros")
        return ExportConfig(
            target=target,
            name=self._name or (self._earlier.name if self._earlier else self._default_name()),
            architecture=ArchitectureEntry(
                name=f"convnextv2_{found.size}" if found.size else None, dims=found.dims, depths=found.depths
            ),
            stem=found.stem,
            patch_size=found.patch_size,
            img_size=self._earlier.img_size if self._earlier else self._run_config().get("model", {}).get("img_size"),
            in_chans=found.in_chans,
            bands_in=bands,
            statistics=statistics,
            modalities_out=found.modalities,
            num_classes=found.num_classes,
            stem_padding=weights.stem_padding,
            grn_eps=weights.grn_eps,
            licence=licence,
            provenance=self._provenance(),
        )

    def _default_name(self) -> str:
        return f"convnextv2_{self._found.size or 'custom'}_patch{self._found.patch_size}"

    def _bands(self) -> tuple[str, ...] | None:
        number, bands = self._found.in_chans, self._weights.bands_in
        if bands is not None and bands == self._weights.bands_by_convention and not self._weights.recorded("bands_in"):
            self._note(
                f"bands_in is assumed to be {', '.join(bands)}: what the published checkpoints and runs that name none read"
            )
        if bands is not None and len(bands) != number:
            raise CheckpointError(
                f"{self._weights.source}: its config names {len(bands)} input bands ({', '.join(bands)}), its stem reads "
                f"{number}; the weights and the file beside them are not of one model"
            )
        if bands is None:
            self.notices.append(f"bands_in is null: nothing says which {number} bands these are, or in which order")
        return bands

    def _statistics(self, bands: tuple[str, ...] | None) -> dict[str, BandStatistics] | None:
        manifest = self._manifest()
        if manifest is not None and bands is None:
            raise CheckpointError(f"--shards {self._shards}: the model's input bands are unknown, so are their statistics")
        if self._earlier and self._earlier.statistics:
            return self._earlier.statistics
        table = self._meta.get("statistics")
        if table is None and manifest is not None:
            table = manifest.input_statistics(bands)
        if not table:
            self.notices.append("statistics are null: give the shard set that the model was trained on as --shards")
            return None
        return {key: BandStatistics.model_validate(entry) for key, entry in table.items()}
