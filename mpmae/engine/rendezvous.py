"""How the ranks of a run find each other: rank 0's address, its port, and who has come.

torch's own rendezvous waits half an hour without a word, or for ever when something else answers on the port. Here every
wait is bounded, and the error says which rank did not come, or why the address does not answer.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mpmae.errors import ConfigError

_CONNECT_S = 5.0
_FAREWELL_S = 5.0
_LONGEST_PAUSE_S = 0.5
_MAX_NAMED = 8
_LISTENS = "0A"  # of a socket in /proc/net/tcp


def meet(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The store of a process group whose ranks have all come; its keys are this meeting's own.

    Reads MASTER_ADDR and MASTER_PORT. Rank 0 serves the store there, under torchrun its agent does. A worker group that
    torchrun has restarted finds its agent's store as the last one left it, so each meeting has a name of its own.

    Raises ConfigError within about `timeout_s`: the port is taken or no port, the address does not resolve or answer, ranks
    that have not come, a rank that came twice, ranks told of another world size.
    """
    address, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout_s
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    pauses = _pauses()
    while True:
        if not serves:
            _await_listener(rank, address, port, deadline, timeout_s)
        try:
            store = _open_store(rank, address, port, serves, deadline, timeout_s)
            name = uuid.uuid4().hex
            if world_size > 1:
                attendance = _Attendance(store, rank, world_size, f"{address}:{port}", timeout_s)
                name = attendance.call(name, deadline) if rank == 0 else attendance.answer(deadline)
            return dist.PrefixStore(name, store)
        except dist.DistNetworkError as error:
            # A rank that is early for its second world finds the store of the first, which rank 0 is about to end.
            if serves or time.monotonic() >= deadline:
                raise ConfigError(_no_connection(rank, address, port, timeout_s, str(error), serves)) from error
            time.sleep(next(pauses))


class _Attendance:
    """Who has come, by keys in the store of rank 0."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, where: str, timeout_s: float):
        self.store, self.rank, self.world_size = dist.PrefixStore("mpmae", store), rank, world_size
        self.where, self.timeout_s = where, timeout_s

    def call(self, name: str, deadline: float) -> str:
        """Rank 0: open the meeting `name`, wait for the others, and let them go."""
        invitation = {"name": name, "world_size": self.world_size, "host": socket.gethostname()}
        self.store.set("invitation", json.dumps(invitation))
        pauses, problem_key = _pauses(), f"{name}/problem"
        while self._count(name, "come") < self.world_size - 1 and time.monotonic() < deadline:
            if self.store.check([problem_key]):
                break
            time.sleep(next(pauses))
        num_come = self._count(name, "come")
        problem = self.store.get(problem_key).decode() if self.store.check([problem_key]) else ""
        if not problem and num_come < self.world_size - 1:
            problem = self._absence(name, socket.gethostname())
        # Withdrawn first, so that one which outlives its rank 0 has no verdict. Not deleted: a get of it would wait for it.
        self.store.set("invitation", "")
        self.store.set(f"{name}/verdict", problem)
        farewell = time.monotonic() + _FAREWELL_S  # the store may end with this process
        while self._count(name, "gone") < num_come and time.monotonic() < farewell:
            time.sleep(next(pauses))
        if problem:
            raise ConfigError(problem)
        return name

    def answer(self, deadline: float) -> str:
        """Another rank: come to the meeting that rank 0 holds; its name."""
        name, host, pauses = "", "", _pauses()
        while time.monotonic() < deadline:
            text = self.store.get("invitation") if self.store.check(["invitation"]) else b""
            invitation = json.loads(text) if text else None
            if invitation and invitation["name"] != name:  # that of a rank 0 that was killed is followed by a newer one
                name, host = invitation["name"], invitation["host"]
                self._come(name, invitation)
            if name and self.store.check([f"{name}/verdict"]):
                problem = self.store.get(f"{name}/verdict").decode()
                self.store.add(f"{name}/gone", 1)
                if problem:
                    raise ConfigError(problem)
                return name
            time.sleep(next(pauses))
        if name:
            raise ConfigError(self._absence(name, host))
        raise ConfigError(
            f"rank {self.rank} on {socket.gethostname()} reached {self.where}, but rank 0 did not come there within "
            f"{self.timeout_s:g} s; its own message, or the log of its node, says why"
        )

    def _come(self, name: str, invitation: dict) -> None:
        """Problems go to rank 0, which tells all: the invitation may be one of a world that has ended."""
        here, problem = socket.gethostname(), ""
        if invitation["world_size"] != self.world_size:
            problem = (
                f"rank {self.rank} on {here} was told of {self.world_size} ranks, rank 0 on {invitation['host']} of "
                f"{invitation['world_size']}: give the launcher the same number of nodes and ranks on every node"
            )
        if self.store.add(f"{name}/times/{self.rank}", 1) > 1:
            problem = (
                f"rank {self.rank} came twice to {self.where}, the second time from {here}: give every node a node rank of "
                f"its own, and every job a port of its own"
            )
        self.store.set(f"{name}/host/{self.rank}", here)
        if problem:
            self.store.set(f"{name}/problem", problem)
        self.store.add(f"{name}/come", 1)

    def _count(self, name: str, what: str) -> int:
        return self.store.add(f"{name}/{what}", 0)

    def _absence(self, name: str, host_of_rank_0: str) -> str:
        hosts = {0: host_of_rank_0}
        for rank in range(1, self.world_size):
            if self.store.check([f"{name}/host/{rank}"]):
                hosts[rank] = self.store.get(f"{name}/host/{rank}").decode()
        absent = [rank for rank in range(self.world_size) if rank not in hosts]
        return (
            f"{len(hosts)} of {self.world_size} ranks came to {self.where} within {self.timeout_s:g} s; "
            f"absent: {_shortened(f'rank {rank}' for rank in absent)}; "
            f"here: {_shortened(f'rank {rank} on {host}' for rank, host in hosts.items())}; "
            f"look for the absent ranks' own messages, or raise guard.rendezvous_timeout_s if their nodes start slowly"
        )


def _shortened(names: Iterable[str]) -> str:
    first, more = [], 0
    for name in names:
        if len(first) < _MAX_NAMED:
            first.append(name)
        else:
            more += 1
    return ", ".join(first) + (f" and {more} more" if more else "")


def _pauses() -> Iterator[float]:
    """Short at first, as ranks of one node come together; then long, as thousands of them ask one store."""
    pause_s = 0.01
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"MASTER_PORT = {text!r}: expected a number from 1 to 65535, free on rank 0's node")
    return int(text)


def _await_listener(rank: int, address: str, port: int, deadline: float, timeout_s: float) -> None:
    """Return when something accepts connections at the address; ConfigError with the last reason at the deadline."""
    pauses = _pauses()
    while True:
        left_s = deadline - time.monotonic()
        reason = _connect(address, port, min(_CONNECT_S, max(left_s, 0.1)))
        if reason is None:
            return
        if deadline - time.monotonic() <= 0:
            raise ConfigError(
                f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at MASTER_ADDR:MASTER_PORT = {address}:{port}: "
                f"{reason}, for {timeout_s:g} s"
            )
        time.sleep(min(next(pauses), max(left_s, 0)))


def _connect(address: str, port: int, timeout_s: float) -> str | None:
    """Why no connection comes about, and what to do; None if it does."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s):
            return None
    except socket.gaierror as error:
        return f"the name does not resolve on this node ({error.strerror}); give an IP address or a name that all nodes know"
    except TimeoutError:
        return "no answer; is it the right node, is that node up, and does a firewall let the port through"
    except ConnectionRefusedError:
        return "that node answers, but nothing listens there; see the log of rank 0, or the address is another node's"
    except OSError as error:
        return f"{error.strerror or error}; is there a route from this node"


