"""Where numbers go: metrics.jsonl always, TensorBoard and wandb on request, all behind one interface."""

import errno
import json
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mpmae.config import RunConfig
from mpmae.errors import ConfigError, TrainingError
from mpmae.files import read_jsonl, write_whole

_LOG = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_WAITING_BYTES = 2**26


class Tracker(Protocol):
    """Takes one record at a time; a record's `step` counts finished optimizer steps."""

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Take a record; `kind` is `metrics` (one a step, and with a probe one before the first) or `validation`."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """`KIND.jsonl` in the run folder, one object a line, written at once; on a full disk when there is room again.

    Opening at `start_step` moves the lines of later steps to `KIND.dropped.jsonl`: a resumed run writes them again. At 0
    that is every line, as a run that starts anew may have one of step 0.
    A number that is not finite is written as null, since JSON has no word for it.
    """

    def __init__(self, folder: Path, start_step: int):
        self._files: dict[str, _Lines] = {}
        last = start_step or -1
        for kind in ("metrics", "validation"):
            path = folder / f"{kind}.jsonl"
            lines = [line for line in read_jsonl(path) if isinstance(line.get("step"), int)]
            dropped = [line for line in lines if line["step"] > last]
            if dropped:
                with path.with_suffix(".dropped.jsonl").open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in dropped)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= last))
            self._files[kind] = _Lines(path)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append a line. Raises TrainingError, naming the file, when it cannot be written for another reason than space."""
        self._files[kind].append(json.dumps(_finite(record), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class _Lines:
    """A file that is only added to. What a full disk does not take waits in memory for the next line.

    A line that is written in part goes on where it stopped, so only a killed run leaves a torn one.
    """

    def __init__(self, path: Path):
        self._path, self._file, self._waiting, self._is_full = path, path.open("ab", buffering=0), bytearray(), False

    def append(self, line: str) -> None:
        """Write the line, or keep it. Raises TrainingError."""
        self._waiting += line.encode()
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._is_full = False
        except OSError as error:
            if error.errno not in _FULL or len(self._waiting) > _MAX_WAITING_BYTES:
                raise TrainingError(
                    f"cannot write {self._path}: {error.strerror}; mend the cause, then --resume auto"
                ) from error
            if not self._is_full:
                _LOG.error("cannot write %s: %s; the run goes on, and its lines wait for room", self._path, error.strerror)
            self._is_full = True

    def close(self) -> None:
        """Try a last time, and close the file."""
        if self._waiting:
            self.append("")
        if self._waiting:
            _LOG.error("%s: the last %d bytes are lost, as there was no room for them", self._path, len(self._waiting))
        self._file.close()


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
    """TensorBoard event files in `tensorboard/`; what a resumed run writes again replaces what was there of later steps."""

    def __init__(self, folder: Path, start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("log.tensorboard = true needs the package tensorboard: pip install mpmae[tracking]") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write one scalar per number."""
        for name, value in flatten(record).items():
            if name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A wandb run; `offline` needs no network and is synced later with `wandb sync`.

    A resumed run goes on under the same id, kept in the run folder. wandb takes steps in order only, so of the steps that a
    resumed run does again it keeps the first version. Where the server of an `online` run cannot be reached within
    INIT_TIMEOUT_S, the run is logged offline and a warning says so. Raises ConfigError without the package or a login.
    """

    INIT_TIMEOUT_S = 60.0
    FINISH_TIMEOUT_S = 120.0

    def __init__(self, config: RunConfig):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"log.wandb = {config.log.wandb} needs the package wandb: pip install mpmae[tracking]"
            ) from error
        id_file = config.run.dir / "wandb-id.txt"
        if not id_file.exists():
            write_whole(id_file, secrets.token_hex(4))
        timeouts = {"init_timeout": self.INIT_TIMEOUT_S, "finish_timeout": self.FINISH_TIMEOUT_S}

        def start(mode: str) -> Any:
            return wandb.init(
                project=config.log.wandb_project,
                name=config.run.name or config.run.dir.name,
                id=id_file.read_text().strip(),
                resume="allow" if mode == "online" else None,  # offline there is nothing to ask
                dir=str(config.run.dir),
                mode=mode,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", **timeouts),
            )

        try:
            self._run = start(config.log.wandb)
        except wandb.errors.UsageError as error:
            raise ConfigError(f"log.wandb = {config.log.wandb}: {error}; or set log.wandb = offline") from error
        except wandb.errors.CommError as error:
            _LOG.warning("log.wandb = %s: %s. Logging offline; `wandb sync` sends it later", config.log.wandb, error)
            wandb.teardown()  # else its service still holds the run's id
            self._run = start("offline")

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Send one record, unless wandb has its step from before."""
        if record["step"] >= self._run.starting_step:
            numbers = {f"{kind}/{name}": value for name, value in flatten(record).items()}
            self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish the run; what is not uploaded within FINISH_TIMEOUT_S stays in the run folder."""
        self._run.finish()


class Trackers:
    """Several trackers as one: the JSON lines, which must be written, and viewers by name, of which any may fail.

    metrics.jsonl is the truth. A viewer that raises is dropped with a warning, and the run goes on.
    """

    def __init__(self, lines: JsonLines, viewers: dict[str, Tracker]):
        self._lines, self._viewers = lines, viewers

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Hand the record to each. Raises TrainingError when its line cannot be written."""
        self._lines.log(kind, record)
        for name in list(self._viewers):
            self._try(name, lambda viewer: viewer.log(kind, record))

    def close(self) -> None:
        """Close each."""
        self._lines.close()
        for name in list(self._viewers):
            self._try(name, lambda viewer: viewer.close())

    def _try(self, name: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._viewers[name])
        except Exception as error:  # whatever a service's client may raise
            del self._viewers[name]
            message = "%s failed and gets no more records (%s: %s); metrics.jsonl has them all"
            _LOG.warning(message, name, type(error).__name__, error)


def open_trackers(config: RunConfig, start_step: int) -> Trackers:
    """The trackers that the configuration asks for; ConfigError when a package is absent."""
    viewers: dict[str, Tracker] = {}
    if config.log.tensorboard:
        viewers["TensorBoard"] = TensorBoard(config.run.dir, start_step)
    if config.log.wandb != "disabled":
        viewers["wandb"] = Wandb(config)
    return Trackers(JsonLines(config.run.dir, start_step), viewers)
