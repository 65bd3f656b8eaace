"""Ranks that meet, and what is said when they do not. Each rank is a thread here: `meet` has no state but the store."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from mpmae.engine import rendezvous
from mpmae.engine.rendezvous import meet
from mpmae.errors import ConfigError
from tests.train.launches import free_port

BOUND_S = 20


@pytest.fixture(autouse=True)
def _address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "_CONNECT_S", 0.5)
    monkeypatch.setattr(rendezvous, "_FAREWELL_S", 1.0)


@pytest.fixture
def agent_store(monkeypatch):
    """A store that outlives the ranks, as that of torchrun's agent."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    timeout = timedelta(seconds=BOUND_S)
    return dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), None, True, timeout, wait_for_workers=False)


def meet_all(*ranks: tuple[int, int], timeout_s: float = 10.0, pause_s: float = 0.0) -> list[dist.Store | ConfigError]:
    """What `meet` gives or raises for each (rank, world size), started in this order."""
    results: list = [None] * len(ranks)

    def run(index: int, rank: int, world_size: int) -> None:
        try:
            results[index] = meet(rank, world_size, timeout_s)
        except ConfigError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index, *ranks[index]), daemon=True) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
        time.sleep(pause_s)
    for thread in threads:
        thread.join(BOUND_S)
    return results


def test_ranks_share_a_store():
    stores = meet_all((1, 3), (2, 3), (0, 3), pause_s=0.1)
    stores[0].set("key", "value")
    assert all(store.get("key") == b"value" for store in stores)


def test_restarted_ranks_find_a_store_without_the_old_keys(agent_store):
    for _ in range(3):
        stores = meet_all((0, 2), (1, 2))
        assert not stores[1].check(["key"])
        stores[0].set("key", "value")
        assert stores[1].get("key") == b"value"


_ENDING_WORLD = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", int(sys.argv[1]), None, True, timedelta(seconds=20), wait_for_workers=False)
time.sleep(float(sys.argv[2]))
"""


def test_a_rank_that_finds_the_store_of_a_world_that_ends_waits_for_the_next():
    ending = subprocess.Popen([sys.executable, "-c", _ENDING_WORLD, os.environ["MASTER_PORT"], "4"])
    try:
        while rendezvous._connect("127.0.0.1", int(os.environ["MASTER_PORT"]), 1.0):
            time.sleep(0.1)
        early: list = []
        thread = threading.Thread(target=lambda: early.append(meet(1, 2, BOUND_S)), daemon=True)
        thread.start()
        ending.wait(BOUND_S)
        (served,) = meet_all((0, 2), timeout_s=BOUND_S)
        thread.join(BOUND_S)
    finally:
        ending.kill()
    served.set("key", "value")
    assert early[0].get("key") == b"value"


def test_an_invitation_of_a_killed_rank_0_is_not_the_last_word(agent_store):
    """Rank 1 comes first, answers the old one, and must not take itself for a second rank 1 of the new one."""
    killed = meet_all((0, 3), (1, 3), timeout_s=0.5)
    assert all(isinstance(result, ConfigError) for result in killed)
    old = '{"name": "old", "world_size": 4, "host": "gone"}'
    dist.PrefixStore("mpmae", agent_store).set("invitation", old)
    stores = meet_all((1, 2), (0, 2), pause_s=0.5)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_absent_ranks_are_named_to_all():
    results = meet_all((0, 4), (2, 4), timeout_s=1.0)
    here = socket.gethostname()
    for text in map(str, results):
        assert f"2 of 4 ranks came to 127.0.0.1:{os.environ['MASTER_PORT']} within 1 s" in text
        assert "absent: rank 1, rank 3;" in text
        assert f"here: rank 0 on {here}, rank 2 on {here}" in text


def test_many_absent_ranks_are_not_all_listed():
    (error,) = meet_all((0, 2000), timeout_s=0.2)
    assert "rank 8 and 1991 more" in str(error)


def test_a_rank_that_comes_twice_is_told_to_all():
    """Two nodes that were both given the same node rank."""
    results = meet_all((0, 3), (1, 3), (1, 3))
    assert all("rank 1 came twice" in str(result) and "node rank" in str(result) for result in results)


def test_other_world_sizes_are_told_to_all():
    results = meet_all((0, 2), (1, 4))
    assert all("rank 1" in str(r) and "was told of 4 ranks, rank 0" in str(r) for r in results)


def test_no_rank_0(agent_store):
    (error,) = meet_all((1, 2), timeout_s=0.5)
    assert "rank 0 did not come there within 0.5 s" in str(error)


def test_a_port_in_use_names_its_holder():
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        os.environ["MASTER_PORT"] = str(port)
        (error,) = meet_all((0, 2))
    assert f"MASTER_PORT = {port} is in use on {socket.gethostname()}" in str(error)
    assert f"held by process {os.getpid()} (" in str(error)
    assert "--master_port" in str(error)


@pytest.mark.parametrize("port", ["", "http", "0", "70000", "-1"])
def test_no_port(port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", port)
    (error,) = meet_all((1, 2))
    assert f"MASTER_PORT = {port!r}: expected a number from 1 to 65535" in str(error)


def test_nothing_listens():
    before = time.monotonic()
    (error,) = meet_all((1, 2), timeout_s=1.0)
    assert 1.0 <= time.monotonic() - before < 3.0
    assert f"rank 1 on {socket.gethostname()} cannot reach rank 0" in str(error)
    assert f"127.0.0.1:{os.environ['MASTER_PORT']}: that node answers, but nothing listens there" in str(error)


def test_a_name_that_does_not_resolve(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("MASTER_ADDR", "gpu01")
    (error,) = meet_all((1, 2), timeout_s=0.5)
    assert "= gpu01:" in str(error)
    assert "the name does not resolve on this node (Name or service not known)" in str(error)


def test_another_program_on_the_port_does_not_hold_a_rank_for_ever():
    """It takes the connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        os.environ["MASTER_PORT"] = str(silent.getsockname()[1])
        before = time.monotonic()
        (error,) = meet_all((1, 2), timeout_s=1.0)
        assert time.monotonic() - before < 8.0
    assert "does another program use the port?" in str(error)
