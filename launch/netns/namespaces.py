"""One host of the test cluster: a process that holds the namespaces, and what runs inside them."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
_OWN = ("--net", "--uts", "--mount", "--pid")
_START_S = 30
_HOLD = "echo ready && read _"


class NoNamespaces(Exception):
    """This machine, or this user's rights on it, does not allow network namespaces; the text says why."""


class Namespaces:
    """Network, host name, process and mount namespaces of one host, and all processes in them.

    They are held by a shell that waits for the end of its standard input: it, everything in the namespaces and their
    network interfaces end with this process, however it ends. Nothing gets a name outside.

    owner: pid of a process in the user namespace that the host belongs to; None for the caller's, which then is root's.
    Raises NoNamespaces.
    """

    def __init__(self, hostname: str, hosts_file: Path, owner: int | None = None):
        self.hostname = hostname
        self._as_owner = ["nsenter", f"--target={owner}", "--user", "--preserve-credentials"] if owner else []
        set_up = (
            f'hostname {hostname} && mount --bind "{hosts_file}" /etc/hosts && ip link set lo up && echo ready && read _'
        )
        command = [*self._as_owner, "unshare", *_OWN, "--fork", "--kill-child", "--mount-proc", "sh", "-c", set_up]
        self._holder = _hold(command)
        self.pid = children(self._holder.pid)[0]

    def inside(self, *command: str) -> list[str]:
        """The command line that runs `command` on this host, in the caller's folder."""
        enter = ["nsenter", f"--target={self.pid}", *_OWN, f"--wdns={Path.cwd()}"]
        return [*self._as_owner, *enter, "--", *command]

    def network_only(self, *command: str) -> list[str]:
        """The command line that runs `command` with this host's network and the caller's processes and files."""
        return [*self._as_owner, "nsenter", f"--target={self.pid}", "--net", "--", *command]

    def call(self, *command: str) -> str:
        """Run a short command on this host; its output. Raises CalledProcessError."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, check=True, timeout=_START_S)
        return done.stdout

    def processes(self) -> dict[int, dict[str, str]]:
        """Pid (as seen from outside) and environment of each process on this host but the holder."""
        network = Path(f"/proc/{self.pid}/ns/net").readlink()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "ns/net").readlink() != network or folder.name == str(self.pid):
                    continue
                pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # ended meanwhile, or another user's
                continue
            found[int(folder.name)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return found

    def kill_processes(self) -> None:
        """SIGKILL to all processes on this host; the host stays up."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the host: every process at once, and its end of the link. Safe to call twice."""
        if self._holder.poll() is None:
            self._holder.kill()  # --kill-child ends the shell inside, which is process 1 there
        self._holder.wait()
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            pipe.close()


def _hold(command: list[str]) -> subprocess.Popen:
    """Start the process that holds namespaces; it has said that they are ready. Raises NoNamespaces."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    holder = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    if holder.stdout.readline().strip() != "ready":
        holder.kill()
        raise NoNamespaces(f"{command[0]}: {holder.communicate()[1].strip() or 'ended without a word'}")
    return holder


def hold_user_namespace() -> subprocess.Popen:
    """A process in a user namespace in which this user is root, for machines where it is not. Raises NoNamespaces."""
    return _hold(["unshare", "--user", "--map-root-user", "sh", "-c", _HOLD])


def check_tools() -> None:
    """Raises NoNamespaces when a program that the cluster needs is absent."""
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        raise NoNamespaces(f"not installed: {', '.join(absent)} (packages iproute2, util-linux, hostname)")


def children(pid: int) -> list[int]:
    """Pids of the processes that `pid` started and that still run."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything below it, the top first so that nothing reacts."""
    for each in (pid, *_descendants(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *_descendants(child))]
