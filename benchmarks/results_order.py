"""RESULTS.md's section on the order of samples, from a record of `benchmarks/order.py`."""

from typing import Any

from page import machine, plt, svg

TITLES = {"as built": "shards as built (globally shuffled)", "sorted": "shards sorted by class"}


def plot(record: dict[str, Any]) -> str:
    """SVG: distance of the batches' class shares from the set's by order, a panel for each way the classes lie."""
    mix, reference = record["results"]["mix"], "true permutation"
    names = list(mix["sorted"])
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.36 * len(names) + 1.1), sharey=True, layout="constrained")
    for axes, (key, title) in zip(panels, TITLES.items(), strict=True):
        values = [mix[key][name]["total_variation"] for name in names]
        colours = ["#8a8f98" if name.startswith(("true", "buffer")) else "#2563a8" for name in names]
        axes.barh(names, values, color=colours, height=0.6)
        for y, value in enumerate(values):
            axes.text(value, y, f"  {value:.3f}", va="center", fontsize=9)
        axes.axvline(mix[key][reference]["total_variation"], color="#d98a29", lw=1)
        axes.set_xlim(0, 1.1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("total variation distance, mean over batches")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return svg(figure)


def section(record: dict[str, Any]) -> str:
    """Markdown of an order record."""
    case, results = record["case"], record["results"]
    num_samples = case["num_shards"] * case["shard_size"]
    mix, again = results["mix"], results["met_again"]
    lines = [
        "## How well an order mixes, and what it costs",
        "",
        f"{num_samples:,} samples in {case['num_shards']} shards, {case['num_classes']} classes of equal share, batches of "
        f"{case['batch_size']}; {record['date'][:10]}, {machine(record)}. Made by `python benchmarks/order.py`, no pixels. "
        "How far the class shares of a batch are from the set's, means over an epoch's batches: total variation "
        "distance (0..1), Pearson's chi-square by its degrees of freedom (1 for a true permutation), distinct classes. "
        "A window of 1 shard is a shuffle within each shard; a buffer shuffles a stream of permuted shards. "
        "Met again: of the pairs that share a batch, those that share one in the next epoch too.",
        "",
        "![class mix of the batches by order](plots/order.svg)",
        "",
        "| order | as built: distance | chi-square | classes | sorted: distance | chi-square | classes | met again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, fraction in again.items():
        cells = [
            f"{row['total_variation']:.3f} | {row['chi_square']:,.2f} | {row['distinct_classes']:.1f}"
            for row in (mix[key][name] for key in TITLES)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * fraction:.2f} % |")
    lines += [
        "",
        f"From the manifest to the first batch of an epoch, median of {case['repeats']} fresh processes, largest memory:",
        "",
        "| order | read the manifest, s | order an epoch, s | added MB | peak MB of the process |",
        "|---|---|---|---|---|",
    ]
    windowed = f"window, {case['cost_window_shards']} shards"
    for mode, cost in results["cost"].items():
        seconds = f"{cost['manifest_s']['median']:.3f} | {cost['order_s']['median']:.3f}"
        memory = f"{cost['added_bytes'] / 1e6:.0f} | {cost['peak_bytes'] / 1e6:.0f}"
        lines.append(f"| {windowed if mode == 'window' else mode} | {seconds} | {memory} |")
    return "\n".join([*lines, ""])
