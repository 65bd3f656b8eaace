"""The folder of embeddings: parts and their manifest, whole whenever the writer dies, and how they are read back.

    manifest.json           whose vectors these are, and the parts written so far with their hashes
    part-00000.parquet      tiles 0 .. num_tiles_per_part - 1, in the order of the source
    part-00001.parquet      ...

A part is there before the manifest lists it. Each part is a pure function of its tiles, so a part is written again rather
than mended.

Shapes: N tiles, D features.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpmae.embed import parquet
from mpmae.errors import EmbeddingError
from mpmae.files import TEMP_SUFFIX, write_whole
from mpmae.run_lock import LOCK_NAME, lock_file

FORMAT_NAME, FORMAT_VERSION = "mpmae-embeddings", 1
MANIFEST_NAME = "manifest.json"
_IDENTITY = ("encoder", "source", "prepared", "num_tiles", "dtype", "num_features", "num_tiles_per_part")
_SHOWN = 16  # characters of a hash in a message


def part_name(number: int) -> str:
    """`part-00000.parquet`, ..."""
    return f"part-{number:05d}.parquet"


@dataclass
class EmbeddingFolder:
    """A folder that is being filled; see `claimed`.

    facts: the manifest without its parts. parts: what the manifest says of each part, by number.
    """

    path: Path
    facts: dict[str, Any]
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    redone: list[str] = field(default_factory=list)

    @property
    def num_tiles(self) -> int:
        """N, of all splits."""
        return sum(self.facts["num_tiles"].values())

    def todo(self) -> list[int]:
        """Numbers of the parts to write, ascending. A set without tiles has one part, which says so."""
        return [number for number in range(num_parts(self.facts)) if number not in self.parts]

    def positions(self, number: int) -> range:
        """The tiles of a part."""
        size = self.facts["num_tiles_per_part"]
        return range(number * size, min((number + 1) * size, self.num_tiles))

    def write(self, number: int, data: bytes, counts: Mapping[str, int]) -> None:
        """Put a part and then its line in the manifest onto the disk. counts: what to note of it."""
        name = part_name(number)
        with _told(self.path):
            write_whole(self.path / name, data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.parts[number] = {"name": name, **counts, "num_bytes": len(data), "sha256": sha256}
        self.write_manifest()

    def write_manifest(self) -> None:
        """Put the manifest onto the disk."""
        parts = [self.parts[number] for number in sorted(self.parts)]
        text = json.dumps(self.facts | {"is_complete": not self.todo(), "parts": parts}, indent=1)
        with _told(self.path):
            write_whole(self.path / MANIFEST_NAME, text + "\n")


@contextlib.contextmanager
def claimed(path: Path, facts: Mapping[str, Any]) -> Iterator[EmbeddingFolder]:
    """The folder, held against other writers for the block, with the parts that are whole already.

    facts: what the manifest says, with all of _IDENTITY. Parts that are listed but changed since are named in `redone`.
    Raises EmbeddingError: the folder holds other embeddings (with all that differs) or other files, is being written by
    another process, or cannot be written.
    """
    with _told(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                lock_file(lock)
            except BlockingIOError:
                raise EmbeddingError(
                    f"{path}: another mpmae-embed writes here; wait for it or give another --output"
                ) from None
        facts = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **facts}
        folder = EmbeddingFolder(path, facts)
        if (path / MANIFEST_NAME).exists():
            _resume(folder)
        else:
            _check_vacant(path)
            folder.write_manifest()
        yield folder
    finally:
        os.close(lock)


def num_parts(facts: Mapping[str, Any]) -> int:
    """Parts of a complete folder with these facts."""
    return max(1, -(-sum(facts["num_tiles"].values()) // facts["num_tiles_per_part"]))


def _resume(folder: EmbeddingFolder) -> None:
    manifest = load_manifest(folder.path)
    problems = list(_differences(folder.path, manifest, folder.facts))
    if problems:
        raise EmbeddingError(problems)
    folder.facts = {key: value for key, value in manifest.items() if key not in ("parts", "is_complete")}
    for number, part in enumerate_parts(manifest):
        if _is_whole(folder.path, part):
            folder.parts[number] = part
        else:
            folder.redone.append(part["name"])


def _differences(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key in _IDENTITY:
        then, now = there.get(key), here[key]
        if _identity(then) != _identity(now):
            yield (
                f"{path} holds embeddings of another kind: its {key} is {_brief(then, now)}, now it is "
                f"{_brief(now, then)}; give another --output, or the same checkpoint, source and options as then"
            )


def _identity(value: Any) -> str:
    """What has to be equal: of something with a fingerprint that alone, else all of it with the order of its keys."""
    return json.dumps(value["fingerprint"] if isinstance(value, Mapping) and "fingerprint" in value else value)


def _brief(value: Any, other: Any) -> str:
    """What tells the value from the other one: of something with a fingerprint that, and which of its facts differ."""
    if not (isinstance(value, Mapping) and "fingerprint" in value):
        return json.dumps(value)
    known = other if isinstance(other, Mapping) else {}
    facts = [key for key in value if key not in ("title", "fingerprint") and value[key] != known.get(key)]
    said = "; ".join([str(value["fingerprint"])[:_SHOWN], *(f"{key}: {_said(value[key])}" for key in facts)])
    return f"{value.get('title', '?')} ({said})"


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check_vacant(path: Path) -> None:
    others = sorted(p.name for p in path.iterdir() if p.name not in (LOCK_NAME, MANIFEST_NAME + TEMP_SUFFIX))
    if others:
        shown = ", ".join(others[:5])
        raise EmbeddingError(f"{path} holds {shown} and no {MANIFEST_NAME}; give a new or empty folder as --output")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddingError(
            f"{path} cannot be written ({error.strerror or error}); make room or give another --output; what is written "
            "stays, and the same command goes on from there"
        ) from error


def load_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a folder of embeddings. Raises EmbeddingError when it is absent or something else."""
    file = path / MANIFEST_NAME
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise EmbeddingError(f"{path} is no folder of embeddings: it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError) as error:
        raise EmbeddingError(
            f"{file} cannot be read ({error}); restore it or make the embeddings in a new folder"
        ) from error
    found = (manifest.get("format"), manifest.get("format_version")) if isinstance(manifest, dict) else None
    if found != (FORMAT_NAME, FORMAT_VERSION) or not _is_sound(manifest):
        raise EmbeddingError(
            f"{file} is not a manifest of embeddings of format_version {FORMAT_VERSION}; give another folder, or restore it"
        )
    return manifest


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    counts, size, parts = (manifest.get(key) for key in ("num_tiles", "num_tiles_per_part", "parts"))
    return (
        isinstance(counts, dict)
        and all(type(count) is int for count in counts.values())
        and type(size) is int
        and size > 0
        and isinstance(parts, list)
        and all(isinstance(part, dict) and part.get("name") in _names(manifest) for part in parts)
    )


def _names(manifest: Mapping[str, Any]) -> dict[str, int]:
    return {part_name(number): number for number in range(num_parts(manifest))}


def enumerate_parts(manifest: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(number, what the manifest says of it) of the parts that are written."""
    numbers = _names(manifest)
    return [(numbers[part["name"]], part) for part in manifest["parts"]]


def _is_whole(path: Path, part: Mapping[str, Any]) -> bool:
    try:
        return hashlib.sha256((path / part["name"]).read_bytes()).hexdigest() == part.get("sha256")
    except OSError:
        return False


def iterate_parts(folder: str | Path) -> Iterator[tuple["parquet.Table", np.ndarray]]:
    """As `read_embeddings`, a part at a time, for sets that memory does not hold."""
    parquet.require_pyarrow()
    folder = Path(folder)
    manifest = load_manifest(folder)
    parts = sorted(enumerate_parts(manifest), key=lambda part: part[0])
    problems = []
    if len(parts) < num_parts(manifest):
        problems.append(
            f"{folder} is unfinished: {len(parts)} of {num_parts(manifest)} parts; run the same mpmae-embed to go on"
        )
    problems += [
        f"{folder / part['name']} is absent or its sha256 is not the manifest's; run the same mpmae-embed to make it again"
        for _, part in parts
        if not _is_whole(folder, part)
    ]
    if problems:
        raise EmbeddingError(problems)
    for _, part in parts:
        yield parquet.read_part(folder / part["name"])


def read_embeddings(folder: str | Path) -> tuple["parquet.Table", np.ndarray]:
    """What `mpmae-embed` wrote: a table of everything but the vectors [N rows], and these as float32 [N, D].

    Raises EmbeddingError when the folder is no such thing, unfinished or changed, ConfigError without pyarrow.
    """
    tables: Sequence[Any]
    tables, vectors = zip(*iterate_parts(folder), strict=True)
    return parquet.joined(tables), np.concatenate(vectors)
