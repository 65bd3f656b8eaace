"""Compiled kernels on disk: one file per (source, defines, architecture, NVRTC), shared by processes and runs.

A file is a line of JSON (format, parameters, SHA-256 of the rest) and the cubin. It appears under its name at once and
whole; one that does not fit its checksum is written anew. A folder that can't be used costs a compilation per process.
"""

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FORMAT = 1
FOLDER_VARIABLE = "MPMAE_KERNEL_CACHE"

log = logging.getLogger(__name__)
_complained: set[Path] = set()


class Compiled(NamedTuple):
    """A cubin, and the types of its kernels' parameters: one letter of `struct` each, "P", "i" or "f"."""

    cubin: bytes
    parameters: dict[str, str]


def default_folder() -> Path:
    """`MPMAE_KERNEL_CACHE`, else mpmae/kernels in the user's cache folder (`XDG_CACHE_HOME`, ~/.cache)."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as containers have
        base = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return base / "mpmae" / "kernels"


def key_of(source: str, defines: Mapping[str, str], options: tuple[str, ...], nvrtc_version: str) -> str:
    """The name of what would be compiled: 64 hexadecimal digits."""
    parts = [FORMAT, source, sorted(defines.items()), list(options), nvrtc_version]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read(folder: Path, key: str) -> Compiled | None:
    """What is stored under a key; None when nothing whole is."""
    path = _path(folder, key)
    try:
        head, _, cubin = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        _complain(folder, "read", str(error))
        return None
    try:
        entry = json.loads(head)
        parameters = entry["parameters"]
        whole = entry["format"] == FORMAT and entry["sha256"] == _checksum(cubin, parameters)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("%s: damaged, so its kernel is compiled anew", path)
        return None
    return Compiled(cubin, parameters)


def write(folder: Path, key: str, compiled: Compiled) -> None:
    """Store a compiled kernel; where the folder can't be written, say so once and go on."""
    head = {"format": FORMAT, "parameters": compiled.parameters, "sha256": _checksum(*compiled)}
    path = _path(folder, key)
    temporary = path.with_name(f".{key[:16]}-{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(json.dumps(head).encode() + b"\n" + compiled.cubin)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _complain(folder, "written", str(error))


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.cubin"


def _checksum(cubin: bytes, parameters: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode() + cubin).hexdigest()


def _complain(folder: Path, verb: str, reason: str) -> None:
    if folder in _complained:
        return
    _complained.add(folder)
    log.warning(
        "kernel cache %s: can't be %s (%s); kernels are compiled in every process. Set %s to a folder that can be written",
        folder,
        verb,
        reason,
        FOLDER_VARIABLE,
    )
