"""From a run folder to the report's data: logs, facts, and a few validation tiles run through the newest checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from mpmae.checkpoint_format import MODEL_NAME, load_meta, newest_checkpoint
from mpmae.config import RunConfig, validate
from mpmae.errors import CheckpointError, ReportError
from mpmae.loader import ShardReader
from mpmae.report.data import ReportData, RunSummary
from mpmae.report.embedding_map import load_map
from mpmae.report.reconstruct import Reconstructor
from mpmae.train.data import open_reader
from mpmae.train.setup import build_model
from mpmae.train.track import read_jsonl

EMBEDDINGS = "embeddings"  # where in the run folder the report looks for what `mpmae-embed` wrote
_RECORD_KEYS = ("config", "environment", "commit", "dirty", "num_parameters", "world_size", "shards_fingerprint")


def collect(run_dir: str | Path, num_tiles: int = 6) -> ReportData:
    """Everything on the page of the run in `run_dir`. Raises ReportError, CheckpointError or ShardError."""
    run_dir = Path(run_dir)
    record = _read_record(run_dir / "run.json")
    config = validate(record["config"], f"{run_dir / 'run.json'}: config")
    history, validation = read_jsonl(run_dir / "metrics.jsonl"), read_jsonl(run_dir / "validation.jsonl")
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no complete checkpoint to reconstruct with; let the run reach its first one")
    reader = open_reader(config, config.data.val_split)
    if reader.manifest.fingerprint != record["shards_fingerprint"]:
        raise ReportError(
            f"{config.data.shards} is not the shard set of the run {run_dir}: its fingerprint is "
            f"{reader.manifest.fingerprint[:12]}, run.json says {str(record['shards_fingerprint'])[:12]}; put the set "
            "back that the run was trained on"
        )
    model = build_model(config, reader.manifest)
    model.load_state_dict(load_file(checkpoint / MODEL_NAME))
    step = load_meta(checkpoint)["step"]
    embeddings, notes = load_map(run_dir / EMBEDDINGS), []
    if embeddings is None and (run_dir / EMBEDDINGS).is_dir():
        notes.append(f"{EMBEDDINGS}/ has no map yet: mpmae-embed draws it once all vectors are there, unless --map is none.")
    reconstructor = Reconstructor(model.eval(), reader, config)
    if reconstructor.facts:
        notes.insert(0, "; ".join(f"{label}: {text}" for label, text in reconstructor.facts.items()).capitalize() + ".")
    return ReportData(
        title=config.run.name or run_dir.name,
        run=_summary(record, config, reader, history, step, reconstructor.facts),
        history=history,
        validation=validation,
        tiles=reconstructor.tiles(num_tiles),
        notes=notes,
        embeddings=embeddings,
    )


def _read_record(path: Path) -> dict[str, Any]:
    """run.json with all that the report takes from it; ReportError naming everything that is not there."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path.parent} is not a run folder: its run.json cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise ReportError(f"{path} holds a {type(record).__name__}, expected an object; restore the run's own file")
    problems = [f"{path}: no `{key}`; restore the run's own file" for key in _RECORD_KEYS if key not in record]
    environment = record.get("environment", {"packages": {}})
    for name, tree in (
        ("config", record.get("config", {})),
        ("environment", environment),
        ("environment.packages", environment.get("packages") if isinstance(environment, dict) else {}),
    ):
        if not isinstance(tree, dict):
            problems.append(f"{path}: `{name}` is not an object; restore the run's own file")
    if problems:
        raise ReportError(problems)
    return record


def _summary(
    record: dict[str, Any],
    config: RunConfig,
    reader: ShardReader,
    history: list[dict[str, Any]],
    step: int,
    facts: dict[str, str],
) -> RunSummary:
    rates = [rate for line in history if (rate := line.get("images_per_s"))]
    manifest = reader.manifest
    packages = {f"{name} version": version for name, version in record["environment"]["packages"].items() if version}
    environment = {key: value for key, value in record["environment"].items() if key != "packages" and value is not None}
    return RunSummary(
        config=record["config"],
        environment=environment | packages | {"commit": record["commit"], "uncommitted changes": record["dirty"]},
        model={"name": config.model.name}
        | facts
        | {
            "num_parameters": record["num_parameters"],
            "engine": f"{config.engine.name}, {record['world_size']} ranks, {config.train.precision}",
        },
        shard_set={
            "name": manifest.source.name,
            "folder": str(config.data.shards),
            "fingerprint": manifest.fingerprint,
            "tile size": f"{manifest.tile_size_px} px",
            **{f"samples, {split}": manifest.num_samples(split) for split in manifest.splits},
        },
        num_steps=step,
        num_samples_seen=step * config.train.global_batch_size,
        wall_time_s=sum(config.train.global_batch_size / rate for rate in rates),
        images_per_s=float(np.median(rates)) if rates else None,
    )
