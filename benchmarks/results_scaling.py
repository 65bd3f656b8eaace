"""RESULTS.md's section on the scaling model and its plot, from a record of `benchmarks/scaling.py`."""

from itertools import groupby
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from page import machine, plt, svg

INK, FAINT = "#30343a", "#b4b8be"
MARKERS = {  # bottleneck: marker, colour
    "memory bandwidth": ("o", "#2563a8"),
    "compute": ("s", "#0f8a6d"),
    "loader": ("D", "#d98a29"),
    "gradient reduction": ("^", "#c0392b"),
    "parameter gather": ("v", "#8e44ad"),
    "latency": ("X", INK),
}
PLOTTED = ("mpmae_atto", "mpmae_tiny", "mpmae_base", "mpmae_huge")
COLUMNS = (1, 8, 64, 256, 1024)
SCALINGS = {"weak": "256 images a GPU and step", "strong": "4096 images a step"}
KEY = ("cluster", "scaling", "model")


def size_of(model: str) -> str:
    """A preset's short name."""
    return model.removeprefix("mpmae_")


def curves(points: list[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """The points by cluster, scaling and model, in their order."""
    return {key: list(group) for key, group in groupby(points, lambda point: tuple(point[name] for name in KEY))}


def short(number: float) -> str:
    """Three digits with k or M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def plot(record: dict[str, Any]) -> str:
    """SVG: predicted images/s a GPU over GPUs, a panel for each cluster and scaling, markers by bottleneck."""
    points = record["results"]["predictions"]
    clusters = list(dict.fromkeys(point["cluster"] for point in points))
    figure, panels = plt.subplots(len(clusters), 2, figsize=(9, 3.3 * len(clusters) + 0.6), sharex=True, sharey="row")
    shown = set()
    for (cluster, scaling, model), line in curves(points).items():
        if model not in PLOTTED:
            continue
        axes = panels[clusters.index(cluster)][list(SCALINGS).index(scaling)]
        fitting = [point for point in line if point["fits"]]
        rates = [point["images_per_s"] / point["num_gpus"] for point in fitting]
        axes.plot([point["num_gpus"] for point in fitting], rates, color=FAINT, lw=1.2, zorder=1)
        for point, rate in zip(fitting, rates, strict=True):
            marker, colour = MARKERS[point["bottleneck"]]
            axes.plot(point["num_gpus"], rate, marker=marker, color=colour, ms=5.5, mec="white", mew=0.6, zorder=2)
            shown.add(point["bottleneck"])
        axes.annotate(
            size_of(model), (fitting[0]["num_gpus"], rates[0]), (-9, 0), textcoords="offset points", ha="right", va="center",
            fontsize=9, color=INK,
        )  # fmt: skip
    for row, cluster in zip(panels, clusters, strict=True):
        for axes, (scaling, what) in zip(row, SCALINGS.items(), strict=True):
            axes.set_title(f"{cluster}\n{scaling} scaling: {what}", fontsize=9.5, loc="left", color=INK)
            axes.set(xscale="log", yscale="log", xlim=(0.33, 1500))
            axes.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axes.grid(axis="y", color="#e6e8eb", lw=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelbottom=True, labelleft=True, labelsize=8.5)
        row[0].set_ylabel("images/s a GPU", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("GPUs, 8 a node", fontsize=9)
    handles = [
        Line2D([], [], marker=marker, color=colour, ls="", ms=6, mec="white", label=name)
        for name, (marker, colour) in MARKERS.items()
        if name in shown
    ]
    figure.suptitle("A MODEL, not measured: the marker names what a step waits for most", fontsize=11, y=0.995, color=INK)
    figure.legend(
        handles=handles, ncols=len(handles), frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.972), fontsize=9
    )
    figure.tight_layout(rect=(0, 0, 1, 0.96), h_pad=1.6)
    return svg(figure)


def prediction_tables(points: list[dict[str, Any]]) -> list[str]:
    """Markdown: a table for each cluster and scaling, a row for each preset."""
    lines = []
    for (cluster, scaling), group in groupby(sorted(curves(points).items(), key=order_in(points)), lambda item: item[0][:2]):
        lines += [
            f"**A model**: {cluster}, {scaling} scaling ({SCALINGS[scaling]}).",
            "",
            f"| model | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in COLUMNS)} |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for (_, _, model), line in group:
            by_count = {point["num_gpus"]: point for point in line}
            lines.append(f"| {size_of(model)} | {' | '.join(cell(by_count[n]) for n in COLUMNS)} |")
        lines.append("")
    return lines


def order_in(points: list[dict[str, Any]]) -> Any:
    """A sort key that brings the tables together and leaves the models in order."""
    names = [list(dict.fromkeys(point[name] for point in points)) for name in KEY]
    return lambda item: tuple(known.index(value) for known, value in zip(names, item[0], strict=True))


def cell(point: dict[str, Any]) -> str:
    """images/s, efficiency, engine and bottleneck of a point, or that it does not fit."""
    if not point["fits"]:
        return f"does not fit: {point['memory_bytes']['total'] / 1e9:.0f} GB with {point['engine']}"
    rate, efficiency = short(point["images_per_s"]), f"{point['efficiency_percent']:.0f} %"
    return f"**{rate}**, {efficiency}, {point['engine']}: {point['bottleneck']}"


def link_table(results: dict[str, Any]) -> list[str]:
    """Markdown of the fitted links."""
    links = results["links"]
    lines = [
        "| collective | latency a hop, µs | MB/s | error, median / largest | at 4 ranks from 2 and 3 |",
        "|---|---|---|---|---|",
    ]
    for kind, link in links["links"].items():
        error, unseen = links["errors"][kind], links["held_out"].get(kind)
        held_out = f"{unseen['median_percent']:.0f} / {unseen['max_percent']:.0f} %" if unseen else "-"
        lines.append(
            f"| {kind.replace('_', '-')} | {1e6 * link['latency_s']:.0f} | {link['bytes_per_s'] / 1e6:,.0f} | "
            f"{error['median_percent']:.0f} / {error['max_percent']:.0f} % | {held_out} |"
        )
    return lines


def check_table(results: dict[str, Any]) -> list[str]:
    """Markdown of the checks."""
    lines = [
        "| case | measured s | predicted s, cores | error | predicted s, copies | error | of which collectives s |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in results["checks"]:
        measured, ways = entry["measured_s"], entry["predicted"]
        cells = [entry["name"], f"{measured['p20']:.3f} / **{measured['median']:.3f}** / {measured['p80']:.3f}"]
        for name in ("cores", "copies"):
            found = ways.get(name)
            cells += [f"{found['step_s']:.3f}", f"{found['error_percent']:+.0f} %"] if found else ["-", "-"]
        cells.append(f"{ways['cores']['collectives_s']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | left out: {reason} | | | | | |" for name, reason in results["left_out"].items()]
    return lines


def report(record: dict[str, Any]) -> str:
    """What the command prints: the fit, the check, and the first table of predictions."""
    results = record["results"]
    return "\n".join([*link_table(results), "", *check_table(results), "", *prediction_tables(results["predictions"])])


def section(record: dict[str, Any]) -> str:
    """Markdown of a scaling record."""
    case, results = record["case"], record["results"]
    given = results["assumptions"]
    made = f"{record['date'][:10]}, {machine(record)}. Made by `python benchmarks/scaling.py`."
    fit_batches = " and ".join(map(str, case["fit_batches"]))
    lines = [
        "## Scaling: a model, not a measurement",
        "",
        f"{made} **No GPU and no network took part**: what follows for clusters is computed from datasheets, from "
        "operations and bytes counted in the model (`mpmae.cost`), and from assumptions stated below. Only the small check "
        "at the end is measured, on the cores of one machine.",
        "",
        "![A model: images/s a GPU over the number of GPUs](plots/scaling.svg)",
        "",
        f"mpmae at {case['img_size']} px, patch {case['patch_size']}, mask ratio 0.6, bf16. A cell: images/s of all GPUs, "
        "efficiency (images/s a GPU, of those at the fewest GPUs that the model fits on), the simplest engine within 3 % of "
        "the fastest that fits, and what its step waits for most: compute, memory bandwidth (the optimizer's update "
        "included), gradient reduction, parameter gather, latency (of collectives, or of launching kernels), or the loader. "
        "Efficiency passes 100 % where an engine splits the update. Reading from shared storage is not counted. Weak "
        "scaling says nothing on how well so large a global batch trains.",
        "",
        *prediction_tables(results["predictions"]),
        *assumption_lines(given, results["loader"]),
        "",
        f"**What was measured** to check the same formulas: {case['num_cores']} cores, gloo over loopback, one thread a "
        "rank, synthetic batches, fp32. Links: alpha and beta fitted to all sizes and rank counts by relative error; past "
        "one rank a core everything takes as much longer.",
        "",
        *link_table(results),
        "",
        f"Steps: forward, backward and update fitted on one rank at micro batches {fit_batches}, checked at micro batch "
        f"{case['check_batch']} a rank over {case['steps']} steps, which no fit has seen. Cores: what a rank takes alone, "
        "times the ranks a core. Copies: times what ranks that do not talk to each other lose by sharing the machine. "
        "Collectives are not hidden behind computation here, for gloo works on the same cores.",
        "",
        *check_table(results),
        "",
        "The check can show that collectives of the right sizes are counted for each engine, and that compute and "
        "collectives add up. It cannot show overlap, a network, more than one node, NCCL, or a GPU's compute; at 4 ranks "
        "two share a core, which no cluster does.",
        "",
    ]
    return "\n".join(lines)


def assumption_lines(given: dict[str, Any], loader: dict[str, Any]) -> list[str]:
    """Markdown of what the predictions rest on."""
    lines = ["Assumed, from datasheets:", ""]
    lines += [
        "| cluster | bf16 TFLOP/s | fp32 | TB/s | GB | NVLink GB/s one way | network GB/s a node | cores a node |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cluster in given["clusters"]:
        gpu = cluster["gpu"]
        cells = (
            cluster["name"],
            f"{gpu['matrix_flops_per_s'] / 1e12:,.0f}",
            f"{gpu['vector_flops_per_s'] / 1e12:,.1f}",
            f"{gpu['bytes_per_s'] / 1e12:.2f}",
            f"{gpu['memory_bytes'] / 1e9:.0f}",
            f"{cluster['nvlink_bytes_per_s'] / 1e9:.0f}",
            f"{cluster['network_bytes_per_s'] / 1e9:g}",
            cluster["cores_per_node"],
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reached = ", ".join(f"{name} {100 * fraction:.0f} %" for name, fraction in given["reached_fraction"].items())
    hops = ", ".join(f"{name} {1e6 * seconds:g}" for name, seconds in given["hop_s"].items())
    lines += [
        "",
        f"Reached of these: {reached}. Of a collective beside computation {100 * given['overlap_fraction']:.0f} % costs "
        f"that nothing. Latency a hop, µs: {hops}; {1e6 * given['collective_launch_s']:g} to start a collective, "
        f"{1e6 * given['launch_s']:g} to launch a kernel ({given['launches_per_block']} a block, {given['other_launches']} "
        f"besides; no CUDA graph). Loader: {loader['images_per_core_s']:,.0f} images/s a core ({loader['case']}, record of "
        f"{loader['date'][:10]}), in proportion to the cores of a node and shared by its GPUs. Activations: "
        f"{given['activation_items']} numbers a site and channel.",
    ]
    return lines
