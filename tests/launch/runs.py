"""Small real runs over a test cluster."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from launch.netns.cluster import Cluster
from launch.netns.job import Job
from launch.netns.namespaces import NoNamespaces
from tests.train.launches import REPO, metrics
from tests.train.test_parity import COMMON

SCRIPT = "launch/pretrain.py"
STEPS = 10
TIMEOUT_S = 240
SETTINGS = (
    *COMMON,
    "model.modalities_out=[sentinel2,biome]",
    f"train.max_steps={STEPS}",
    "checkpoint.every_steps=3",
)


def open_cluster(num_nodes: int = 2) -> Cluster:
    """A cluster, or a skip with the reason."""
    try:
        return Cluster(num_nodes)
    except NoNamespaces as reason:
        pytest.skip(f"no network namespaces here: {reason}")


class Run:
    """A run of launch/pretrain.py on 2 nodes of 2 ranks, with its own folder."""

    def __init__(self, cluster: Cluster, launcher: str, folder: Path, settings, *arguments: str, options=()):
        self.cluster, self.dir = cluster, folder / "run"
        self.started = time.monotonic()
        command = [SCRIPT, *settings, f"run.dir={self.dir}", *arguments]
        self.job = Job(cluster, launcher, 2, command, options, folder)

    def until_step(self, step: int) -> None:
        """Return when metrics.jsonl has `step`; AssertionError when the run ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not any(line["step"] >= step for line in metrics(self.dir)):
            assert self.job.poll(), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def ends(self, within_s: float = TIMEOUT_S) -> tuple[list[int], float]:
        """Exit status per node, and the seconds that it took from now on. AssertionError with the logs when it does not."""
        before = time.monotonic()
        try:
            statuses = self.job.wait(within_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.output()}") from error
        return statuses, time.monotonic() - before

    def finishes(self) -> np.ndarray:
        """The losses of a run that ends well."""
        statuses, _ = self.ends()
        assert statuses == [0] * len(statuses), self.output()
        return losses(self.dir)

    def output(self, node: int | None = None) -> str:
        """What the nodes printed."""
        nodes = range(len(self.cluster.nodes)) if node is None else [node]
        return "\n".join(f"{self.cluster.names[n]}:\n{self.job.log(n).read_text()[-6000:]}" for n in nodes)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.job.__exit__()


def losses(run_dir: Path) -> np.ndarray:
    """Loss per step; AssertionError when a step is absent or twice there."""
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([line["loss"] for line in lines])


def clean_environment(monkeypatch) -> None:
    """No variables of another launcher, one thread per rank, the repository as working folder."""
    for key in list(os.environ):
        if key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") or key.startswith("SLURM_"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(REPO)


def leftovers() -> set[str]:
    """Interfaces and named namespaces of the machine itself."""
    commands = (["ip", "-oneline", "link"], ["ip", "netns", "list"])
    outputs = [subprocess.run(c, capture_output=True, text=True, check=True, timeout=20).stdout for c in commands]
    return {line.split(" mtu ")[0] for output in outputs for line in output.splitlines()}


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
