"""Where numbers go: metrics.jsonl always, TensorBoard and wandb on request, all behind one interface."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mpmae.config import RunConfig
from mpmae.errors import ConfigError, TrainingError
from mpmae.files import write_whole


class Tracker(Protocol):
    """Takes one record at a time; a record's `step` counts finished optimizer steps."""

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Take a record; `kind` is `metrics` (one a step) or `validation`."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """`KIND.jsonl` in the run folder, one object a line, flushed at once.

    Opening at `start_step` moves the lines of later steps to `KIND.dropped.jsonl`: a resumed run writes them again.
    A number that is not finite is written as null, since JSON has no word for it.
    """

    def __init__(self, folder: Path, start_step: int):
        self._folder, self._files = folder, {}
        for kind in ("metrics", "validation"):
            path = folder / f"{kind}.jsonl"
            lines = [line for line in read_jsonl(path) if isinstance(line.get("step"), int)]
            dropped = [line for line in lines if line["step"] > start_step]
            if dropped:
                with path.with_suffix(".dropped.jsonl").open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in dropped)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start_step))
            self._files[kind] = path.open("a", buffering=1)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append a line. Raises TrainingError, naming the file, when it cannot be written."""
        try:
            self._files[kind].write(json.dumps(_finite(record), allow_nan=False) + "\n")
        except OSError as error:
            path = self._folder / f"{kind}.jsonl"
            raise TrainingError(f"cannot write {path}: {error.strerror}; make room, then --resume auto") from error

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if it is absent; a torn last line (a killed writer) is left out."""
    if not path.exists():
        return []
    objects = []
    for line in path.read_text().splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
        if not isinstance(objects[-1], dict):
            raise TrainingError(f"{path}: line {len(objects)} is not an object; move the file away or give another run.dir")
    return objects


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers of a nested record under slash-joined names, for curve viewers."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[prefix + key] = value
    return flat


class TensorBoard:
    """TensorBoard event files in `tensorboard/`."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("log.tensorboard = true needs the package tensorboard: pip install mpmae[tracking]") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write one scalar per number."""
        for name, value in flatten(record).items():
            if name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A wandb run; `offline` needs no network and is synced later with `wandb sync`."""

    def __init__(self, config: RunConfig):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"log.wandb = {config.log.wandb} needs the package wandb: pip install mpmae[tracking]"
            ) from error
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.run.name or config.run.dir.name,
            dir=str(config.run.dir),
            mode=config.log.wandb,
            config=config.model_dump(mode="json"),
        )

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Send one record."""
        numbers = {f"{kind}/{name}": value for name, value in flatten(record).items()}
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Hand the record to each."""
        for tracker in self._trackers:
            tracker.log(kind, record)

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()


def open_trackers(config: RunConfig, start_step: int) -> Trackers:
    """The trackers that the configuration asks for; ConfigError when a package is absent."""
    trackers: list[Tracker] = [JsonLines(config.run.dir, start_step)]
    if config.log.tensorboard:
        trackers.append(TensorBoard(config.run.dir))
    if config.log.wandb != "disabled":
        trackers.append(Wandb(config))
    return Trackers(trackers)
