"""RESULTS.md's sections on a training step of a MultiMAE, from a record of `benchmarks/multimae_step.py`."""

from typing import Any

from multimae_cases import PARTS, PLAIN, REFERENCE, STEP
from page import machine

HEADS = {
    "cpu": ("## A training step of MultiMAE", "python benchmarks/multimae_step.py"),
    "cuda": ("## A training step of MultiMAE on a GPU", "benchmarks/gpu_suite.sh"),
}


def section(record: dict[str, Any]) -> str:
    """Markdown of a record made on a CPU."""
    results, case = record["results"], record["case"]
    ways, rates = results["ways"], results["product_flops_per_s"]
    flops = sum(results["flops_per_image"].values())
    products = ", ".join(f"{name} {rate['median'] / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
    lines = [
        *_head(record, "cpu", f"batches of {case['batch_size']}, {threads}, {case['rounds']} rounds, all ways in turns"),
        "",
        f"| way | images/s | {' | '.join(f'{part} ms' for part in STEP)} | of the rate of its products | faster |",
        "|---|---|" + "---|" * (len(STEP) + 2),
    ]
    for name, way in ways.items():
        parts = " | ".join(f"{way['ms'][part]['median']:.0f}" for part in STEP)
        share = flops * way["images_per_s"]["median"] / rates[way["precision"]]["median"]
        lines.append(f"| {name} | {_rate(way)} | {parts} | {100 * share:.0f} % | {_faster(way)} |")
    lines += [
        "",
        f"The rate of products, measured in each round, is that of the encoder's widest layer: {products}. {_goal(record)} "
        f"By the process's own time, without what else ran on the machine: {_cpu(record)}.",
        "",
        f"Forward by part, median ms, and each part's share of all {flops / 1e9:.1f} GFLOP an image (the heads "
        f"{_share(results, 'heads')} more):",
        "",
        f"| way | {' | '.join(f'{part}, {_share(results, part)}' for part in PARTS)} |",
        "|---|" + "---|" * len(PARTS),
    ]
    for name, way in ways.items():
        parts = " | ".join(f"{way['ms'][part]['median']:.0f}" for part in PARTS)
        lines.append(f"| {name} | {parts} |")
    plain = ways[PLAIN]["ms"]
    share = 100 * plain["embedding"]["median"] / plain["forward"]["median"]
    lines += [
        "",
        f"All tokens are embedded, then the visible ones picked: that is {share:.1f} % of the forward pass in float32. "
        "Embedding visible patches alone would need shapes that change with the tokens drawn, or one layer as wide as all "
        "domains together, which at a budget of a sixth of six domains' tokens is as much work again.",
        "",
        *_red(record),
    ]
    return "\n".join(lines)


def readme(record: dict[str, Any]) -> str:
    """README's sentence: what a configured step does beside the published code's way."""
    case, goal = record["case"], record["results"]["goal"]["way"]
    way, base = record["results"]["ways"][goal], record["results"]["ways"][REFERENCE]
    return (
        f"Measured on {case['threads']} CPU core ({case['model']}, {case['img_size']} px, batches of {case['batch_size']}): "
        f"{way['images_per_s']['median']:.1f} images/s in {goal}, **{way['speedup']['median']:.2f} x** the published code's "
        f"way of computing ({base['images_per_s']['median']:.1f}). No GPU figures yet.\n"
    )


def gpu_section(record: dict[str, Any]) -> str:
    """Markdown of a record made on a GPU."""
    lines = [
        *_head(record, "cuda", f"batches of {record['case']['batch_size']}, all ways in turns"),
        "",
        "| way | images/s | ms | faster |",
        "|---|---|---|---|",
    ]
    for name, way in record["results"]["ways"].items():
        lines.append(f"| {name} | {_rate(way)} | {way['ms']['step']['median']:.1f} | {_faster(way)} |")
    return "\n".join([*lines, "", _goal(record), "", *_red(record)])


def _head(record: dict[str, Any], device: str, how: str) -> list[str]:
    title, command = HEADS[device]
    case = record["case"]
    return [
        title,
        "",
        f"{case['model']}, {case['img_size']} px, patch {case['patch_size']}, the published domains and budget; forward, "
        f"backward, gradient norm and AdamW on synthetic input, {how}; {record['date'][:10]}, {machine(record)}. Made by "
        f"`{command}`. {REFERENCE.capitalize()}: its way of computing, built of this project's parts "
        "([what it does](multimae_cases.py)); all ways have the same weights and give the same loss, it and ours in float32 "
        "to float32's rounding. p20 / median / p80; faster: ratio to the published code's step"
        + (" of the same round." if device == "cpu" else "."),
    ]


def _goal(record: dict[str, Any]) -> str:
    goal = record["results"]["goal"]
    way = record["results"]["ways"].get(goal["way"])
    if way is None:
        return ""
    reached = way["speedup"]["median"]
    outcome = "reached" if reached >= goal["least"] else "missed"
    return f"Goal, {goal['way']}: {reached:.2f} x of at least {goal['least']:g} x, {outcome}."


def _cpu(record: dict[str, Any]) -> str:
    ways = record["results"]["ways"]
    return ", ".join(f"{name} {way['cpu_speedup']['median']:.2f} x" for name, way in ways.items() if name != REFERENCE)


def _rate(way: dict[str, Any]) -> str:
    rate = way["images_per_s"]
    return f"{rate['p20']:.2f} / **{rate['median']:.2f}** / {rate['p80']:.2f}"


def _faster(way: dict[str, Any]) -> str:
    faster = way["speedup"]
    return f"{faster['p20']:.2f} / **{faster['median']:.2f}** / {faster['p80']:.2f}"


def _share(results: dict[str, Any], part: str) -> str:
    flops = results["flops_per_image"]
    return f"{100 * flops[part] / sum(flops.values()):.1f} %"


def _red(record: dict[str, Any]) -> list[str]:
    failed = record["results"]["failed"]
    return ["Red, and so not timed:", "", *(f"- {name}: {why}" for name, why in failed.items()), ""] if failed else []
