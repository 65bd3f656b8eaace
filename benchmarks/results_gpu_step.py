"""RESULTS.md's section on training steps on a GPU, from a record of `benchmarks/gpu_step.py`."""

from itertools import pairwise
from typing import Any

from page import machine, plt, svg

COLOURS = {"sparse": "#2563a8", "dense": "#8a8f98"}
LABELS = {"sparse": "sparse", "dense": "dense grid, masked"}


def entries(record: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The measurements of a kind that have both sides."""
    return [e for e in record["results"]["cases"] if e["kind"] == kind and e["speedup"]]


def section(record: dict[str, Any]) -> str:
    """Markdown of a step record."""
    results, case = record["results"], record["case"]
    lines = [
        "## A training step on a GPU",
        "",
        f"{record['date'][:10]}, {machine(record)}, driver {results['device']['driver']}. Made by "
        f"`benchmarks/gpu_suite.sh`: forward, backward and {case['optimizer']}, {case['precision']}, {case['modalities']} "
        f"modalities, synthetic input, mask ratio {case['mask_ratio']}. Beside it the dense grid with everything hidden set "
        "to 0 after each operator, compiled; the same weights and the same loss. Of each side its fastest way; medians, all "
        "ways in turns. Memory: weights, gradients, optimizer state and activations.",
        "",
        "![images/s of a step, and the encoder over mask ratios](plots/gpu-step.svg)",
        "",
        "| step | sparse: way | ms | images/s | GiB | dense: way | ms | images/s | GiB | faster | of its memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(entry) for entry in entries(record, "step")),
        "",
        *goals(record),
    ]
    if entries(record, "block"):
        lines += [
            "",
            "One block, forward and backward:",
            "",
            "| block | sparse ms | dense ms | faster |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {e['name']} | {median(e, 'sparse'):.3f} | {median(e, 'dense'):.3f} | {e['speedup']:.2f} x |"
            for e in entries(record, "block")
        ]
    for name, points in curves(record).items():
        lines += ["", f"Forward and backward of the encoder, {name}: the sparse one {outcome(crossover(points))}."]
    failed = [f"- {e['kind']} {e['name']}, {way}: {why}" for e in results["cases"] for way, why in e["failed"].items()]
    if failed:
        lines += ["", "Red, and so not timed:", "", *failed]
    left_out = [f"{e['kind']} {e['name']}, {way}: {why}" for e in results["cases"] for way, why in e["missing"].items()]
    if left_out:
        lines += ["", f"Left out: {'; '.join(left_out)}."]
    if results["not_reached"]:
        lines += ["", f"Not reached in the time given: {'; '.join(results['not_reached'])}."]
    return "\n".join([*lines, ""])


def median(entry: dict[str, Any], side: str) -> float:
    """Milliseconds of the fastest way of a side."""
    return entry["ways"][entry["best"][side]]["ms"]["median"]


def row(entry: dict[str, Any]) -> str:
    """A line of the table of steps."""
    cells = [entry["name"]]
    for side in ("sparse", "dense"):
        name = entry["best"][side]
        peaks = [way["peak_bytes"] for way in entry["ways"].values() if way["side"] == side and way["peak_bytes"]]
        memory = f"{min(peaks) / 2**30:.1f}" if peaks else "-"
        rate = entry["ways"][name]["images_per_s"]
        cells += [name, f"{median(entry, side):.1f}", f"**{rate:,.0f}**" if side == "sparse" else f"{rate:,.0f}", memory]
    ratio = f"{entry['memory_ratio']:.2f}" if entry["memory_ratio"] else "-"
    cells += [f"{entry['speedup']:.2f} x", ratio]
    return f"| {' | '.join(cells)} |"


def goals(record: dict[str, Any]) -> list[str]:
    """A line for each goal and how it stands."""
    wanted = record["results"]["goals"]
    steps = {entry["name"]: entry for entry in entries(record, "step")}
    lines = []
    for name, entry in steps.items():
        if not name.startswith(("atto", "tiny")):
            continue
        fast, small = entry["speedup"], entry["memory_ratio"]
        words = [f"{name}: {fast:.2f} x of at least {wanted['speedup']:g} x, {_met(fast >= wanted['speedup'])}"]
        if small:
            words.append(
                f"memory {small:.2f} of at most {wanted['memory_ratio']:g}, {_met(small <= wanted['memory_ratio'])}"
            )
        lines.append("; ".join(words))
    for name, least in wanted["images_per_s"].items():
        if name in steps:
            rate = steps[name]["ways"][steps[name]["best"]["sparse"]]["images_per_s"]
            lines.append(f"{name}: {rate:,.0f} images/s of at least {least:,}, {_met(rate >= least)}")
    return [f"- Goal, {line}." for line in lines]


def _met(is_met: bool) -> str:
    return "reached" if is_met else "missed"


def curves(record: dict[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """By model, (mask ratio, sparse ms, dense ms) of the encoder in ascending order of the ratio."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for entry in entries(record, "encoder"):
        name = entry["name"].rsplit(", mask ratio", 1)[0]
        found.setdefault(name, []).append((entry["mask_ratio"], median(entry, "sparse"), median(entry, "dense")))
    return {name: sorted(points) for name, points in found.items()}


def crossover(points: list[tuple[float, float, float]]) -> float | None:
    """The mask ratio from which on sparse is faster, by linear interpolation; None when it is so everywhere."""
    at = None
    for (r0, s0, d0), (r1, s1, d1) in pairwise(points):
        if s0 > d0 and s1 <= d1:
            at = r0 + (r1 - r0) * (s0 - d0) / ((s0 - d0) - (s1 - d1))
    last = points[-1]
    return float("inf") if last[1] > last[2] else at


def outcome(at: float | None) -> str:
    """A crossover in words."""
    if at is None:
        return "is faster at every mask ratio measured"
    return "is slower at the highest mask ratio measured" if at > 1 else f"is faster from a mask ratio of {at:.2f} on"


def plot(record: dict[str, Any]) -> str:
    """SVG: images/s of the steps, and milliseconds of the encoder by mask ratio with the crossing marked."""
    steps, by_ratio = entries(record, "step"), curves(record)
    height = max(3.2, 0.42 * len(steps) + 1.2)
    figure, panels = plt.subplots(1, 1 + len(by_ratio), figsize=(6.2 + 3.6 * len(by_ratio), height), squeeze=False)
    axes = panels[0][0]
    speedups = [entry["speedup"] for entry in steps]
    axes.barh([entry["name"] for entry in steps], speedups, 0.6, color=COLOURS["sparse"])
    for i, entry in enumerate(steps):
        ours, others = (entry["ways"][entry["best"][side]]["images_per_s"] for side in COLOURS)
        axes.text(entry["speedup"], i, f"  {ours:,.0f} against {others:,.0f}", va="center", fontsize=8)
    for x, colour, words in ((1, COLOURS["dense"], "dense"), (record["results"]["goals"]["speedup"], "#33363b", "goal")):
        axes.axvline(x, color=colour, lw=1.2)
        axes.text(x, -0.6, words, color=colour, ha="center", va="bottom", fontsize=9)
    axes.set_xlim(0, 1.6 * max([3, *speedups]))
    axes.set_xlabel("images/s of a training step over those of the dense grid, masked")
    axes.set_ylim(len(steps) - 0.4, -0.6)
    for axes, (name, points) in zip(panels[0][1:], by_ratio.items(), strict=True):
        ratios, sparse, dense = zip(*points, strict=True)
        for side, values in (("sparse", sparse), ("dense", dense)):
            axes.plot(ratios, values, "o-", color=COLOURS[side], ms=4, label=LABELS[side])
        axes.legend(frameon=False, fontsize=9, loc="lower left")
        at = crossover(points)
        if at is not None and at < 1:
            axes.axvline(at, color="#d98a29", lw=1)
            axes.text(at, axes.get_ylim()[1], f" sparse wins from {at:.2f}", color="#d98a29", fontsize=9, va="top")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("mask ratio")
        axes.set_ylabel("ms, encoder forward + backward")
        axes.set_title(name, fontsize=10)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return svg(figure)


def readme_sentence(records: list[dict[str, Any]]) -> str:
    """What README.md says of a GPU, from all records of this kind."""
    steps = (
        [entry for entry in entries(records[-1], "step") if entry["name"] == "atto, 112/16, batch 1024"] if records else []
    )
    if not steps:
        return "No GPU figures yet."
    rate = steps[0]["ways"][steps[0]["best"]["sparse"]]["images_per_s"]
    return (
        f"On one {records[-1]['environment']['gpu']} (112 px, patches of 16, synthetic input): **{rate:,.0f} images/s**, "
        f"{steps[0]['speedup']:.1f} times the dense grid with masking."
    )
