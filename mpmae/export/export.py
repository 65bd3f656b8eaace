"""`export`: any checkpoint that we can read, as a folder that another program loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mpmae.errors import CheckpointError, ConfigError
from mpmae.export import layouts, layouts_multimae
from mpmae.export.config import AnyConfig, Target
from mpmae.export.facts import Facts
from mpmae.export.facts_multimae import ONE_DOMAIN, MultiMAEFacts
from mpmae.files import whole_folder
from mpmae.models.interop import describe, read_weights

_WRITERS = {"convnext": layouts.WRITERS, "multimae": layouts_multimae.WRITERS}


@dataclass(frozen=True)
class Exported:
    """What was written. notices: what is unknown, assumed or left out, one sentence each."""

    folder: Path
    config: AnyConfig
    notices: tuple[str, ...]


def export(
    source: str | Path,
    target: Target,
    output: str | Path,
    *,
    licence: str | None = None,
    shards: str | Path | None = None,
    name: str | None = None,
    domain: str | None = None,
) -> Exported:
    """Writes the weights of `source` into the new folder `output`, whole or not at all.

    source: whatever `mpmae.models.interop.read_weights` reads. target: see `mpmae.export.layouts` and, for a MultiMAE,
    `layouts_multimae`. licence: SPDX name; None takes over the source's. shards: the shard set of the training, for band
    statistics that the checkpoint does not carry. name: for config.json and the model card. domain: of a MultiMAE, the one
    whose ViT timm gets; None: its first continuous one. Raises ConfigError, CheckpointError or ShardError.
    """
    if target not in get_args(Target):
        raise ConfigError(f"export: target {target!r}, expected one of {', '.join(get_args(Target))}")
    output = Path(output).resolve()  # a link or `.` is what it points to
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise CheckpointError(f"{output} {what}; give a new folder")
    weights = read_weights(source)
    found, writers = describe(weights.state, weights.source), _WRITERS[weights.family]
    if target not in writers:
        raise ConfigError(f"--to {target}: {weights.source} holds {found}; that can go out as {', '.join(writers)}")
    given = (licence, Path(shards) if shards else None, name)
    if weights.family == "multimae":
        facts = MultiMAEFacts(weights, found, *given, domain)
    elif domain is not None:
        raise ConfigError(
            f"--domain {domain}: {weights.source} holds {found}; only a MultiMAE has domains, for {ONE_DOMAIN}"
        )
    else:
        facts = Facts(weights, found, *given)
    config = facts.config(target)
    try:
        with whole_folder(output) as folder:
            writers[target](weights.state, config, folder)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}; make room or give another") from error
    return Exported(output, config, tuple(facts.notices))
