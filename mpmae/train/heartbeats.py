"""The last beat of every rank, shared through the rendezvous store, which answers while the ranks hang in a collective."""

import itertools
import json
from datetime import timedelta

from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store, _world

from mpmae.train.stalls import Beat, Verdict

_lives = itertools.count()  # a process may live through several runs, with the same store


class Heartbeats:
    """A connection to the store for one thread, besides the one that torch's collectives use.

    Methods raise RuntimeError when the store does not answer within `timeout_s`; the connection is then of no use any more.
    """

    def __init__(self, rank: int, timeout_s: float):
        self._rank = rank
        self._store = PrefixStore(f"watchdog-{next(_lives)}", _get_default_store().clone())
        self._store.set_timeout(timedelta(seconds=timeout_s))
        if rank == 0:
            self._store.set("verdict", "")

    def send(self, beat: Beat) -> None:
        """Replace this rank's beat."""
        self._store.set(f"beat-{self._rank}", json.dumps(beat))

    def read(self, ranks: list[int]) -> dict[int, Beat]:
        """The last beats of those of `ranks` that have sent one."""
        keys = [f"beat-{rank}" for rank in ranks]
        if not self._store.check(keys):  # reading an absent key waits for it
            ranks = [rank for rank, key in zip(ranks, keys, strict=True) if self._store.check([key])]
            keys = [f"beat-{rank}" for rank in ranks]
        values = self._store.multi_get(keys) if keys else []
        return {rank: Beat(*json.loads(value)) for rank, value in zip(ranks, values, strict=True)}

    def verdict(self) -> Verdict | None:
        """The verdict that some rank has pronounced."""
        if not self._store.check(["verdict"]):
            return None
        text = self._store.get("verdict").decode()
        return _parsed(text) if text else None

    def pronounce(self, verdict: Verdict) -> Verdict:
        """Make a verdict known to all ranks; the one that counts, which is the first."""
        return _parsed(self._store.compare_set("verdict", "", json.dumps(verdict)).decode())

    def count_done(self) -> int:
        """Count this rank among those that have acted on the verdict; how many there are."""
        return self._store.add("done", 1)

    def num_done(self) -> int:
        """How many ranks have acted on the verdict."""
        return self._store.add("done", 0)


def num_collectives() -> int:
    """Collectives that this process has begun so far, in all its groups. From any thread."""
    return sum(group._get_sequence_number_for_group() for group in list(_world.pg_map))


def _parsed(text: str) -> Verdict:
    culprits, *rest = json.loads(text)
    return Verdict(tuple(culprits), *rest)
