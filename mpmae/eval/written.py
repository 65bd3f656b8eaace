"""How values are written that hashes are made of."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any


def written(value: Any, later: Collection[str]) -> str:
    """A dataclass as its own repr gives it, without those of its fields `later` that are empty.

    So a hash made before there were such fields stays what it was, and with it features, runs and embeddings.
    """
    parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
    told = ", ".join(f"{name}={part!r}" for name, part in parts if part or name not in later)
    return f"{type(value).__qualname__}({told})"
