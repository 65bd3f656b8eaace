"""The journal of a build: what it was asked for and which shards are finished, so that it can go on after a kill.

`build.jsonl` in the output folder: a first line with the options, then one line per finished shard, each on the disk before
the next shard begins. A last line without its end was cut off by a kill and does not count. The journal is removed once the
manifest is written.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpmae.errors import ShardError
from mpmae.files import sync, write_whole
from mpmae.shard_format import ShardEntry, dali_index_name, index_name

JOURNAL_NAME = "build.jsonl"
FORMAT_NAME, FORMAT_VERSION = "mpmae-build-journal", 1


@dataclass
class SplitState:
    """How far a split is: its finished shards, how many rows of its order are done, and the tiles skipped among them."""

    shards: list[ShardEntry] = field(default_factory=list)
    num_rows: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)


class Journal:
    """An open journal. `splits` and `stats` (the moments so far) are what its lines add up to."""

    def __init__(self, folder: Path, splits: dict[str, SplitState], stats: Mapping[str, Any]):
        self.path = folder / JOURNAL_NAME
        self.splits, self.stats = splits, stats

    @classmethod
    def begin(cls, folder: Path, options: Mapping[str, Any], encoder: str) -> "Journal":
        """A new journal; `options` (for `json`) and the digest `encoder` decide the bytes of the set. Raises OSError."""
        header = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "options": options, "encoder": encoder}
        write_whole(folder / JOURNAL_NAME, json.dumps(header) + "\n")
        sync(folder)
        return cls(folder, {}, {})

    @classmethod
    def resume(cls, folder: Path, options: Mapping[str, Any], encoder: str) -> "Journal":
        """The journal of an interrupted build.

        Raises ShardError when there is none, or it was begun with other options or another source (every difference named),
        or a finished shard is gone or has changed. OSError.
        """
        path = folder / JOURNAL_NAME
        try:
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            header, *records = [json.loads(line) for line in whole.split(b"\n")]
            if header["format"] != FORMAT_NAME or header["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {header['format']} {header['format_version']}")
            journal = cls(folder, {}, {})
            for record in records:
                journal._take(record)
        except FileNotFoundError:
            raise ShardError(
                f"{folder} has no {JOURNAL_NAME} of a build to go on with; build again with --overwrite"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path} cannot be read ({error}); build again with --overwrite") from error
        problems = _differences(header["options"], json.loads(json.dumps(options)))
        if not problems and header["encoder"] != encoder:
            problems.append("the compressor of the interrupted build gave other bytes: another version of a package")
        problems += [_shard_problem(folder, shard) for state in journal.splits.values() for shard in state.shards]
        problems = [f"{folder}: {problem}" for problem in problems if problem]
        if problems:
            raise ShardError([*problems, f"{folder}: nothing is changed; mend this, or build again with --overwrite"])
        with path.open("r+b") as file:
            file.truncate(len(whole) + 1)
        return journal

    def state(self, split: str) -> SplitState:
        """How far a split is."""
        return self.splits.setdefault(split, SplitState())

    def add(
        self, split: str, shard: ShardEntry, num_rows: int, skipped: list[dict[str, Any]], stats: Mapping[str, Any]
    ) -> None:
        """Record a finished shard, onto the disk.

        num_rows: of the split's order that are done. skipped: tiles left out since the last record. Raises OSError.
        """
        record = {
            "split": split,
            "shard": shard.model_dump(mode="json"),
            "num_rows": num_rows,
            "skipped": skipped,
            "stats": dict(stats),
        }
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(record)

    def remove(self) -> None:
        """Take the journal away, when the set is whole. Raises OSError."""
        self.path.unlink(missing_ok=True)

    def _take(self, record: Mapping[str, Any]) -> None:
        state = self.state(record["split"])
        state.shards.append(ShardEntry.model_validate(record["shard"]))
        state.num_rows = record["num_rows"]
        state.skipped += record["skipped"]
        self.stats = record["stats"]


def is_journal(path: Path) -> bool:
    """Whether `path` is a build journal; other tools may have files of that name."""
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(b'{"format": "%s"' % FORMAT_NAME.encode())
    except OSError:
        return False


def _shard_problem(folder: Path, shard: ShardEntry) -> str:
    """What is wrong with a finished shard as far as its size and its index tell; empty when nothing is."""
    tar, index = folder / shard.name, folder / index_name(shard.name)
    if not all(path.is_file() for path in (tar, index, folder / dali_index_name(shard.name))):
        return f"{shard.name} was finished, but it or an index of it is gone"
    if tar.stat().st_size != shard.num_bytes:
        return f"{shard.name} was finished with {shard.num_bytes} bytes, it has {tar.stat().st_size}"
    if hashlib.sha256(index.read_bytes()).hexdigest() != shard.index_sha256:
        return f"{index.name} has changed since it was written"
    return ""


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {json.dumps(old.get(name))} in the interrupted build, is {json.dumps(new.get(name))} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
