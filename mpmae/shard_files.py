"""The manifest and the indices of a shard set, read and checked: their bytes may come from anywhere and are never trusted.

Format: `mpmae.shard_format`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mpmae.errors import ShardError
from mpmae.index_checks import MAX_HEADER_BYTES, layout_problem, rows_of
from mpmae.remote_store import RemoteStore, is_remote, without_scheme
from mpmae.shard_format import FORMAT_NAME, MANIFEST_NAME, READABLE_VERSIONS, Manifest, ShardEntry

MAX_MANIFEST_BYTES = 1 << 28
INDEX_AGAIN = "restore it or make it again with `mpmae-shards index`"


def load_manifest(shards_dir: str | Path, storage_options: Mapping[str, Any] | None = None) -> Manifest:
    """Read and check `manifest.json` of a folder or URL; ShardError naming the file, the field and what to do.

    storage_options: those of fsspec's filesystem, for a URL.
    """
    if is_remote(shards_dir):
        store = RemoteStore(str(shards_dir), storage_options)
        return parse_manifest(store.read(MANIFEST_NAME), store.at(MANIFEST_NAME))
    shards_dir = without_scheme(str(shards_dir))
    path = Path(shards_dir) / MANIFEST_NAME
    if not path.is_file():
        what = "has no manifest.json (an unfinished build?)" if Path(shards_dir).is_dir() else "does not exist"
        raise ShardError(f"{shards_dir} {what}; make a shard set with `mpmae-shards build SOURCE OUTPUT`")
    try:
        return parse_manifest(_read_at_most(path, MAX_MANIFEST_BYTES), path)
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror or error}); check the disk and the permissions") from error


def parse_manifest(data: bytes, where: str | Path) -> Manifest:
    """The manifest in the bytes of a manifest.json, which messages call `where`; ShardError as for `load_manifest`."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ShardError(f"{where} has more than {MAX_MANIFEST_BYTES} bytes: no manifest is that long; restore the file")
    try:
        raw = json.loads(data, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ShardError(f"{where} is not JSON of a manifest (nested too deeply); restore the file") from error
    except ValueError as error:
        raise ShardError(f"{where} is not JSON ({error}); rebuild the set or restore the file") from error
    if not isinstance(raw, Mapping) or raw.get("format") != FORMAT_NAME:
        raise ShardError(f"{where} is not a manifest of an mpmae shard set (its `format` is not {FORMAT_NAME!r})")
    version = raw.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise ShardError(
            f"{where}: format_version {version!r:.40}, this version of mpmae reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; update mpmae or rebuild the set"
        )
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            own = e.get("ctx", {}).get("error")  # what `Manifest._check` found
            problems += own.args if isinstance(own, ValueError) else [f"{'.'.join(map(str, e['loc']))}: {e['msg']}"]
        raise ShardError([f"{where}: {problem}; rebuild the set or restore the file" for problem in problems]) from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return tree


def _read_at_most(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file, one more than `max_bytes` of a longer one. Raises OSError."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise OSError("not a file")
    with path.open("rb") as file:
        return file.read(min(path.stat().st_size, max_bytes) + 1)


def load_index(path: Path, manifest: Manifest, shard: ShardEntry) -> np.ndarray:
    """Index rows of a shard; ShardError when the file is absent, has changed or does not fit the manifest."""
    try:
        data = _read_at_most(path, MAX_HEADER_BYTES + shard.num_samples * manifest.index_dtype.itemsize)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; {INDEX_AGAIN}") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot read the index ({error}); run `mpmae-shards verify`") from error
    return parse_index(data, path, manifest, shard)


def parse_index(data: bytes, where: str | Path, manifest: Manifest, shard: ShardEntry) -> np.ndarray:
    """The rows in the bytes of an index file, which messages call `where`, read-only; ShardError as for `load_index`.

    The rows list every byte of a tar of `shard.num_bytes`: offsets ascend, and the members of a sample are adjacent.
    """
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ShardError(f"{where}: its sha256 is not the manifest's: its bytes have changed; {INDEX_AGAIN}")
    try:
        rows = rows_of(data, manifest.index_dtype, shard.num_samples)
    except ValueError as error:
        raise ShardError(f"{where}: cannot read the index ({error}); {INDEX_AGAIN}") from error
    problem = layout_problem(rows, manifest.members, shard.num_bytes)
    if problem:
        raise ShardError(f"{where} does not fit {shard.name}: {problem}; rebuild the set or restore the file")
    return rows
