"""The output folder of a build: what may be there, and files that appear whole or not at all."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from mpmae.errors import ShardError
from mpmae.files import TEMP_SUFFIX, sync, write_whole
from mpmae.shard_format import (
    FORMAT_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    dali_index_name,
    index_bytes,
    index_name,
    member_name,
    sample_key,
)
from mpmae.shard_tools.journal import JOURNAL_NAME, is_journal
from mpmae.shard_tools.lock import LOCK_NAME
from mpmae.shard_tools.source_checks import examples
from mpmae.tar_members import TAR_END, TAR_HEADER_BYTES, tar_member

SKIPPED_NAME, SKIPPED_FORMAT = "skipped.json", "mpmae-skipped-tiles"
_SHARD_PATTERN = re.compile(r"[A-Za-z0-9_]+-\d{5,}\.tar")


def tar_bytes(member_sizes: list[int]) -> int:
    """Bytes that members of these sizes take in a tar."""
    return sum(TAR_HEADER_BYTES + size + -size % TAR_HEADER_BYTES for size in member_sizes)


def sample_bytes(manifest: Manifest, key: str, members: list[bytes]) -> bytes:
    """A sample as it stands in its tar."""
    named = zip(manifest.members, members, strict=True)
    return b"".join(tar_member(member_name(key, member, manifest.codec), data) for member, data in named)


def dali_index(manifest: Manifest, rows: np.ndarray, first_ordinal: int) -> bytes:
    """The .idx file of a shard in format v1.2 of DALI's `wds2idx`: per member its extension, data offset, size and name."""
    lines = [f"v1.2 {len(rows)}"]
    for ordinal, row in enumerate(rows, first_ordinal):
        names = [member_name(sample_key(ordinal), member, manifest.codec) for member in manifest.members]
        parts = zip(names, row["offset"], row["size"], strict=True)
        lines.append(" ".join(f"{name.partition('.')[2]} {offset} {size} {name}" for name, offset, size in parts))
    return ("\n".join(lines) + "\n").encode()


def prepare(folder: Path, overwrite: bool) -> tuple[list[Path], int]:
    """What a build must remove from `folder` before it writes: files of an older shard set, and their bytes.

    Raises ShardError when the folder is a file, is not empty and `overwrite` is False, or holds files of other origin under
    names that a shard set uses. Nothing is removed here.
    """
    if not folder.exists():
        return [], 0
    if not folder.is_dir():
        raise ShardError(f"{folder} is a file; give a folder for the shard set")
    names = sorted(p.name for p in folder.iterdir() if p.name != LOCK_NAME)
    if not names:
        return [], 0
    own = own_files(folder)
    foreign = [name for name in names if name not in own]
    if not overwrite:
        parts = []
        if own:
            whole = MANIFEST_NAME in own
            parts.append(f"{'a shard set' if whole else 'an unfinished build'} of {len(own)} files")
        if foreign:
            parts.append(f"{len(foreign)} other files ({examples(foreign)})")
        hint = ", or replace the shard set with --overwrite" if own else ""
        hint = f", go on with it with --resume{hint}" if JOURNAL_NAME in own else hint
        raise ShardError(f"{folder} is not empty: it holds {' and '.join(parts)}; give another folder{hint}")
    clashes = [name for name in foreign if name == MANIFEST_NAME or _SHARD_PATTERN.fullmatch(name)]
    if clashes:
        raise ShardError(
            f"{folder} holds {examples(clashes)}, not written by this tool but named like files of a shard set; "
            "--overwrite never removes such files: give another folder"
        )
    return [folder / name for name in own], sum((folder / name).stat().st_size for name in own)


def files_of_shard(name: str) -> tuple[str, ...]:
    """The tar `name` and its indices."""
    return name, index_name(name), dali_index_name(name)


def own_files(folder: Path) -> list[str]:
    """Names of the files of a shard set, whole or unfinished, in `folder`; manifest and journal come first.

    A tar is known by its index beside it (which is written first): other tools name tars the same way.
    """
    own = []
    if _has_format(folder / MANIFEST_NAME, FORMAT_NAME):
        own.append(MANIFEST_NAME)
    if is_journal(folder / JOURNAL_NAME):
        own.append(JOURNAL_NAME)
    if _has_format(folder / SKIPPED_NAME, SKIPPED_FORMAT):
        own.append(SKIPPED_NAME)
    for path in sorted(folder.iterdir()):
        shard = path.name.removesuffix(TEMP_SUFFIX)
        for suffix in (".index.npy", ".idx"):
            shard = shard.removesuffix(suffix) + ".tar" if shard.endswith(suffix) else shard
        is_temp = path.name.endswith(TEMP_SUFFIX)
        if is_temp or (_SHARD_PATTERN.fullmatch(shard) and (folder / index_name(shard)).is_file()):
            own.append(path.name)
    return own


