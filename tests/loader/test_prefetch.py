"""Fetching ahead: room is taken in the order of need however the threads run, and what no longer fits is left."""

import threading
import time

import pytest

from mpmae.errors import ShardError
from mpmae.loader.prefetch import Prefetcher
from mpmae.retries import StoppedError


@pytest.fixture
def start():
    """Makes prefetchers that are closed in the end."""
    made = []

    def make(reserve):
        made.append(Prefetcher(reserve))
        return made[-1]

    yield make
    for prefetcher in made:
        prefetcher.close()


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_room_is_taken_in_order_by_threads_that_run_side_by_side(start):
    reserved, fetched, begun = [], [], threading.Barrier(4)

    def reserve(number, requested_ns):
        time.sleep(0.02 if number == 0 else 0)  # the first is the slowest
        reserved.append(number)

        def fetch(stop):
            begun.wait(30)  # all four are fetched at the same time
            fetched.append(number)

        return fetch

    start(reserve).request(range(8), 1)
    wait_until(lambda: len(fetched) == 8)
    assert reserved == list(range(8))


def test_what_follows_the_first_that_does_not_fit_is_left(start):
    asked, fetched = [], []

    def reserve(number, requested_ns):
        asked.append((number, requested_ns))
        return (lambda stop: fetched.append(number)) if number < 2 or requested_ns == 2 else None

    prefetcher = start(reserve)
    prefetcher.request([0, 1, 2, 3], 1)
    wait_until(lambda: len(asked) == 3 and len(fetched) == 2)
    prefetcher.request([3], 2)
    wait_until(lambda: sorted(fetched) == [0, 1, 3])
    assert asked == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_a_failure_is_logged_and_the_rest_goes_on(start, caplog):
    fetched = []

    def reserve(number, requested_ns):
        if number == 0:
            raise ShardError("the cache is full of holes")

        def fetch(stop):
            if number == 1:
                raise ShardError("the store is gone")
            fetched.append(number)

        return fetch

    start(reserve).request([0, 1, 2], 1)
    wait_until(lambda: fetched == [2] and caplog.text.count("fetching ahead failed") == 2)


def test_closing_calls_off_what_is_fetched_and_ends_the_threads(start):
    begun, stopped, before = [], [], threading.enumerate()

    def reserve(number, requested_ns):
        def fetch(stop):
            begun.append(number)
            stop.wait(30)
            stopped.append(number)
            raise StoppedError

        return fetch

    prefetcher = start(reserve)
    prefetcher.request([0, 1], 1)
    wait_until(lambda: len(begun) == 2)
    threads = [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread not in before]
    prefetcher.close()
    assert sorted(stopped) == [0, 1]
    assert len(threads) == 2
    assert not any(thread.is_alive() for thread in threads)
