"""From a run folder to the report's data: logs, facts, and a few validation tiles run through the newest checkpoint.

Shapes: N samples, C bands, G patches per side, p patch side in pixels, H = G * p image side, K classes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mpmae.checkpoint_format import MODEL_NAME, load_meta, newest_checkpoint
from mpmae.config import RunConfig, validate
from mpmae.errors import CheckpointError, ReportError
from mpmae.loader import Batch, ShardReader
from mpmae.masking import draw_visible, visible_bool
from mpmae.modalities import MODALITIES
from mpmae.models import MPMAE
from mpmae.models.losses import patch_statistics
from mpmae.report.data import ClassGuess, MapTriple, ReportData, RunSummary, TilePicture, VectorPair
from mpmae.report.embedding_map import load_map
from mpmae.train.data import cpu_loader, open_reader
from mpmae.train.setup import build_model
from mpmae.train.track import read_jsonl

EMBEDDINGS = "embeddings"  # where in the run folder the report looks for what `mpmae-embed` wrote
_NUM_GUESSES = 3
_RECORD_KEYS = ("config", "environment", "commit", "dirty", "num_parameters", "world_size", "shards_fingerprint")
_TRUE_COLOUR = {"B4", "B3", "B2"}
_NORM_NOTE = (
    "The model predicts each patch up to its brightness and contrast (per-patch normalised targets); "
    "the picture borrows both from the target."
)


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
    tiles = Reconstructor(model.eval(), reader, config).tiles(num_tiles)
    return ReportData(
        title=config.run.name or run_dir.name,
        run=_summary(record, config, reader, history, step),
        history=history,
        validation=validation,
        tiles=tiles,
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
    record: dict[str, Any], config: RunConfig, reader: ShardReader, history: list[dict[str, Any]], step: int
) -> RunSummary:
    rates = [rate for line in history if (rate := line.get("images_per_s"))]
    manifest = reader.manifest
    packages = {f"{name} version": version for name, version in record["environment"]["packages"].items() if version}
    environment = {key: value for key, value in record["environment"].items() if key != "packages" and value is not None}
    return RunSummary(
        config=record["config"],
        environment=environment | packages | {"commit": record["commit"], "uncommitted changes": record["dirty"]},
        model={
            "name": config.model.name,
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


@dataclass
class _Scale:
    """Brings one modality's normalised values back to raw units: float32 [C] each."""

    mean: np.ndarray
    std: np.ndarray

    def raw(self, values: np.ndarray) -> np.ndarray:
        """Raw units of normalised `values` [C, ...]."""
        axes = (slice(None), *[None] * (values.ndim - 1))
        return values * self.std[axes] + self.mean[axes]


