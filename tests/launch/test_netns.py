"""Runs over two hosts of two ranks each, and what they do when something breaks.

Everything is real but the hosts, which are network namespaces: launchers, rendezvous, gloo over the wire, checkpoints.
"""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.launch.runs import SETTINGS, STEPS, Run, clean_environment, is_running, leftovers, losses, open_cluster
from tests.train.launches import launch_ok, metrics

pytestmark = pytest.mark.timeout(600)
STALL = "guard.stall_s=30"
RESTARTS = ("--max-restarts", "2", "--monitor-interval", "0.5")
ZERO = ("--ds-config", "configs/ds/zero2.json")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    clean_environment(monkeypatch)


@pytest.fixture
def cluster():
    with open_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def settings(shards_dir):
    return (f"data.shards={shards_dir}", *SETTINGS)


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory):
    """The losses of one process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    launch_ok("python", 1, run_dir, *settings)
    return losses(run_dir)


def give_up_early(cluster) -> None:
    """Let the nodes' kernels give up on a silent connection after 25 s, not 15 minutes: torchrun's agent waits for that."""
    for node in cluster.nodes:
        node.call("sh", "-c", "echo 6 > /proc/sys/net/ipv4/tcp_retries2")


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_killed_rank_restarts_and_the_curve_is_that_of_one_process(cluster, settings, expected, tmp_path):
    """torchrun starts all ranks again on both nodes; they go on from the last checkpoint."""
    with Run(cluster, "torchrun", tmp_path, settings, "--resume", "auto", options=RESTARTS) as run:
        run.until_step(5)
        cluster.kill_rank(3)
        assert_same(run.finishes(), expected)
        assert "continuing from" in run.output(0)


def test_addresses_that_do_not_answer(cluster):
    """Rank 1 is behind a cut cable; rank 0 was told to serve at the address of another node."""
    cluster.cut_link(1)
    processes = []
    for rank, address in ((0, cluster.addresses[1]), (1, cluster.addresses[0])):
        code = f"from mpmae.engine.rendezvous import meet; meet({rank}, 2, 4.0)"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(cluster.start(rank, [sys.executable, "-c", code], {"MASTER_ADDR": address}, **pipes))
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert "10.77.0.2 is no address of this node, where rank 0 runs" in said[0]
    assert "rank 1 on node1 cannot reach rank 0 at MASTER_ADDR:MASTER_PORT = 10.77.0.1:29500" in said[1]
    assert "no answer; is it the right node" in said[1] or "is there a route from this node" in said[1]


def test_a_cluster_leaves_nothing_behind():
    """Also when something runs on it still, and when the process that made it is killed."""
    before = leftovers()
    with open_cluster() as cluster:
        assert leftovers() == before, "the machine's own interfaces are not touched"
        sleeper = cluster.start(1, ["sleep", "600"], {})
        pids = [node.pid for node in cluster.nodes]
    assert sleeper.wait(10) != 0
    code = "from launch.netns.cluster import Cluster; c = Cluster(1); print(c.nodes[0].pid, flush=True); input()"
    maker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids.append(int(maker.stdout.readline()))
    maker.kill()
    maker.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert leftovers() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "arguments"), [("torchrun", ()), ("srun", ()), ("deepspeed", ZERO), ("srun", ZERO), ("torchrun", ZERO)]
)
def test_same_curve_under_every_launcher(launcher, arguments, cluster, settings, expected, tmp_path):
    with Run(cluster, launcher, tmp_path, settings, *arguments) as run:
        assert_same(run.finishes(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "arguments"), [("torchrun", ()), ("srun", ()), ("deepspeed", ZERO)])
def test_without_restarts_a_killed_rank_ends_the_job(launcher, arguments, cluster, settings, tmp_path):
    with Run(cluster, launcher, tmp_path, settings, *arguments, STALL) as run:
        run.until_step(2)
        cluster.kill_rank(3)
        statuses, took_s = run.ends(within_s=60)
        print(f"\nkilled rank, {launcher}: {statuses} after {took_s:.1f} s")
        assert all(statuses), run.output()


@pytest.mark.slow
def test_an_elastic_run_goes_on_without_a_node(cluster, settings, expected, tmp_path):
    """4 ranks, then 2: the node's power is cut in the middle of the epoch."""
    options = (*RESTARTS, "--nnodes", "1:2", "--rdzv-conf", "last_call_timeout=5")
    with Run(cluster, "torchrun", tmp_path, settings, "--resume", "auto", STALL, options=options) as run:
        run.until_step(5)
        cluster.kill_node(1)
        statuses, took_s = run.ends()
        print(f"\nkilled node, elastic: {statuses} after {took_s:.1f} s")
        assert statuses == [0, -signal.SIGKILL], run.output(0)
        assert "2 ranks" in run.output(0)
        assert "on node1) silent for " in run.job.log(0).read_text()
        assert_same(losses(run.dir), expected)


@pytest.mark.slow
def test_without_its_first_node_an_elastic_run_ends(cluster, settings, tmp_path):
    """Node 0 holds the rendezvous: nothing can be agreed without it."""
    give_up_early(cluster)
    with Run(cluster, "torchrun", tmp_path, settings, STALL, options=(*RESTARTS, "--nnodes", "1:2")) as run:
        run.until_step(2)
        cluster.kill_node(0)
        statuses, took_s = run.ends(within_s=200)
        print(f"\nkilled node 0: {statuses} after {took_s:.1f} s")
        assert all(statuses), run.output(1)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "arguments"), [("torchrun", ()), ("srun", ()), ("deepspeed", ZERO)])
def test_a_cut_link_ends_both_nodes_within_the_stated_time(launcher, arguments, cluster, settings, tmp_path):
    give_up_early(cluster)
    with Run(cluster, launcher, tmp_path, settings, *arguments, STALL) as run:
        run.until_step(2)
        cluster.cut_link(1)
        statuses, took_s = run.ends(within_s=180)
        print(f"\ncut link, {launcher}: {statuses} after {took_s:.1f} s")
        assert all(statuses), run.output()
        assert "stalled: " in run.output() or "another rank cannot be reached" in run.output()


@pytest.mark.slow
def test_a_slow_link_only_takes_longer(cluster, settings, expected, tmp_path):
    how = cluster.slow_link(1, delay_ms=10, loss_percent=0.1, rate_mbit=200)
    with Run(cluster, "torchrun", tmp_path, settings) as run:
        assert_same(run.finishes(), expected)
        seconds = [12 / line["images_per_s"] for line in metrics(run.dir)[1:]]
        took_s = time.monotonic() - run.started
        print(f"\nslow link ({how}): {np.median(seconds):.2f} s a step over {STEPS} steps, {took_s:.0f} s")
        assert np.median(seconds) > 0.5, "24 MB of gradients in each direction"