def _has_format(path: Path, name: str) -> bool:
    """Whether `path` is a JSON file of our format `name`, of any version; other tools have files of those names too."""
    if not path.is_file():
        return False
    try:
        tree = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(tree, dict) and tree.get("format") == name


@contextmanager
def disk_errors(what: str, folder: Path, again: str = "run the command again") -> Iterator[None]:
    """Turns an OSError of a write into a ShardError that names `what` was written and says why it failed.

    again: what to do on a full disk once there is space.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(
                f"{what}: the disk of {folder} is full ({error.strerror}); "
                f"free some space or give a folder elsewhere, then {again}"
            ) from error
        raise ShardError(f"{what}: cannot write to {folder} ({error.strerror or error})") from error


class ShardWriter:
    """Writes the shards of one split, each cut before it would exceed `max_bytes` or `max_samples`.

    A tar gets its name only when it is complete and its indices are in place. Leaving the context by an exception removes
    the unfinished tar. `entries` lists the finished shards, beginning with those `finished` before; `on_shard` is told of
    each new one once it is on the disk. again: what to do on a full disk once there is space.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: Manifest,
        max_bytes: int,
        max_samples: int | None,
        finished: Sequence[ShardEntry] = (),
        on_shard: Callable[[ShardEntry], None] = lambda shard: None,
        again: str = "run the command again",
    ):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.max_bytes, self.max_samples = max_bytes, max_samples
        self.entries = list(finished)
        self._on_shard, self._again = on_shard, again
        self._num_written = sum(shard.num_samples for shard in finished)
        self._file = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        if exc_type is None:
            self._finish()
        elif self._file is not None:
            # The error on its way out is the one to report; closing a file on a full disk fails once more.
            with suppress(OSError):
                self._file.close()
            self._temp.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        """Name of the shard that the next sample may go to."""
        return f"{self.split}-{len(self.entries):05d}.tar"

    def add(self, row: int, presence: int, members: list[bytes], tile: str) -> int:
        """Append a sample, whose bytes in the tar are counted; `tile` names it in errors."""
        sizes = [len(data) for data in members]
        steps = [TAR_HEADER_BYTES + size + -size % TAR_HEADER_BYTES for size in sizes]
        num_bytes = sum(steps)
        full = self._file is not None and (
            self._offset + num_bytes + len(TAR_END) > self.max_bytes or len(self._rows) == self.max_samples
        )
        if full:
            self._finish()
        with disk_errors(f"{self.folder / self.name}, {tile}", self.folder, self._again):
            if self._file is None:
                self._start()
            first = self._offset + TAR_HEADER_BYTES
            offsets = list(accumulate(steps[:-1], initial=first))
            self._write(sample_bytes(self.manifest, sample_key(self._num_written), members))
        self._rows.append((row, presence, offsets, sizes))
        self._num_written += 1
        return num_bytes

    def _start(self) -> None:
        self._temp = self.folder / (self.name + TEMP_SUFFIX)
        self._file = self._temp.open("wb")
        self._hash, self._offset, self._rows = hashlib.sha256(), 0, []

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def _finish(self) -> None:
        if self._file is None:
            return
        name, first_ordinal = self.name, self._num_written - len(self._rows)
        rows = np.array(self._rows, self.manifest.index_dtype)
        index = index_bytes(rows)
        with disk_errors(f"{self.folder / name}, its last {len(rows)} samples", self.folder, self._again):
            self._write(TAR_END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            write_whole(self.folder / index_name(name), index)
            write_whole(self.folder / dali_index_name(name), dali_index(self.manifest, rows, first_ordinal))
            self._temp.replace(self.folder / name)
            sync(self.folder)
        self._file = None
        shard = ShardEntry(
            name=name,
            num_bytes=self._offset,
            num_samples=len(rows),
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        self.entries.append(shard)
        self._on_shard(shard)
