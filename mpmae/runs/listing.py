"""Runs as a table, and the differences of two as another."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mpmae.probe_record import LINEAR, method_title, percent, scores_of
from mpmae.runs.folder import METRICS, VALIDATION, RunFolder, recent_rate, state_of

_COLOURS = {"running": "green", "complete": "blue", "preempted": "yellow", "stalled": "magenta", "failed": "red"}
_PLACES = {"run.dir", "run.name"}
_ABSENT = "(absent)"


def run_table(runs: Sequence[RunFolder], now: float | None = None) -> Table:
    """A line for each run: state, step, losses, last linear probe if any has one, rate, idle time, engine, commit."""
    now = time.time() if now is None else now
    probes = [run.last_probe() for run in runs]
    shows_probes = any(probes)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for name in ("step", "loss", "validation", *[method_title(LINEAR)] * shows_probes, "images/s", "idle"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("engine", "commit"):
        table.add_column(name, no_wrap=True)
    for run, probe in zip(runs, probes, strict=True):
        state, lines = state_of(run, now), run.last_lines(METRICS)
        last, validation = (found[-1] if found else {} for found in (lines, run.last_lines(VALIDATION)))
        table.add_row(
            Text(shown(run.path)),
            Text(f"{state.name}: {state.why}" if state.why else state.name, style=_COLOURS[state.name]),
            f"{last.get('step', 0):,} / {run.total_steps or '?':,}" if run.total_steps else f"{last.get('step', 0):,}",
            number(last.get("loss")),
            f"{number(validation.get('loss'))} at {validation['step']:,}" if "step" in validation else "",
            *[f"{percent(scores_of(probe).get(LINEAR))} at {probe['step']:,}" if probe else ""] * shows_probes,
            number(recent_rate(lines)),
            ago(now - run.active_at()),
            run.engine,
            run.commit,
        )
    return table


def difference_table(first: RunFolder, second: RunFolder) -> Table | None:
    """What differs in configuration, environment, facts and last probe of two runs; None when nothing does.

    Their folders and names, which always do, are left out.
    """
    sides = [_facts(run.record) | _probe_facts(run.last_probe()) for run in (first, second)]
    keys = [key for key in dict.fromkeys([*sides[0], *sides[1]]) if sides[0].get(key, _ABSENT) != sides[1].get(key, _ABSENT)]
    if not keys:
        return None
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("")
    for run in (first, second):
        table.add_column(Text(shown(run.path)), overflow="fold")
    for key in keys:
        table.add_row(Text(key), *(Text(str(side.get(key, _ABSENT))) for side in sides))
    return table


def shown(path: Path) -> str:
    """A path as short as it goes: relative to where the command runs, if it lies below."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) and path != Path.cwd() else path)


def number(value: Any) -> str:
    """Four digits of a number; nothing for what is none."""
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def ago(seconds: float) -> str:
    """A span of time in its largest unit, such as 3 min."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in _flat(record["config"]).items() if key not in _PLACES}
    facts |= _flat(record.get("environment", {}), "environment.") | _flat(record.get("ds_config") or {}, "ds_config.")
    left_out = {"config", "environment", "ds_config", "command", "resumed_from"}
    return facts | _flat({key: value for key, value in record.items() if key not in left_out})


def _probe_facts(record: dict[str, Any]) -> dict[str, str]:
    return {f"last {method_title(m)}": f"{percent(score)} at {record['step']:,}" for m, score in scores_of(record).items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
