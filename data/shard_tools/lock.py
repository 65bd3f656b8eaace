"""One writer at a time on an output folder."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpmae.errors import ShardError

LOCK_NAME = "build.lock"
# What a filesystem without locks answers: some network ones are mounted so.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds `folder`, made if absent, for this process alone; a kill lets go of it.

    A folder that was made here and is empty at the end is removed. Raises ShardError naming process and host of another
    holder. `say` is told where the filesystem has no locks; then nothing is held. Raises OSError.
    """
    is_new = not folder.exists()
    if not is_new and not folder.is_dir():
        raise ShardError(f"{folder} is a file; give a folder for the shard set")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    descriptor = _acquire(path, say)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        try:
            # Removed while it is held: who takes it meanwhile finds that it has no name any more, and tries again.
            with suppress(OSError):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _acquire(path: Path, say: Callable[[str], None]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                say(f"{path.parent}: this filesystem has no locks; make sure that nothing else writes there")
                return descriptor
            holder = _holder(descriptor)
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise ShardError(
                    f"{path.parent} is being written by {holder}; wait for it, or give another folder"
                ) from error
            raise
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file: its last holder may have removed it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)


def _holder(descriptor: int) -> str:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {content['pid']} on {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
