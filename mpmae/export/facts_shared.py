"""What config.json says of a model of any family: its name, licence and where it comes from."""

import datetime
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

import mpmae
from mpmae.checkpoint_format import MMEARTH_NAME, MODEL_NAME
from mpmae.errors import CheckpointError
from mpmae.export.config import Provenance, parse_config
from mpmae.models.interop import Weights
from mpmae.provenance import commit
from mpmae.shard_files import load_manifest
from mpmae.shard_format import Manifest

# The FCMAE weights that facebookresearch/ConvNeXt-V2 publishes, also as timm's convnextv2_*.fcmae
FACEBOOK_LICENCE = "CC-BY-NC-4.0"
_RUN_SECTIONS = ("model", "train", "optim")  # the rest of a run's configuration is about places on one machine


class SharedFacts:
    """Gathers the config; `notices` are the sentences that the user must read, `notes` those of them that go with the model.

    licence, name: as given on the command line, or None. shards: a shard set, for the statistics.
    """

    own_schemes: ClassVar[tuple[str, ...]]  # of weights that this project wrote

    def __init__(self, weights: Weights, licence: str | None, shards: Path | None, name: str | None):
        self._weights, self._licence, self._shards, self._name = weights, licence, shards, name
        beside: Mapping[str, Any] = weights.config or {}
        self._earlier = parse_config(beside, weights.source)
        self._meta = beside if self._earlier is None and "files" in beside else {}  # a checkpoint.json
        self._foreign = self._earlier is None and weights.scheme not in self.own_schemes
        self.notices: list[str] = []
        self.notes: list[str] = []

    def _note_unknown(self) -> None:
        if self._weights.unknown:
            self._note(f"left out, names of no known meaning: {', '.join(self._weights.unknown)}")

    def _note_left_out(self, target: str, kept: tuple[str, ...]) -> None:
        """Tell of what a layout that keeps these beginnings of our names has no place for."""
        parts = sorted({name.split(".")[0] for name in self._weights.state if not name.startswith(kept)})
        if parts:
            self._note(f"{target} has no place for these parts, which are left out: {', '.join(parts)}")

    def _manifest(self) -> Manifest | None:
        """That of the shard set given. Raises CheckpointError if the model was trained on another."""
        if self._shards is None:
            return None
        manifest, fingerprint = load_manifest(self._shards), self._fingerprint()
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise CheckpointError(
                f"--shards {self._shards}: fingerprint {manifest.fingerprint[:12]}, but the model was trained on "
                f"{fingerprint[:12]}; give the shard set of the training, or leave the option out"
            )
        return manifest

    def _note(self, text: str) -> None:
        self.notices.append(text)
        self.notes.append(text)

    def _run_config(self) -> dict[str, Any]:
        return {key: value for key, value in self._meta.get("config", {}).items() if key in _RUN_SECTIONS}

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
