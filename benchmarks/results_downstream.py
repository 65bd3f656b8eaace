"""RESULTS.md's section on what pretrained features are good for, from a record of `benchmarks/downstream.py`."""

import textwrap
from typing import Any

from page import machine, plt, svg

from mpmae.eval.tables import Table, markdown

COLOURS = {
    "random init": "#8a8f98",
    "image statistics": "#b9a27c",
    "random convolutions": "#d98a29",
    "pretrained, Sentinel-2 only": "#6ea3d8",
    "pretrained, all maps": "#2563a8",
    "pretrained, all modalities": "#7a4fa3",
}
VERDICT = (
    "What this can show: 270 images and a few hundred tiles of 25 places say whether features move in the right "
    "direction, not how good a model is. Read the gain beside its interval: one that holds 0 says nothing either way. "
    "Pretraining on Sentinel-2 alone beats the same encoder with random weights with 20 nearest neighbours, and not "
    "measurably otherwise; statistics of the bands and random convolutions beat both, as ten classes told by their "
    "colours let them. With all modalities the same number of steps does not beat random weights. Why, by the losses: "
    "Sentinel-2, the one modality that all tiles have and that transfers, is learnt half as far in the same steps, "
    "while targets that few tiles or places have (land cover, biome, eco-region, latitude) end far lower in training "
    "than in validation: they are learnt by heart. Without the targets of whole tiles (all maps) it is the same, so "
    "those alone are not the reason. Sentinel-2 alone goes through the same low: below, its neighbours are worse than "
    "random ones until its loss has fallen further than all modalities bring it in these steps."
)


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
        *loss_table(results["losses"]),
        "",
        *textwrap.wrap(VERDICT, 125),
        "",
    ]
    return "\n".join(lines)


def loss_table(losses: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Markdown: training and validation losses at the end of pretraining, by modality and variant."""
    lines = ["Losses at the end of pretraining, training / validation (trivial predictor), mean of the seeds:", ""]
    lines += [f"| modality | {' | '.join(losses)} |", "|---" * (1 + len(losses)) + "|"]
    for name in dict.fromkeys(name for names in losses.values() for name in names):
        cells = []
        for names in losses.values():
            row = names.get(name)
            cells.append(f"{row['training']:.2f} / {row['validation']:.2f} ({row['trivial']:.2f})" if row else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def curve_section(record: dict[str, Any]) -> str:
    """Markdown of a downstream curve record."""
    case, results = record["case"], record["results"]
    methods = list(results["random_init"])
    lines = [
        "### Features in the course of pretraining",
        "",
        f"Sentinel-2 only, first seed, {case['steps']} steps, otherwise as above; {record['date'][:10]}, {machine(record)}. "
        "Made by `python benchmarks/downstream_curve.py`. Accuracy in percent, mean of the folds.",
        "",
        f"| step | validation loss of Sentinel-2 | {' | '.join(methods)} |",
        "|---" * (2 + len(methods)) + "|",
        f"| random init | – | {_cells(results['random_init'], methods)} |",
    ]
    lines += [
        f"| {point['step']} | {point['sentinel2_loss']:.2f} | {_cells(point['accuracy'], methods)} |"
        for point in results["points"]
    ]
    return "\n".join([*lines, ""])


def _cells(accuracy: dict[str, float], methods: list[str]) -> str:
    return " | ".join(f"{100 * accuracy[method]:.1f}" for method in methods)


def readme(record: dict[str, Any]) -> str:
    """README's sentence: kNN and linear accuracy of the pretrained encoders beside random weights."""
    rows = record["results"]["rows"]
    methods = [method for method in ("knn-20", "lbfgs") if any(row["method"] == method for row in rows)]
    said = []
    for method in methods:
        found = {row["encoder"]: row for row in rows if row["method"] == method}
        parts = [f"{100 * row['mean']:.1f} % {encoder}" for encoder, row in found.items() if encoder in COLOURS]
        said.append(f"{method}: {', '.join(parts)}")
    case = record["case"]
    return (
        f"Measured on {case['labelled'].removesuffix('.h5')} ({case['folds']} folds, {case['seeds']} seeds, "
        f"{case['steps']} steps of pretraining on a few hundred real tiles): {'; '.join(said)}. "
        "[Intervals, and what so little data can show](benchmarks/RESULTS.md)."
    )
