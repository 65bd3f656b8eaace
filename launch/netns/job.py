"""A run over the nodes of a test cluster, as torchrun, deepspeed or srun would start it there."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.netns.cluster import PORT, Cluster

_POLL_S = 0.05
_SLURM_JOB_ID = "77"


class Job:
    """A launcher on every node, started at once. A context manager: what still runs ends with it.

    launcher: torchrun (c10d rendezvous on node 0), deepspeed (hostfile, without ssh), srun (one process per rank, with
    Slurm's variables and --kill-on-bad-exit) or none (`command` itself, once per node).
    command: the script and its arguments; with none, a whole command line.
    options: for torchrun and deepspeed, before the script. folder: gets NODE.log of each node; None: to the terminal.
    """

    def __init__(
        self,
        cluster: Cluster,
        launcher: str,
        ranks_per_node: int,
        command: Sequence[str],
        options: Sequence[str] = (),
        folder: Path | None = None,
    ):
        self.cluster, self.launcher, self.ranks_per_node, self.folder = cluster, launcher, ranks_per_node, folder
        self._command, self._options = list(command), list(options)
        self._own_folder = tempfile.TemporaryDirectory(prefix="netns-job-")
        self.processes: list[tuple[int, subprocess.Popen]] = []
        for node in range(len(cluster.nodes)):
            self.start_node(node)

    def start_node(self, node: int) -> None:
        """Start the launcher (srun: the ranks) of one node, as after its repair."""
        for command, env in self._launches(node):
            output = subprocess.DEVNULL if self.folder is None else self.log(node).open("a")
            options = {} if self.folder is None else {"stdout": output, "stderr": subprocess.STDOUT}
            process = self.cluster.start(node, command, env, stdin=subprocess.DEVNULL, **options)
            self.processes.append((node, process))
            if self.folder is not None:
                output.close()

    def log(self, node: int) -> Path:
        """Where the output of a node's processes goes."""
        return self.folder / f"{self.cluster.names[node]}.log"

    def poll(self) -> bool:
        """Whether something still runs. With srun, a rank that failed ends all others, as --kill-on-bad-exit does."""
        if self.launcher == "srun" and any(process.poll() for _, process in self.processes):
            self.end()
        return any(process.poll() is None for _, process in self.processes)

    def wait(self, timeout_s: float) -> list[int]:
        """The exit status per node, the first that is not 0 where there are several. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while self.poll():
            if time.monotonic() > deadline:
                running = sorted({self.cluster.names[node] for node, process in self.processes if process.poll() is None})
                raise TimeoutError(f"after {timeout_s:g} s {', '.join(running)} still run")
            time.sleep(_POLL_S)
        return [self.status(node) for node in range(len(self.cluster.nodes))]

    def status(self, node: int) -> int:
        """The exit status of an ended node."""
        return next((p.returncode for at, p in self.processes if at == node and p.returncode), 0)

    def end(self) -> None:
        """SIGKILL to everything of the job."""
        for index, node in enumerate(self.cluster.nodes):
            if any(at == index and process.poll() is None for at, process in self.processes):
                node.kill_processes()
        for _, process in self.processes:
            process.wait()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._own_folder.cleanup()

    def _launches(self, node: int) -> list[tuple[list[str], dict[str, str]]]:
        """Command line and variables of each process to start on a node."""
        num_nodes, master, ranks = len(self.cluster.nodes), self.cluster.names[0], self.ranks_per_node
        if self.launcher == "none":
            return [(self._command, {})]
        if self.launcher == "torchrun":
            elastic = any(option.startswith("--nnodes") for option in self._options)
            options = ["--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master}:{PORT}"]
            options += ["--rdzv-id", "netns", *([] if elastic else ["--nnodes", str(num_nodes)]), *self._options]
            return [([sys.executable, "-m", "torch.distributed.run", *options, *self._command], {})]
        if self.launcher == "deepspeed":
            options = ["--hostfile", str(self._hostfile()), "--no_ssh", "--node_rank", str(node)]
            options += ["--master_addr", master, "--master_port", str(PORT), *self._options]
            return [([sys.executable, "-m", "deepspeed.launcher.runner", *options, *self._command], {})]
        if self.launcher == "srun":
            task = [sys.executable, *self._command]
            return [(task, _slurm_variables(node, local, ranks, num_nodes)) for local in range(ranks)]
        raise ValueError(f"launcher = {self.launcher!r}: expected torchrun, deepspeed, srun or none")

    def _hostfile(self) -> Path:
        path = Path(self._own_folder.name) / "hostfile"
        path.write_text("".join(f"{name} slots={self.ranks_per_node}\n" for name in self.cluster.names))
        return path


def _slurm_variables(node: int, local_rank: int, ranks_per_node: int, num_nodes: int) -> dict[str, str]:
    """What srun sets for a task of a step that has its tasks in blocks (its default)."""
    return {
        "SLURM_JOB_ID": _SLURM_JOB_ID,
        "SLURM_NODEID": str(node),
        "SLURM_PROCID": str(node * ranks_per_node + local_rank),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_STEP_NUM_TASKS": str(num_nodes * ranks_per_node),
        "SLURM_STEP_NUM_NODES": str(num_nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{ranks_per_node}(x{num_nodes})",
        "SLURM_KILL_BAD_EXIT": "1",
    }
