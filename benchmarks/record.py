"""Benchmark records: one JSON per run in benchmarks/records/, refused from a dirty tree.

On a machine whose copy of the tree has no git, the commit comes from MPMAE_COMMIT, made where git is:

    MPMAE_COMMIT=$(python benchmarks/record.py)      (fails on a dirty tree)

It holds the commit and a digest of the sources, and is refused where the sources differ.
"""

import datetime
import hashlib
import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpmae.provenance import commit, environment

REPO = Path(__file__).resolve().parents[1]
RECORDS = REPO / "benchmarks" / "records"
COMMIT_VARIABLE, RED_VARIABLE = "MPMAE_COMMIT", "MPMAE_RED_GATES"
SOURCES = ("mpmae", "kernels", "benchmarks", "tests/kernels")
SUFFIXES = {".py", ".sh", ".cu", ".cuh", ".h", ".hpp", ".cpp"}


def spread(samples: Sequence[float]) -> dict[str, float]:
    """20th percentile, median and 80th percentile of repeated measurements."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [*samples] * 4
    return {"p20": cuts[0], "median": statistics.median(samples), "p80": cuts[3], "repeats": len(samples)}


def source_digest(repo: Path = REPO) -> str:
    """A digest of the names and bytes of all sources that a benchmark can run."""
    paths = [path for folder in SOURCES for path in (repo / folder).rglob("*") if path.suffix in SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(repo).as_posix()}\0{len(path.read_bytes())}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def clean_commit() -> dict[str, Any]:
    """The commit that a record is of; SystemExit when the source tree has uncommitted changes (new records aside)."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given is not None:
        found = re.fullmatch(r"([0-9a-f]{40})\+([0-9a-f]{16})", given)
        if not found:
            raise SystemExit(f"{COMMIT_VARIABLE} = {given!r}: expected what `python benchmarks/record.py` prints")
        if found[2] != source_digest():
            raise SystemExit(
                f"no record is written: the sources here have the digest {source_digest()}, those of commit "
                f"{found[1][:10]} {found[2]}. Commit, and make {COMMIT_VARIABLE} anew with `python benchmarks/record.py`"
            )
        return {"commit": found[1], "dirty": False}
    source = commit(ignored=("benchmarks/records",))
    if source["commit"] is None:
        raise SystemExit(
            "no record is written: this copy of the source tree has no git. Where it has, run `python "
            f"benchmarks/record.py`, and set {COMMIT_VARIABLE} here to what it prints"
        )
    if source["dirty"]:
        raise SystemExit("no record is written from a tree with uncommitted changes: commit first, then measure")
    return source


def write_record(
    what: str, case: dict[str, Any], results: dict[str, Any], folder: Path = RECORDS, failed: Sequence[str] = ()
) -> Path:
    """Write a record named by date and `what`; SystemExit when the source tree has uncommitted changes.

    While MPMAE_RED_GATES names gates that failed, or `failed` cases of the run itself, what is written is none: it carries
    their names and lies in a folder `red` beside `folder`; it is not written at all where that is the repository's.
    """
    source = clean_commit()
    red_gates = [*os.environ.get(RED_VARIABLE, "").split(), *failed]
    if red_gates and folder.resolve() == RECORDS:
        raise SystemExit(f"no record is written while a gate is red: {', '.join(red_gates)}")
    if red_gates:
        folder = folder.parent / "red"
    now = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "what": what,
        "date": now.isoformat(timespec="seconds"),
        **source,
        **({"red_gates": red_gates} if red_gates else {}),
        **({"not_done": not_done} if (not_done := os.environ.get("MPMAE_NOT_DONE", "").split()) else {}),
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
    """All records, or those of one kind, oldest first; ValueError for one that was made while a gate was red."""
    records = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    red = [name for name, record in records.items() if record.get("red_gates")]
    if red:
        raise ValueError(f"{folder}: made while a gate was red, so no records: {', '.join(red)}; take them out")
    return [record for record in records.values() if what in (None, record["what"])]


if __name__ == "__main__":
    print(f"{clean_commit()['commit']}+{source_digest()}")
