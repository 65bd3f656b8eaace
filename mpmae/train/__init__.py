"""The training loop and what it writes."""

from mpmae.train.demo_data import ensure_demo_shards
from mpmae.train.loop import dry_run, pretrain

__all__ = ["dry_run", "ensure_demo_shards", "pretrain"]
