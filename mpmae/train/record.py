"""run.json: what exactly ran, where and from which commit."""

import json
import sys
from pathlib import Path
from typing import Any

from mpmae.config import RunConfig
from mpmae.files import write_whole
from mpmae.provenance import commit, environment


def _without_secrets(argument: str, config: RunConfig) -> str:
    return argument.replace(str(config.data.shards), config.model_dump(mode="json")["data"]["shards"])


def write_run_json(
    config: RunConfig, ds_config: dict[str, Any] | None, facts: dict[str, Any], resumed_from: Path | None, start_step: int
) -> None:
    """Write run.json into the run folder, whole or not at all; that of an earlier launch stays as run-until-step-N.json."""
    record = {
        "command": [_without_secrets(argument, config) for argument in sys.argv],
        "config": config.model_dump(mode="json"),
        "ds_config": ds_config,
        "environment": environment(),
        **commit(),
        **facts,
        "resumed_from": str(resumed_from) if resumed_from else None,
    }
    path = config.run.dir / "run.json"
    if path.exists():
        path.rename(path.with_name(f"run-until-step-{start_step:08d}.json"))
    write_whole(path, json.dumps(record, indent=1) + "\n")
