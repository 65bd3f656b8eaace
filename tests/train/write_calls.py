"""Every call by which Python code changes what is on the disk, watched: to die at one, or to keep what a death would leave.

Watched are opening for writing, write and flush of such a file, fsync, mkdir, rename, unlink, rmdir, truncate, sendfile: all
that is written here goes through them. Buffers that were not flushed are lost, as a killed process loses them.
"""

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

_OS_CALLS = ("fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "sendfile", "link", "symlink")
Tree = dict[str, bytes | None]


class _Watched:
    """A file whose writing calls are announced."""

    def __init__(self, file, announce: Callable[[], None]):
        self._file, self._announce = file, announce

    def __getattr__(self, name: str):
        value = getattr(self._file, name)
        if name not in ("write", "writelines", "flush", "truncate", "close"):
            return value

        def announced(*args):
            self._announce()
            return value(*args)

        return announced

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *args):
        self._announce()
        return self._file.__exit__(*args)

    def __iter__(self):
        return iter(self._file)


@contextlib.contextmanager
def watched(announce: Callable[[], None]) -> Iterator[None]:
    """`announce()` is called before every writing call in the block, in any thread."""

    def before(function):
        def wrapped(*args, **kwargs):
            announce()
            return function(*args, **kwargs)

        return wrapped

    plain_open, plain_os_open = io.open, os.open

    def watched_open(file, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+"):
            return plain_open(file, mode, *args, **kwargs)
        announce()
        return _Watched(plain_open(file, mode, *args, **kwargs), announce)

    def watched_os_open(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            announce()
        return plain_os_open(path, flags, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in _OS_CALLS:
            stack.enter_context(mock.patch.object(os, name, before(getattr(os, name))))
        stack.enter_context(mock.patch.object(os, "open", watched_os_open))
        stack.enter_context(mock.patch.object(io, "open", watched_open))
        stack.enter_context(mock.patch.object(builtins, "open", watched_open))
        yield


def tree_of(folder: Path) -> Tree:
    """What is below a folder: files with their bytes, folders with None. What vanishes meanwhile is left out."""
    tree: Tree = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            tree[path.relative_to(folder).as_posix()] = None if path.is_dir() else path.read_bytes()
    return tree


def restore(tree: Tree, folder: Path) -> None:
    """Make `folder` hold a tree."""
    folder.mkdir(parents=True)
    for name, content in tree.items():
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def states_during(action: Callable[[], None], folder: Path) -> dict[int, Tree]:
    """What a death at each writing call of `action`, counted from 1, would leave in `folder`, and what it leaves in the end.

    A call that finds the disk as the call before it did (most writes go to a buffer) is left out.
    """
    trees: dict[int, Tree] = {}
    num_calls, last = 0, None

    def keep() -> None:
        nonlocal num_calls, last
        num_calls += 1
        tree = tree_of(folder)
        if tree != last:
            trees[num_calls] = last = tree

    with watched(keep):
        action()
    keep()
    return trees


def dies_at(call: int, action: Callable[[], None]) -> bool:
    """Run `action` in a forked process that SIGKILLs itself at its writing call number `call`; False if it has fewer."""
    process = os.fork()
    if process == 0:
        num_calls = 0

        def count() -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls == call:
                os.kill(os.getpid(), 9)

        status = 1
        try:
            with watched(count):
                action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    assert status in (0, 9), f"the process ended with {status}"
    return status == 9
