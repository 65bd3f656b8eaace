"""The last beat of every rank, shared through the rendezvous store, which answers while the ranks hang in a collective.

Rank 0 looks at all ranks, the others at rank 0 alone, so the store has one small request a rank and beat.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable

from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store, _world

from mpmae.engine.world import BESIDE_TRAINING
from mpmae.train.stalls import FAILED, LEFT, Beat, Heard, Verdict, judge

_lives = itertools.count()  # a process may live through several runs, with the same store


class Heartbeats:
    """A thread that sends this rank's beats, listens to others, and judges; it has a connection to the store of its own.

    A request to a store whose process is stopped waits for ever, whatever its timeout: so nothing else may wait for this
    thread. `verdict` is there as soon as a rank has pronounced one; `unheard_s` tells how long the store has not answered.
    After a verdict, once `dumped` is set, `all_dumped` gets set when all ranks that can have come so far.
    """

    def __init__(self, rank: int, world_size: int, stall_s: float, interval_s: float, beat: Callable[[], Beat]):
        self._rank, self._world_size, self._beat = rank, world_size, beat
        self._stall_s, self._interval_s = stall_s, interval_s
        self._prefix, self._store = f"watchdog-{next(_lives)}", None
        now = self._answered_at = time.monotonic()
        watched = range(1, world_size) if rank == 0 else (0,)
        self._heard: dict[int, tuple[Beat | None, float]] = dict.fromkeys(watched, (None, now))
        self._over = threading.Event()
        self.verdict: Verdict | None = None
        self.dumped, self.all_dumped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def unheard_s(self) -> float:
        """Seconds since the store last answered."""
        return time.monotonic() - self._answered_at

    def stop(self) -> None:
        """Send a last beat; waits for it no longer than two intervals."""
        self._over.set()
        self._thread.join(2 * self._interval_s)

    def _run(self) -> None:
        is_over = False
        while not is_over and self.verdict is None:
            is_over = self._over.is_set()  # and then once more, for the last beat
            try:
                self.verdict = self._exchange(is_over)
                self._answered_at = time.monotonic()
            except RuntimeError:  # the connection is lost: the next exchange has a new one
                self._store = None
            self._over.wait(self._interval_s if not is_over else 0)
        if self.verdict and self.dumped.wait(self._stall_s):
            self._wait_for_all(self._world_size - self.verdict.num_mute)

    def _exchange(self, is_last: bool) -> Verdict | None:
        store, beat = self._connection(), self._beat()
        store.set(f"beat-{self._rank}", json.dumps(beat))
        if is_last:
            return None
        if store.check(["verdict"]) and (text := store.get("verdict")):
            return _parsed(text)
        now = time.monotonic()
        for rank, last in _read(store, list(self._heard)).items():
            before, _ = self._heard[rank]
            if before is None or before.number != last.number:
                self._heard[rank] = last, now
        heard = {rank: Heard(last, now - at) for rank, (last, at) in self._heard.items()} | {self._rank: Heard(beat, 0.0)}
        verdict = judge(dict(sorted(heard.items())), self._stall_s) if self._decides(heard[0]) else None
        if verdict is None:
            return None
        return _parsed(store.compare_set("verdict", "", json.dumps(verdict)))  # the first one counts

    def _connection(self) -> Store:
        if self._store is None:
            self._store = PrefixStore(self._prefix, _get_default_store().clone())
            if self._rank == 0:
                self._store.compare_set("verdict", "", "")
        return self._store

    def _decides(self, first: Heard) -> bool:
        """Whether this rank judges: rank 0, and the others when that one is silent or has left."""
        if self._rank == 0:
            return True
        return first.is_silent(self._stall_s) or (first.beat is not None and first.beat.phase in (LEFT, FAILED))

    def _wait_for_all(self, num_ranks: int) -> None:
        try:
            num_done = self._store.add("dumped", 1)
            while num_done < num_ranks:
                time.sleep(0.1)
                num_done = self._store.add("dumped", 0)
        except RuntimeError:  # rank 0, which holds the store, has left
            pass
        self.all_dumped.set()


def num_collectives() -> int:
    """Collectives that this process has begun so far, in all groups that train. From any thread."""
    groups = [group for group in list(_world.pg_map) if group.group_desc != BESIDE_TRAINING]
    return sum(group._get_sequence_number_for_group() for group in groups)


def _read(store: Store, ranks: list[int]) -> dict[int, Beat]:
    """The last beats of those of `ranks` that have sent one."""
    keys = [f"beat-{rank}" for rank in ranks]
    if not store.check(keys):  # reading an absent key waits for it
        ranks = [rank for rank, key in zip(ranks, keys, strict=True) if store.check([key])]
        keys = [f"beat-{rank}" for rank in ranks]
    values = store.multi_get(keys) if keys else []
    return {rank: Beat(*json.loads(value)) for rank, value in zip(ranks, values, strict=True)}


def _parsed(text: bytes) -> Verdict | None:
    return Verdict(*json.loads(text)) if text else None