class Reconstructor:
    """Runs validation tiles through a model and brings targets and predictions back to raw units."""

    def __init__(self, model: MPMAE, reader: ShardReader, config: RunConfig):
        self._model, self._reader, self._config = model, reader, config
        self._names = tuple(dict.fromkeys(("sentinel2", *model.modalities_out)))

    def tiles(self, num_tiles: int) -> list[TilePicture]:
        """`num_tiles` tiles of the split, spread over those with the most modalities."""
        chosen = self._choose(num_tiles)
        if not len(chosen):
            return []
        loader = cpu_loader(self._config, self._reader, training=False, modalities=self._names)
        batch = loader.batch_of(chosen)
        visible = draw_visible(
            self._config.train.seed, 0, batch.sample_ids, self._model.num_patches, self._model.num_visible
        )
        with torch.no_grad():
            out = self._model(batch, visible, return_predictions=True)
        shown = visible_bool(visible, self._model.num_patches).unflatten(1, (self._model.num_patches_side, -1)).numpy()
        return [self._tile(i, batch, out.predictions, shown[i]) for i in range(len(batch))]

    def _choose(self, num_tiles: int) -> np.ndarray:
        bits = np.array([self._reader.manifest.modalities.index(name) for name in self._names], np.uint64)
        present = (self._reader.index["presence"][:, None] >> bits & np.uint64(1)).sum(1).astype(int)
        best = np.argsort(-present, kind="stable")[: 4 * num_tiles]
        return np.sort(best[np.linspace(0, len(best) - 1, min(num_tiles, len(best))).round().astype(int)])

    def _tile(self, i: int, batch: Batch, predictions: dict[str, torch.Tensor], shown: np.ndarray) -> TilePicture:
        record = self._reader.scalars(int(batch.sample_ids[i]))
        level = record["product_level"].decode()
        maps, vectors = {}, {}
        if "sentinel2" not in predictions:
            values, valid = batch.values["sentinel2"][i], batch.valid["sentinel2"][i]
            maps["sentinel2"] = self._with_input_bands(None, level, values, valid)
        for name, prediction in predictions.items():
            values, valid = batch.values[name][i], batch.valid[name][i]
            if MODALITIES[name].scope == "pixel":
                maps[name] = self._map(name, level, prediction[i], values, valid)
            elif MODALITIES[name].kind == "categorical":
                vectors[name] = _guess(name, prediction[i], values)
            else:
                scale, names = self._scale(name, level), self._model.bands_out[name]
                order = [MODALITIES[name].bands.index(band) for band in names]
                pair = scale.raw(values.numpy())[order], scale.raw(_spread(prediction[i].numpy(), order, len(values)))[order]
                vectors[name] = VectorPair(names, *pair, valid.numpy()[order])
        return TilePicture(
            tile_id=record["tile_id"].decode(errors="replace"),
            product_level=level,
            split=self._reader.split,
            visible=shown,
            patch_size_px=self._model.patch_size,
            maps=maps,
            vectors=vectors,
            lat=_degrees(record, "lat"),
            lon=_degrees(record, "lon"),
        )

    def _map(self, name: str, level: str, prediction: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> MapTriple:
        bands = self._model.bands_out[name]
        channels = MODALITIES[name].num_classes or len(bands)
        image = unpatch(prediction.float(), channels, self._model.patch_size)
        if MODALITIES[name].kind == "categorical":
            return MapTriple(bands, values[0].numpy(), image.argmax(0).numpy(), valid[0].numpy())
        order = [self._model.bands_available[name].index(band) for band in bands]
        scale = self._scale(name, level)
        scale = _Scale(scale.mean[order], scale.std[order])
        target, all_valid, valid = values[order], valid, valid[order]
        note = ""
        if name == "sentinel2" and self._model.norm_pix_loss:
            image, note = denormalise_patches(image, target, valid, self._model.patch_size), _NORM_NOTE
        triple = MapTriple(bands, scale.raw(target.numpy()), scale.raw(image.numpy()), valid.numpy(), note)
        if name == "sentinel2" and not set(bands) >= _TRUE_COLOUR:
            return self._with_input_bands(triple, level, values, all_valid)
        return triple

    def _with_input_bands(
        self, triple: MapTriple | None, level: str, values: torch.Tensor, valid: torch.Tensor
    ) -> MapTriple:
        """`triple` of Sentinel-2 (None: nothing of it is reconstructed) with the other bands that the encoder read."""
        available = self._model.bands_available["sentinel2"]
        bands = tuple(band for band in self._model.bands_in if triple is None or band not in triple.bands)
        order, scale = [available.index(band) for band in bands], self._scale("sentinel2", level)
        target = _Scale(scale.mean[order], scale.std[order]).raw(values[order].numpy())
        added = MapTriple(bands, target, np.full_like(target, np.nan), valid[order].numpy(), input_only=bands)
        if triple is None:
            return added
        parts = (np.concatenate([getattr(x, part) for x in (triple, added)]) for part in ("target", "prediction", "valid"))
        return MapTriple(triple.bands + bands, *parts, triple.note, bands)

    def _scale(self, name: str, level: str) -> _Scale:
        stats = self._reader.manifest.band_stats[f"{name}_{level}" if name == "sentinel2" else name]
        return _Scale(np.asarray(stats.mean, np.float32), np.asarray(stats.std, np.float32))


def unpatch(prediction: torch.Tensor, num_channels: int, patch_size: int) -> torch.Tensor:
    """[C, H, H] from a prediction [p*p*C, G, G] whose channel is (row*p + column)*C + c."""
    side = prediction.shape[-1] * patch_size
    split = prediction.unflatten(0, (patch_size, patch_size, num_channels))  # row, column, C, G, G
    return split.permute(2, 3, 0, 4, 1).reshape(num_channels, side, side)


def denormalise_patches(image: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`image` [C, H, H] in per-patch normalised units, given the mean and spread of each patch of `target` over its valid
    values (see `mpmae.models.losses.normalise_patches`)."""

    def patches(x: torch.Tensor) -> torch.Tensor:  # [G, G, p*p*C]
        return x.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).permute(1, 3, 0, 2, 4).flatten(2)

    mean, variance = (x.squeeze(-1) for x in patch_statistics(patches(torch.where(valid, target, 0)), patches(valid)))
    grow = torch.ones(patch_size, patch_size)
    return image * torch.kron(variance.sqrt(), grow) + torch.kron(mean, grow)


def _guess(name: str, logits: torch.Tensor, target: torch.Tensor) -> ClassGuess:
    label = MODALITIES[name].title.lower()
    best = logits.float().softmax(0).topk(min(_NUM_GUESSES, len(logits)))
    top = [(f"{label} {index}", float(p)) for p, index in zip(best.values, best.indices.tolist(), strict=True)]
    return ClassGuess(f"{label} {int(target)}" if target >= 0 else None, top)


def _spread(values: np.ndarray, positions: list[int], length: int) -> np.ndarray:
    whole = np.zeros(length, values.dtype)
    whole[positions] = values
    return whole


def _degrees(record: np.void, name: str) -> float | None:
    """The angle that a (sin, cos) field holds, in degrees; None where the set lacks it."""
    if name not in record.dtype.names or not np.isfinite(record[name]).all():
        return None
    sine, cosine = map(float, record[name])
    return math.degrees(math.atan2(sine, cosine))
