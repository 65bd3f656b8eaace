"""Benchmark records: one JSON per run in benchmarks/records/, refused from a dirty tree."""

import datetime
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpmae.provenance import commit, environment

RECORDS = Path(__file__).resolve().parent / "records"


def spread(samples: Sequence[float]) -> dict[str, float]:
    """20th percentile, median and 80th percentile of repeated measurements."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [*samples] * 4
    return {"p20": cuts[0], "median": statistics.median(samples), "p80": cuts[3], "repeats": len(samples)}


def clean_commit() -> dict[str, Any]:
    """The commit that a record is of; SystemExit when the source tree has uncommitted changes (new records aside)."""
    source = commit(ignored=("benchmarks/records",))
    if source["commit"] is None or source["dirty"]:
        raise SystemExit("no record is written from a tree with uncommitted changes: commit first, then measure")
    return source


def write_record(what: str, case: dict[str, Any], results: dict[str, Any], folder: Path = RECORDS) -> Path:
    """Write a record named by date and `what`; SystemExit when the source tree has uncommitted changes."""
    source = clean_commit()
    now = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "what": what,
        "date": now.isoformat(timespec="seconds"),
        **source,
        "environment": environment(),
        "case": case,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")
    path = folder / f"{now:%Y%m%d-%H%M%S}-{slug}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def load_records(what: str | None = None, folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, or those of one kind, oldest first."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if what in (None, record["what"])]
