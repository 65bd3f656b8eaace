"""What config.json says of a model, gathered from its weights, from what stood beside them and from a shard set."""

import datetime
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mpmae
from mpmae.checkpoint_format import MMEARTH_NAME, MODEL_NAME
from mpmae.errors import CheckpointError
from mpmae.export.config import ArchitectureEntry, BandStatistics, ExportConfig, Provenance, Target, parse_config
from mpmae.models.interop import Architecture, Weights
from mpmae.provenance import commit
from mpmae.shard_files import load_manifest

# The FCMAE weights that facebookresearch/ConvNeXt-V2 publishes, also as timm's convnextv2_*.fcmae
FACEBOOK_LICENCE = "CC-BY-NC-4.0"
# What of a model goes into each layout, by the beginning of our names; into the others everything does
DENSE = ("encoder.", "norm.", "head.")
PRETRAINING = ("encoder.", "decoder.", "heads.", "log_vars", "norm.", "head.")
KEPT = {"timm": DENSE, "hub": DENSE, "hf": DENSE, "mmearth": PRETRAINING}
_RUN_SECTIONS = ("model", "train", "optim")  # the rest of a run's configuration is about places on one machine


class Facts:
    """Gathers the config; `notices` are the sentences that the user must read, `notes` those of them that go with the model.

    licence, name: as given on the command line, or None. shards: a shard set, for the statistics.
    """

    def __init__(self, weights: Weights, found: Architecture, licence: str | None, shards: Path | None, name: str | None):
        self._weights, self._found = weights, found
        self._licence, self._shards, self._name = licence, shards, name
        beside: Mapping[str, Any] = weights.config or {}
        self._earlier = parse_config(beside, weights.source)
        self._meta = beside if self._earlier is None and "files" in beside else {}  # a checkpoint.json
        self._foreign = self._earlier is None and not weights.scheme.startswith("mpmae")
        self.notices: list[str] = []
        self.notes: list[str] = []

    def config(self, target: Target) -> ExportConfig:
        """The whole config. Raises CheckpointError or ShardError for facts that contradict each other."""
        found, weights = self._found, self._weights
        bands = self._bands()
        statistics = self._statistics(bands)
        licence = self._checked_licence()
        if weights.unknown:
            self._note(f"left out, names of no known meaning: {', '.join(weights.unknown)}")
        kept = KEPT.get(target)
        if kept:
            parts = sorted({name.split(".")[0] for name in weights.state if not name.startswith(kept)})
            if parts:
                self._note(f"{target} has no place for these parts, which are left out: {', '.join(parts)}")
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

    def _note(self, text: str) -> None:
        self.notices.append(text)
        self.notes.append(text)

    def _default_name(self) -> str:
        return f"convnextv2_{self._found.size or 'custom'}_patch{self._found.patch_size}"

    def _run_config(self) -> dict[str, Any]:
        return {key: value for key, value in self._meta.get("config", {}).items() if key in _RUN_SECTIONS}

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
        fingerprint = self._fingerprint()
        if self._shards is not None:
            manifest = load_manifest(self._shards)
            if fingerprint is not None and manifest.fingerprint != fingerprint:
                raise CheckpointError(
                    f"--shards {self._shards}: fingerprint {manifest.fingerprint[:12]}, but the model was trained on "
                    f"{fingerprint[:12]}; give the shard set of the training, or leave the option out"
                )
            if bands is None:
                raise CheckpointError(
                    f"--shards {self._shards}: the model's input bands are unknown, so are their statistics"
                )
        if self._earlier and self._earlier.statistics:
            return self._earlier.statistics
        table = self._meta.get("statistics")
        if table is None and self._shards is not None:
            table = manifest.input_statistics(bands)
        if not table:
            self.notices.append("statistics are null: give the shard set that the model was trained on as --shards")
            return None
        return {key: BandStatistics.model_validate(entry) for key, entry in table.items()}

    def _fingerprint(self) -> str | None:
        return self._earlier.provenance.shards_fingerprint if self._earlier else self._meta.get("shards_fingerprint")

    def _checked_licence(self) -> str | None:
        inherited = self._earlier.licence if self._earlier else None
        if self._foreign and self._weights.scheme.startswith(("facebook", "timm")):
            inherited = FACEBOOK_LICENCE
        if self._licence and inherited and self._licence != inherited:
            self._note(
                f"licence is {self._licence}, as given, though the source says or suggests {inherited}: weights published "
                "by others keep their licence, and so does what is trained from them"
            )
        if not self._licence and not inherited:
            self.notices.append("licence is null: state one with --licence, such as --licence CC-BY-4.0")
        return self._licence or inherited

    def _provenance(self) -> Provenance:
        source, digest = _source_file(Path(self._weights.source))
        earlier = self._earlier.provenance if self._earlier else None
        notes = list(self.notes)
        if earlier:
            notes = [*earlier.notes, f"exported before from {earlier.source} (sha256 {earlier.source_sha256})", *notes]
        return Provenance(
            source=source,
            source_sha256=digest,
            scheme=self._weights.scheme,
            step=earlier.step if earlier else self._meta.get("step"),
            run_config=earlier.run_config if earlier else self._run_config() or None,
            shards_fingerprint=self._fingerprint(),
            commit=commit()["commit"],
            mpmae_version=mpmae.__version__,
            torch_version=torch.__version__,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            notes=tuple(dict.fromkeys(notes)),
        )


def _source_file(path: Path) -> tuple[str, str | None]:
    """Name and SHA-256 of the file with the weights; of a folder of many, over their names and hashes."""
    if not path.exists():
        return str(path), None
    for name in (MODEL_NAME, MMEARTH_NAME):
        if (path / name).is_file():
            return f"{path.name}/{name}", _sha256(path / name)
    if path.is_file():
        return path.name, _sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return path.name, hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