def _open_store(rank: int, address: str, port: int, serves: bool, deadline: float, timeout_s: float) -> dist.TCPStore:
    """The store, on a thread of its own: a listener that takes the connection and says nothing is waited for without end.

    Raises ConfigError, or DistNetworkError when the listener has gone meanwhile and there is time left to look for another.
    """
    result: list[dist.TCPStore | Exception] = []
    left_s = max(deadline - time.monotonic(), 1.0)

    def connect() -> None:
        try:
            timeout = timedelta(seconds=left_s)
            options = {"wait_for_workers": False, "multi_tenant": True}
            result.append(dist.TCPStore(address, port, None, serves, timeout, **options))
        except Exception as error:  # handed to the caller
            result.append(error)

    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(left_s + _CONNECT_S)
    answer = result[0] if result else "it takes connections but does not answer as a run's store"
    if isinstance(answer, dist.TCPStore):
        return answer
    if "EADDRINUSE" in str(answer):
        raise ConfigError(
            f"MASTER_PORT = {port} is in use on {socket.gethostname()}, rank 0's node{_holder(port)}: end that process, or "
            f"set MASTER_PORT (torchrun: --master-port or --rdzv-endpoint, deepspeed: --master_port) to a free port"
        ) from None
    if isinstance(answer, dist.DistNetworkError) and not serves and time.monotonic() < deadline:
        raise answer
    raise ConfigError(_no_connection(rank, address, port, timeout_s, str(answer), serves))


def _no_connection(rank: int, address: str, port: int, timeout_s: float, reason: str, serves: bool) -> str:
    return (
        f"rank {rank} on {socket.gethostname()} has no connection to MASTER_ADDR:MASTER_PORT = {address}:{port} after "
        f"{timeout_s:g} s: {reason.splitlines()[0]}{_foreign_address(address) if serves else ''}; "
        f"does another program use the port? give the run another one"
    )


def _foreign_address(address: str) -> str:
    """What to say when rank 0 was told to serve at an address that this node does not have."""
    try:
        resolved = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f" (the name does not resolve here: {error.strerror})"
    for family, kind, protocol, _, place in resolved:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(place)
                return ""
            except OSError:
                continue
    return f" ({address} is no address of this node, where rank 0 runs)"


def _holder(port: int) -> str:
    """', held by process N (command)', as far as this user may see it on Linux; else ''."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            rows = [line.split() for line in table.read_text().splitlines()[1:]]
        except OSError:
            continue
        inodes |= {row[9] for row in rows if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port}
    sockets = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_target(link) in sockets for link in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f", held by process {process.name} ({command[:120]})"
        except OSError:  # another user's process, or one that has just ended
            continue
    return ""


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""
