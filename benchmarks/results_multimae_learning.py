"""RESULTS.md's section on what a MultiMAE learns on real tiles, from a record of `benchmarks/multimae_learning.py`."""

from typing import Any

from page import machine, plt, svg

from mpmae.domains import title_of

COLUMNS = 4
TRAINING, VALIDATION, TRIVIAL = "#b9a27c", "#2563a8", "#8a8f98"


def section(record: dict[str, Any]) -> str:
    """Markdown: losses of every target at the first and the last validation, beside the trivial predictor's."""
    case, results = record["case"], record["results"]
    first, last = results["steps"][0], results["steps"][-1]
    lines = [
        "## MultiMAE on real tiles",
        "",
        f"{record['date'][:10]}, {machine(record)}. Made by `python benchmarks/multimae_learning.py`: {case['model']} "
        f"from random weights, {case['steps']} steps of {case['batch_size']} tiles of {case['tiles']}. Loss of each target "
        f"on the validation split after {first} and {last} steps, and that of a predictor that knows only means and class "
        "frequencies.",
        "",
        f"| target | after {first} steps | after {last} steps | trivial | in training, at the end |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["targets"].items():
        start, end = row["validation"][0], row["validation"][-1]
        lines.append(f"| {name} | {start:.3f} | {end:.3f} | {row['trivial']:.3f} | {row['training'][-1]:.3f} |")
    behind = [name for name, row in results["targets"].items() if row["validation"][-1] >= row["trivial"]]
    lines += ["", f"Not below the trivial predictor at the end: {', '.join(behind)}."] if behind else []
    return "\n".join([*lines, "", "![losses by target](plots/multimae-learning.svg)", ""])


def plot(record: dict[str, Any]) -> str:
    """SVG: a small chart for each target."""
    results = record["results"]
    steps, targets = results["steps"], results["targets"]
    num_rows = -(-len(targets) // COLUMNS)
    figure, grid = plt.subplots(num_rows, COLUMNS, figsize=(2.6 * COLUMNS, 2.1 * num_rows), sharex=True, squeeze=False)
    for axes in grid.flat[len(targets) :]:
        axes.axis("off")
    for axes, (name, row) in zip(grid.flat, targets.items(), strict=False):
        axes.axhline(row["trivial"], color=TRIVIAL, linestyle=":", label="trivial")
        axes.plot(steps, row["training"], color=TRAINING, label="training")
        axes.plot(steps, row["validation"], color=VALIDATION, label="validation")
        axes.set_title(title_of(name), fontsize=9)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", frameon=False, fontsize=9)
    figure.supxlabel("step", fontsize=9)
    figure.tight_layout()
    return svg(figure)
