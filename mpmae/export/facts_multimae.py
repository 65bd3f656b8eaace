"""What config.json says of a MultiMAE, gathered from its weights, from what stood beside them and from a shard set."""

from pathlib import Path
from typing import Any

from mpmae.domains import Domain, domain_of
from mpmae.errors import CheckpointError, ConfigError
from mpmae.export.config import DomainEntry, MultiMAEExportConfig, NamedStatistics, Target, ViTEntry
from mpmae.export.facts_shared import SharedFacts
from mpmae.models.interop import MultiMAEArchitecture, Weights

ONE_DOMAIN = ("timm", "hf")  # layouts of the encoder for a single domain
_USUAL_HEADS = 8


class MultiMAEFacts(SharedFacts):
    """See `SharedFacts`; found: what the weights show.

    domain: the one that a layout in `ONE_DOMAIN` is for; None: the first continuous one.
    """

    own_schemes = ("multimae", "timm-vit")

    def __init__(
        self,
        weights: Weights,
        found: MultiMAEArchitecture,
        licence: str | None,
        shards: Path | None,
        name: str | None,
        domain: str | None = None,
    ):
        super().__init__(weights, licence, shards, name)
        self._found, self._domain = found, domain

    def config(self, target: Target) -> MultiMAEExportConfig:
        """The whole config. Raises ConfigError, CheckpointError or ShardError for facts that contradict each other."""
        found, weights = self._found, self._weights
        domains, whole = self._domains(target), target not in ONE_DOMAIN
        statistics = self._statistics(domains)
        licence = self._checked_licence()
        if self._foreign and licence is None:
            self.notices.append("of the weights in this naming, those of EPFL-VILAB/MultiMAE are CC-BY-NC-4.0")
        self._note_unknown()
        if not whole:
            (domain,) = domains
            self._note_left_out(target, ("encoder.", "global_tokens", f"input_adapters.{domain.name}."))
            if domain.standardise:
                self._note(
                    f"{domain.name} is standardised per image, by the mean and variance of its values between the 10th and "
                    "the 90th percentile; the statistics come before that"
                )
        num_heads = weights.recorded("num_heads") or found.num_heads
        if num_heads is None:
            self.notices.append(f"num_heads is null: nothing says how many heads an encoder of width {found.dim} has")
        size = f"multimae_{found.size or 'custom'}_patch{found.patch_size}"
        given = self._name or (self._earlier.name if self._earlier else None)
        decoder_heads = weights.option("decoder_num_heads")
        if found.decoders and whole and decoder_heads is None:
            self._note(f"decoder_num_heads is assumed to be {_USUAL_HEADS}, as in the published models: nothing says it")
            decoder_heads = _USUAL_HEADS
        return MultiMAEExportConfig(
            target=target,
            name=given or (size if whole else f"{size}_{domains[0].name}"),
            architecture=ViTEntry(name=f"multimae_{found.size}" if found.size else None, dim=found.dim, depth=found.depth),
            num_heads=num_heads,
            patch_size=found.patch_size,
            img_size=weights.img_size,
            domains_in={domain.name: _entry(domain) for domain in domains},
            decoders=found.decoders if whole else {},
            decoder_dim=found.decoder_dim if whole else 0,
            decoder_depth=found.decoder_depth if whole else 0,
            decoder_num_heads=decoder_heads if whole else None,
            statistics=statistics,
            licence=licence,
            provenance=self._provenance(),
            **{key: weights.option(key) if whole else None for key in _TRAINING},
        )

    def _domains(self, target: Target) -> tuple[Domain, ...]:
        """The input domains that the layout keeps."""
        try:
            domains = tuple(domain_of(name) for name in self._weights.domains_in)
        except ConfigError as error:
            raise CheckpointError([f"{self._weights.source}: {problem}" for problem in error.problems]) from error
        if target not in ONE_DOMAIN:
            if self._domain is not None:
                raise ConfigError(
                    f"--domain {self._domain}: --to {target} keeps all domains; it is for {', '.join(ONE_DOMAIN)}"
                )
            return domains
        continuous = [domain for domain in domains if not domain.num_classes]
        if self._domain is None and continuous:
            if len(domains) > 1:
                self._note(f"--domain not given: taken is {continuous[0].name}, the first continuous one")
            return (continuous[0],)
        known = ", ".join(domain.name for domain in continuous) or "none"
        chosen = next((domain for domain in domains if domain.name == self._domain), None)
        if chosen is None:
            asked = "no domain chosen" if self._domain is None else f"--domain {self._domain}: no input domain of this model"
            raise ConfigError(f"{asked}; those that timm has a form for: {known}")
        if chosen.num_classes:
            raise ConfigError(
                f"--domain {chosen.name}: timm has no ViT that embeds class ids; choose one of {known}, or --to "
                "safetensors, which keeps the whole model"
            )
        return (chosen,)

    def _statistics(self, domains: tuple[Domain, ...]) -> dict[str, NamedStatistics] | None:
        bands: dict[str, list[str]] = {}
        for domain in domains:
            if domain.bands:
                bands.setdefault(domain.modality, []).extend(band for band in domain.bands)
        manifest, found = self._manifest(), self._weights.statistics
        if not found and manifest is not None:
            found = {}
            for modality, names in bands.items():
                found |= manifest.statistics_of(modality, tuple(dict.fromkeys(names)))
        if not found:
            self.notices.append("statistics are null: give the shard set that the model was trained on as --shards")
            return None
        chosen = {}
        for key, entry in found.items():
            modality = next((name for name in bands if key == name or key.startswith(f"{name}_")), None)
            if modality is not None:
                chosen[key] = self._chosen(key, entry, tuple(dict.fromkeys(bands[modality])))
        return chosen

    def _chosen(self, key: str, entry: dict[str, Any], bands: tuple[str, ...]) -> NamedStatistics:
        """An entry of the statistics for these bands, in this order."""
        missing = [band for band in bands if band not in entry["bands"]]
        if missing:
            raise CheckpointError(
                f"{self._weights.source}: its statistics of {key} lack {', '.join(missing)}, which its domains read; the "
                "weights and the file beside them are not of one model"
            )
        rows = [list(entry["bands"]).index(band) for band in bands]
        return NamedStatistics(bands=bands, **{name: tuple(entry[name][row] for row in rows) for name in ("mean", "std")})


_TRAINING = ("num_visible_tokens", "alphas", "sample_domains_uniformly", "reference_quirks")


def _entry(domain: Domain) -> DomainEntry:
    return DomainEntry(
        modality=domain.modality,
        bands=domain.bands,
        num_classes=domain.num_classes,
        stride=domain.stride,
        standardise=domain.standardise,
    )
