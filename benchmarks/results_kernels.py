"""RESULTS.md's section on the kernels alone, from a record of `benchmarks/kernels.py`."""

from typing import Any

from kernel_tables import best, speedup, verdict
from page import machine, plt, svg

GROUPS = (
    "depthwise forward",
    "depthwise input gradient",
    "depthwise weight gradient",
    "pointwise forward",
    "pointwise backward",
)
OTHER = {"color": "#8a8f98", "marker": "o", "ls": "", "ms": 4, "mec": "#33363b", "mew": 0.6}
GOAL = {"color": "#33363b", "lw": 1.6}
COLOURS = {"tiny": "#2563a8", "atto": "#d98a29", "base": "#5b8c5a"}
STAGES = ("s=8", "s=4", "s=2", "s=1")


def section(record: dict[str, Any]) -> str:
    """Markdown of a kernels record."""
    results = record["results"]
    copy, matrix = (rate["median"] for rate in results["rates"].values())
    device = results["device"]
    lines = [
        "## Each kernel alone",
        "",
        f"{record['date'][:10]}, {machine(record)}, driver {device['driver']}. Made by `benchmarks/gpu_suite.sh`; medians "
        f"of CUDA-graph replays, all ways in turns, bf16, mask ratio {record['case']['mask_ratio']}. Measured in the same "
        f"process: copy {copy / 1e9:,.0f} GB/s (read and written), bf16 products {matrix / 1e12:,.0f} TFLOP/s. The floor is "
        "the larger of the least bytes over the one and the least matrix operations over the other "
        "(`mpmae/cost/operators.py`); of copy, of matrix: what ours reaches of each rate by these counts.",
        "",
        "![fraction of the copy bandwidth by kernel](plots/gpu-kernels.svg)",
        "",
        "| case | floor ms | bound | ours | ms | of copy | of matrix | goal | best other | ms | x |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(entry) for entry in results["cases"] if entry["ways"]]
    failed = [f"- {e['name']}, {way}: {why}" for e in results["cases"] for way, why in e["failed"].items()]
    if failed:
        lines += ["", "Wrong, and so not timed:", "", *failed]
    missing = sorted({f"{way} ({why})" for e in results["cases"] for way, why in e["missing"].items()})
    if missing:
        lines += ["", f"Left out in some cases: {'; '.join(missing)}."]
    if results["not_reached"]:
        lines += ["", f"Not reached in the time given: {'; '.join(results['not_reached'])}."]
    return "\n".join([*lines, ""])


def row(entry: dict[str, Any]) -> str:
    """A line of the table: the best of ours and the best other way."""
    ours, other = best(entry, ours=True), best(entry, ours=False)
    cells = [entry["name"], f"{entry['floor_ms']:.3f}", entry["bound"]]
    if ours:
        way = entry["ways"][ours]
        fractions = [f"{100 * way[key]:.0f} %" for key in ("copy_fraction", "matrix_fraction")]
        cells += [ours, f"**{way['ms']['median']:.3f}**", *fractions, verdict(entry).replace(">", ", ") or "-"]
    else:
        cells += ["-"] * 5
    cells += [other, f"{entry['ways'][other]['ms']['median']:.3f}"] if other else ["-", "-"]
    cells.append(f"{speedup(entry):.1f}" if ours and other else "-")
    return f"| {' | '.join(cells)} |"


def plot(record: dict[str, Any]) -> str:
    """SVG: what the best of ours and the best other way reach of the floor, a panel for each operation."""
    by_name = {entry["name"]: entry for entry in record["results"]["cases"]}
    groups = [group for group in GROUPS if any(name.startswith(group) for name in by_name)]
    figure, panels = plt.subplots(1, len(groups), figsize=(3.1 * len(groups), 3.6), sharey=True, squeeze=False)
    for axes, group in zip(panels[0], groups, strict=True):
        for i, (size, colour) in enumerate(COLOURS.items()):
            for stage, name in enumerate(STAGES):
                entry = by_name.get(f"{group}, {size}, {name}")
                if entry is None or not entry["ways"]:
                    continue
                x = stage + (i - 1) * 0.27
                ours, other = (best(entry, kind) for kind in (True, False))
                if ours:
                    axes.bar(x, 100 * entry["ways"][ours]["floor_fraction"], 0.25, color=colour)
                    goal = next(iter(entry["goals"].values()), None)
                    if goal:
                        axes.plot([x - 0.13, x + 0.13], [100 * goal] * 2, **GOAL)
                if other:
                    axes.plot(x, 100 * entry["ways"][other]["floor_fraction"], **OTHER)
        axes.set_title(group, fontsize=10)
        axes.set_xticks(range(len(STAGES)), STAGES)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e5e8", lw=0.7)
        axes.set_axisbelow(True)
    panels[0][0].set_ylabel("% of the measured limit")
    panels[0][0].set_ylim(0, 100)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    handles += [plt.Line2D([], [], **style) for style in (GOAL, OTHER)]
    labels = [*(f"ours, {size}" for size in COLOURS), "goal", "best other way"]
    figure.legend(handles, labels, ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.98), fontsize=9)
    figure.tight_layout()
    return svg(figure)
