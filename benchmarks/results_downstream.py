"""RESULTS.md's section on what pretrained features are good for, from a record of `benchmarks/downstream.py`."""

from typing import Any

from page import machine, plt, svg

from mpmae.eval.tables import Table, markdown

COLOURS = {
    "random init": "#8a8f98",
    "image statistics": "#b9a27c",
    "random convolutions": "#d98a29",
    "pretrained, Sentinel-2 only": "#6ea3d8",
    "pretrained, all modalities": "#2563a8",
}


def plot(record: dict[str, Any]) -> str:
    """SVG: accuracy by method, one dot an encoder with its 95 % interval over seeds; small dots are single seeds."""
    rows = record["results"]["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.9 * len(methods)))
    for number, encoder in enumerate(encoders):
        for y, method in enumerate(methods):
            row = next(row for row in rows if (row["encoder"], row["method"]) == (encoder, method))
            height = y + 0.14 * (number - (len(encoders) - 1) / 2)
            colour = COLOURS.get(encoder, "#444444")
            if len(row["values"]) > 1:
                axes.plot([100 * row["low"], 100 * row["high"]], [height, height], color=colour, linewidth=2, alpha=0.5)
            axes.plot([100 * v for v in row["values"]], [height] * len(row["values"]), ".", color=colour, markersize=3)
            axes.plot(100 * row["mean"], height, "o", color=colour, markersize=6, label=encoder if y == 0 else None)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel(f"{rows[0]['metric']} on held-out images, %")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=2, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    return svg(figure)


def section(record: dict[str, Any]) -> str:
    """Markdown of a downstream record."""
    case, results = record["case"], record["results"]
    table = results["table"]
    text = markdown(Table(tuple(table["header"]), tuple(map(tuple, table["rows"])), tuple(table["notes"])))
    commits = ", ".join(commit[:10] for commit in results["pretraining_commits"])
    lines = [
        "## What pretraining is good for",
        "",
        f"{case['model']}, pretrained for {case['steps']} steps of {case['batch_size']} images at a peak rate of "
        f"{case['peak_lr']:g} on the training tiles of `{case['tiles']}`, once a seed; then frozen, and its features of "
        f"`{case['labelled']}` classified in {case['folds']} folds. {record['date'][:10]}, {machine(record)}; "
        f"pretraining at commit {commits}. Made by `python benchmarks/downstream.py`. All encoders see the same bands with "
        "the same statistics; settings (strength of the penalty) are chosen on a validation part of each training fold.",
        "",
        "![accuracy by method and encoder](plots/downstream.svg)",
        "",
        text,
    ]
    return "\n".join(lines)
