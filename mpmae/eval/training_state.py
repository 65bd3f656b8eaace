"""The folder of one training run: a line per epoch, what the next epoch needs, and in the end the best weights."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from mpmae.engine.files import load_tensors, save_tensors
from mpmae.engine.world import World
from mpmae.errors import CheckpointError, ConfigError
from mpmae.export.config import WEIGHTS_NAME
from mpmae.files import TEMP_SUFFIX, read_jsonl, sync, write_whole

METRICS_NAME = "metrics.jsonl"
RESULT_NAME = "result.json"
STATE_NAME = "state.pt"
_FORMAT_VERSION = 1


class RunState:
    """Reads and writes a run's folder; rank 0 writes, the others read what it has written.

    identity: plain data that a resumed run must share with its beginning. resume: whether to go on from what the folder
    holds; else it must hold none of a run. Raises ConfigError on every rank.
    """

    def __init__(self, folder: Path, world: World, identity: Mapping[str, Any], resume: bool):
        self._folder, self._world, self._resume = folder, world, resume
        self._identity = json.loads(json.dumps(dict(identity)))
        self._saved_at = time.monotonic()
        problem = self._open() if world.rank == 0 else None
        problem = world.broadcast_object(problem)
        if problem:
            raise ConfigError(problem)

    def _open(self) -> str | None:
        names = (METRICS_NAME, STATE_NAME, RESULT_NAME)
        if not self._resume and any((self._folder / name).exists() for name in names):
            return f"{self._folder} holds a run already; pass --resume auto to continue it, or give another output.dir"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{self._folder} cannot be written: {error.strerror}; give another output.dir"
        return None

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, the same on every rank; None while the run has not ended."""
        path = self._folder / RESULT_NAME
        tree = json.loads(path.read_text()) if self._world.rank == 0 and path.is_file() else None
        tree = self._world.broadcast_object(tree)
        if tree is not None:
            self._check(tree["identity"])
        return tree

    def load(self) -> dict[str, Any] | None:
        """What the last `save` wrote; None if nothing did. Raises CheckpointError, and ConfigError for another run's."""
        path = self._folder / STATE_NAME
        if not self._world.broadcast_object(path.is_file() if self._world.rank == 0 else None):
            self._keep_lines(0)
            return None
        saved = load_tensors(path)
        if saved.get("format_version") != _FORMAT_VERSION:
            raise CheckpointError(f"{path}: format_version {saved.get('format_version')!r}, expected {_FORMAT_VERSION}")
        self._check(json.loads(saved["identity"]))
        self._keep_lines(saved["num_epochs"])
        return saved

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self._world.rank == 0:
            with (self._folder / METRICS_NAME).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, model: nn.Module, optimizer: optim.Optimizer, progress: Mapping[str, Any], interval_s: float) -> None:
        """Write state.pt, whole or not at all, unless less than `interval_s` have passed since the last time."""
        if self._world.rank > 0 or time.monotonic() - self._saved_at < interval_s:
            return
        state = {"format_version": _FORMAT_VERSION, "identity": json.dumps(self._identity), **progress}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        path = self._folder / STATE_NAME
        temp = path.with_name(STATE_NAME + TEMP_SUFFIX)
        save_tensors(state, temp)
        temp.replace(path)
        self._saved_at = time.monotonic()

    def finish(self, result: Mapping[str, Any], weights: Mapping[str, Tensor] | None) -> None:
        """Write model.safetensors, unless there are no `weights`, and result.json; what a resumed run needs goes."""
        if self._world.rank > 0:
            return
        if weights is not None:
            path = self._folder / WEIGHTS_NAME
            temp = path.with_name(path.name + TEMP_SUFFIX)
            save_file({name: value.contiguous() for name, value in weights.items()}, temp, {"format": "pt"})
            sync(temp)
            temp.replace(path)
        write_whole(self._folder / RESULT_NAME, json.dumps({"identity": self._identity, **result}, indent=1))
        (self._folder / STATE_NAME).unlink(missing_ok=True)

    def weights(self) -> dict[str, Tensor] | None:
        """The weights that `finish` kept."""
        path = self._folder / WEIGHTS_NAME
        return load_file(path) if path.is_file() else None

    def _keep_lines(self, num_epochs: int) -> None:
        """Leave lines of epochs out that are run again."""
        path = self._folder / METRICS_NAME
        if self._world.rank == 0 and path.exists():
            lines = [json.dumps(record) + "\n" for record in read_jsonl(path) if record["epoch"] < num_epochs]
            write_whole(path, "".join(lines))

    def _check(self, saved: Mapping[str, Any]) -> None:
        keys = [key for key in {**saved, **self._identity} if saved.get(key) != self._identity.get(key)]
        if keys:
            advice = "resume with the same settings, or give another output.dir"
            raise ConfigError(
                [f"{self._folder}: {k} was {saved.get(k)!r}, now {self._identity.get(k)!r}; {advice}" for k in keys]
            )
