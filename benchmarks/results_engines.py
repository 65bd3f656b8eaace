"""RESULTS.md's section on the engines, from a record of `benchmarks/engines.py`."""

from typing import Any

from page import machine

RANKS = (1, 2)
BASE = "ddp"


def table(results: dict[str, Any]) -> list[str]:
    """Markdown: a row for each size and engine, images/s and memory at one and two ranks."""
    titles = [f"images/s, {n} rank{'s' * (n > 1)} | of {BASE} | peak GB a rank" for n in RANKS]
    lines = [f"| model | engine | images a rank | {' | '.join(titles)} |", "|---" * (3 + 3 * len(RANKS)) + "|"]
    rows: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for case in results["cases"].values():
        key = case["model"], case["engine"], case["micro_batch"], case["activation_checkpointing"]
        rows.setdefault(key, {})[case["num_ranks"]] = case
    for (model, engine, micro_batch, checkpointing), by_ranks in rows.items():
        cells = [model, engine + ", activation checkpointing" * checkpointing, str(micro_batch)]
        base = rows.get((model, BASE, micro_batch, False), {})
        for n in RANKS:
            cells += numbers(by_ranks.get(n), base.get(n))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def numbers(case: dict[str, Any] | None, base: dict[str, Any] | None) -> list[str]:
    """images/s, their ratio to the base's, and peak memory."""
    if case is None:
        return ["-"] * 3
    rate = case["images_per_s"]
    ratio = f"{rate['median'] / base['images_per_s']['median']:.2f}" if base else "-"
    memory = f"{case['memory_bytes']['peak'] / 1e9:.2f}"
    return [f"{rate['p20']:.2f} / **{rate['median']:.2f}** / {rate['p80']:.2f}", ratio, memory]


def section(record: dict[str, Any]) -> str:
    """Markdown of an engines record."""
    case, results = record["case"], record["results"]
    before = max(entry["memory_bytes"]["before"] for entry in results["cases"].values())
    lines = [
        "## Engines side by side",
        "",
        f"mpmae at {case['img_size']} px, patch {case['patch_size']}, {case['precision']}, synthetic batches, "
        f"{case['threads_per_rank']} thread a rank, gloo; {record['date'][:10]}, {machine(record)}. Made by "
        f"`python benchmarks/engines.py`: every case a fresh group of processes, in turns; p20 / median / p80 over its "
        f"steps. Peak GB: of the timed steps, over the {before / 1e9:.1f} GB that a process holds before it "
        "makes a model. An activation-checkpointing row stands beside the same case without.",
        "",
        *table(results),
        "",
        "Read it for memory: moments (zero1), gradients (zero2) and weights (zero3, fsdp) are split over two ranks here, "
        "over far more on a cluster. The speeds are of two cores with all links in memory, and of micro batches so small "
        "that collectives and updates weigh more than in training: they rank the engines on such a machine and no other.",
        "",
    ]
    lines += [f"Left out: {name} ({reason})." for name, reason in results["left_out"].items()]
    return "\n".join([*lines, ""] if results["left_out"] else lines)
