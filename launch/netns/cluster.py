"""A test cluster on one machine: every node has network, processes and a name of its own, and a cable to one switch.

    node0 eth0 ---- port0 [switch: bridge] port1 ---- eth0 node1

Nodes, switch and cables live in namespaces that end with this process; the machine's own interfaces are not touched.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.netns.namespaces import Namespaces, NoNamespaces, check_tools, hold_user_namespace, kill_tree

INTERFACE = "eth0"
PORT = 29500
_NETWORK = "10.77.0"  # in namespaces of its own: every cluster may have the same
_BURST = "32kbit"
_MAX_NODES = 200


class Cluster:
    """`num_nodes` hosts, up from the start. A context manager: everything ends with it.

    Raises NoNamespaces with the reason when this machine does not allow it.
    """

    def __init__(self, num_nodes: int):
        if not 1 <= num_nodes <= _MAX_NODES:
            raise ValueError(f"num_nodes = {num_nodes}: expected 1 to {_MAX_NODES}")
        check_tools()
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            owner = None
            if os.geteuid() != 0:
                holder = hold_user_namespace()
                stack.callback(holder.wait)
                stack.callback(holder.kill)
                owner = holder.pid
            self.names = tuple(f"node{index}" for index in range(num_nodes))
            self.addresses = tuple(f"{_NETWORK}.{index + 1}" for index in range(num_nodes))
            lines = [f"{address} {name}" for address, name in zip(self.addresses, self.names, strict=True)]
            with tempfile.TemporaryDirectory(prefix="netns-") as folder:  # what is mounted from it outlives it
                hosts = Path(folder) / "hosts"
                hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
                self._switch = self._host("switch", hosts, owner, stack)
                self.nodes = tuple(self._host(name, hosts, owner, stack) for name in self.names)
            try:
                self._wire()
            except subprocess.CalledProcessError as error:
                raise NoNamespaces(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
            self._closing = stack.pop_all()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def environment(self, node: int) -> dict[str, str]:
        """What a launcher on that node needs to know: MASTER_ADDR, MASTER_PORT, NUM_NODES, NODE_RANK, interfaces."""
        return {
            "MASTER_ADDR": self.names[0],
            "MASTER_PORT": str(PORT),
            "NUM_NODES": str(len(self.nodes)),
            "NODE_RANK": str(node),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
        }

    def start(self, node: int, command: Sequence[str], env: Mapping[str, str], **options: object) -> subprocess.Popen:
        """`command` on a node, in the background; `env` comes on top of `environment(node)` and this process's own."""
        full = os.environ | self.environment(node) | dict(env)
        return subprocess.Popen(self.nodes[node].inside(*command), env=full, **options)

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to the process that a launcher started as `rank`, and to everything below. Raises ProcessLookupError."""
        for node in self.nodes:
            pids = [pid for pid, env in node.processes().items() if env.get("RANK", env.get("SLURM_PROCID")) == str(rank)]
            if pids:
                kill_tree(min(pids, key=_start_time))
                return
        raise ProcessLookupError(f"no process of rank {rank} runs on {', '.join(self.names)}")

    def kill_node(self, node: int) -> None:
        """End a node as a power cut does: no process on it says good-bye, so the others only see silence."""
        self.cut_link(node)
        self.nodes[node].kill()

    def cut_link(self, node: int) -> None:
        """Pull a node's cable at the switch."""
        self._switch.call("ip", "link", "set", f"port{node}", "down")

    def mend_link(self, node: int) -> None:
        """Plug it in again."""
        self._switch.call("ip", "link", "set", f"port{node}", "up")

    def slow_link(self, node: int, delay_ms: float, loss_percent: float, rate_mbit: float) -> str:
        """Make a node's cable slow in both directions; says how.

        With `tc netem` packets wait `delay_ms` each way, get lost and are limited to a rate; a kernel without it has only
        the limit (`tc tbf`).
        """
        netem = ["netem", "delay", f"{delay_ms:g}ms", "loss", f"{loss_percent:g}%", "rate", f"{rate_mbit:g}mbit"]
        tbf = ["tbf", "rate", f"{rate_mbit:g}mbit", "burst", _BURST, "latency", "400ms"]
        ends = [(self._switch, f"port{node}"), (self.nodes[node], INTERFACE)]
        for shape in (netem, tbf):
            try:
                for host, interface in ends:
                    host.call("tc", "qdisc", "replace", "dev", interface, "root", *shape)
                return " ".join(shape)
            except subprocess.CalledProcessError as error:
                refusal = error
        raise NoNamespaces(f"neither tc netem nor tc tbf: {refusal.stderr.strip()}")

    def _host(self, name: str, hosts: Path, owner: int | None, stack: contextlib.ExitStack) -> Namespaces:
        host = Namespaces(name, hosts, owner)
        stack.callback(host.kill)
        return host

    def _wire(self) -> None:
        switch = self._switch
        switch.call("ip", "link", "add", "bridge", "type", "bridge")
        switch.call("ip", "link", "set", "bridge", "up")
        for index, (node, address) in enumerate(zip(self.nodes, self.addresses, strict=True)):
            port = f"port{index}"
            # the peer is put into its namespace by pid, which `ip` looks up in /proc: so from outside the switch's
            peer = ["peer", "name", INTERFACE, "netns", str(node.pid)]
            command = ["ip", "link", "add", port, "type", "veth", *peer]
            subprocess.run(switch.network_only(*command), capture_output=True, text=True, check=True)
            switch.call("ip", "link", "set", port, "master", "bridge", "up")
            node.call("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
            node.call("ip", "link", "set", INTERFACE, "up")


def _start_time(pid: int) -> int:
    """Clock ticks since boot: of a rank and the workers it forked, the rank is the oldest."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
