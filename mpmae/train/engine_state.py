"""What of an engine goes into a checkpoint folder, and back: under its own layout, or out of any other engine's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialize
from torch import Tensor

from mpmae.checkpoint_format import ENGINE_FOLDER, LAYOUT_NAME, MODEL_NAME, load_meta
from mpmae.checkpoint_tools.readers import open_state, read_layout, shown_layout
from mpmae.engine.base import Engine
from mpmae.engine.portable import TrainingState
from mpmae.engine.world import World
from mpmae.errors import CheckpointError
from mpmae.files import write_synced


def write_engine(engine: Engine) -> Callable[[Path], None]:
    """The `write` of `Checkpoints.save` for an engine: its state, and model.safetensors by rank 0."""

    def write(folder: Path) -> None:
        state = engine.full_state_dict()  # collective, so before anything that can fail on one rank only
        engine.save(folder / ENGINE_FOLDER)
        if state is not None:
            _write_whole_model(folder, state, engine.layout)

    return write


def snapshot_engine(engine: Engine) -> Callable[[Path], None]:
    """The same for a `write` that may run in a thread while training goes on: it writes the state as it is now.

    Collective. Raises ConfigError for an engine that cannot.
    """
    state, write_own, layout = engine.full_state_dict(), engine.deferred_save(), engine.layout

    def write(folder: Path) -> None:
        write_own(folder / ENGINE_FOLDER)
        if state is not None:
            _write_whole_model(folder, state, layout)

    return write


def load_engine(engine: Engine, checkpoint: str | Path) -> list[str]:
    """Restore an engine from a checkpoint of any engine and world size. Collective.

    Bit by bit where the layouts are the same. Otherwise every rank reads what it needs out of the other layout: weights,
    moments and step count are still those that were saved, and the note that is returned says so. Raises CheckpointError.
    """
    checkpoint = Path(checkpoint)
    # an early version wrote no layout.json
    saved = read_layout(checkpoint) or {"engine": load_meta(checkpoint)["engine"]}
    wanted = json.loads(json.dumps(engine.layout))
    if saved == wanted:
        engine.load(checkpoint / ENGINE_FOLDER)
        return []
    engine.load_portable(_open_on_all(checkpoint, engine.world))
    engine.load_rng(checkpoint / ENGINE_FOLDER)
    return [f"read {shown_layout(saved)} into {shown_layout(wanted)}: weights, moments and step count are those saved"]


def _open_on_all(checkpoint: Path, world: World) -> TrainingState:
    """The state, opened by every rank; CheckpointError on all of them if one cannot, so that none waits for it."""
    state = problem = None
    try:
        state = open_state(checkpoint)
    except CheckpointError as error:
        problem = f"rank {world.rank}: {error}"
    problems = [p for p in world.gather_objects(problem) if p]
    if problems:
        raise CheckpointError(problems)
    return state


def _write_whole_model(folder: Path, state: dict[str, Tensor], layout: dict[str, Any]) -> None:
    write_synced(folder / MODEL_NAME, serialize(state, {"format": "pt"}))
    write_synced(folder / ENGINE_FOLDER / LAYOUT_NAME, json.dumps(layout, indent=1))
