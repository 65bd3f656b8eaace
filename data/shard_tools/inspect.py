"""What a shard set holds, from its manifest and indices alone: modalities, sizes, splits."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mpmae.shard_format import SCALARS_MEMBER
from mpmae.shard_tools.progress import MB
from mpmae.shard_tools.shard_set import ShardSet


@dataclass(frozen=True)
class MemberSummary:
    """A modality of the set. Bytes are means per sample, None for the tile modalities, which share one member."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    present_fraction: float
    member_bytes: float | None
    raw_bytes: int


@dataclass(frozen=True)
class SplitSummary:
    """A split of the set."""

    name: str
    num_shards: int
    num_samples: int
    num_bytes: int


@dataclass(frozen=True)
class SetSummary:
    """A shard set at a glance; `scalars_bytes` is the size of the member that holds the tile modalities."""

    folder: Path
    source: str
    tile_size_px: int
    seed: int
    fingerprint: str
    members: tuple[MemberSummary, ...]
    scalars_bytes: int
    splits: tuple[SplitSummary, ...]


def summarise(shards_dir: str | Path) -> SetSummary:
    """The summary of a shard set; ShardError without a readable manifest and indices."""
    shard_set = ShardSet(shards_dir)
    manifest = shard_set.manifest
    indices = [shard_set.index(shard) for shards in manifest.splits.values() for shard in shards]
    rows = np.concatenate(indices) if indices else np.zeros(0, manifest.index_dtype)
    num_rows = max(len(rows), 1)
    members = []
    for i, entry in enumerate((*manifest.pixels, *manifest.scalars)):
        is_pixel = i < len(manifest.pixels)
        shape = entry.shape if is_pixel else (entry.length,)
        members.append(
            MemberSummary(
                name=entry.name,
                dtype=np.dtype(entry.dtype).name,
                shape=shape,
                codec=f"{entry.codec}, {entry.filter}" if is_pixel else f"in {SCALARS_MEMBER}, {entry.encoding}",
                present_fraction=float((rows["presence"] >> np.uint64(i) & np.uint64(1)).sum()) / num_rows,
                member_bytes=float(rows["size"][:, i].sum()) / num_rows if is_pixel else None,
                raw_bytes=int(np.prod(shape)) * np.dtype(entry.dtype).itemsize,
            )
        )
    splits = tuple(
        SplitSummary(name, len(shards), sum(s.num_samples for s in shards), sum(s.num_bytes for s in shards))
        for name, shards in manifest.splits.items()
    )
    return SetSummary(
        folder=Path(shards_dir),
        source=manifest.source.name,
        tile_size_px=manifest.tile_size_px,
        seed=manifest.seed,
        fingerprint=manifest.fingerprint,
        members=tuple(members),
        scalars_bytes=manifest.scalars_dtype.itemsize,
        splits=splits,
    )


def print_summary(summary: SetSummary, console: Console) -> None:
    """Print the summary as two tables."""
    table = Table(title=f"{summary.folder}: {summary.source}, {summary.tile_size_px} px", title_justify="left")
    for column, justify in (
        ("modality", "left"),
        ("dtype", "left"),
        ("shape", "left"),
        ("codec", "left"),
        ("tiles present", "right"),
        ("mean bytes", "right"),
        ("of raw", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for m in summary.members:
        shape = " x ".join(map(str, m.shape))
        sizes = (
            ("", "") if m.member_bytes is None else (f"{m.member_bytes:,.0f}", f"{100 * m.member_bytes / m.raw_bytes:.1f} %")
        )
        table.add_row(m.name, m.dtype, shape, m.codec, f"{100 * m.present_fraction:.1f} %", *sizes)
    pixels = [m for m in summary.members if m.member_bytes is not None]
    scalars_raw = sum(m.raw_bytes for m in summary.members if m.member_bytes is None)
    table.add_row(
        SCALARS_MEMBER,
        "",
        "",
        "raw",
        "",
        f"{summary.scalars_bytes:,}",
        f"{100 * summary.scalars_bytes / max(scalars_raw, 1):.1f} %",
    )
    stored = sum(m.member_bytes for m in pixels) + summary.scalars_bytes
    raw = sum(m.raw_bytes for m in summary.members)
    table.add_section()
    table.add_row("sample", "", "", "", "", f"{stored:,.0f}", f"{100 * stored / raw:.1f} %")
    console.print(table)

    table = Table()
    for column in ("split", "shards", "samples", "MB"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in summary.splits:
        table.add_row(split.name, f"{split.num_shards:,}", f"{split.num_samples:,}", f"{split.num_bytes / MB:,.1f}")
    console.print(table)
    console.print(f"written with seed {summary.seed}, fingerprint {summary.fingerprint[:16]}", highlight=False)
