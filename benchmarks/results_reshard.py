"""The section of RESULTS.md on resharding."""

from typing import Any

from page import machine, plt, svg

COLOURS = {"h5py": "#8a8f98", "inflate": "#d98a29", "build": "#2563a8"}


def section(record: dict[str, Any]) -> str:
    """Markdown of a reshard record."""
    case, results = record["case"], record["results"]
    table = results["chunk_table"]
    lines = [
        "## Resharding",
        "",
        f"{record['date'][:10]}, {machine(record)}. Made by `python benchmarks/reshard.py`; real tiles repeated to "
        f"{case['megabytes']:.0f} MB of HDF5, {case['source']}, page cache {case['page cache']}; medians over "
        f"{case['rounds']} rounds, all ways alternating in one process. Per core used: tiles per CPU second. `build` reads "
        "an absent modality's chunk, the same bytes for every tile, without inflating it again; inflate alone does not.",
        "",
        "![tiles per CPU second](plots/reshard.svg)",
        "",
    ]
    for name, source in results["sources"].items():
        kilobytes = [source[key] / 1e3 for key in ("raw_bytes_per_tile", "source_bytes_per_tile")]
        ratios = ", ".join(f"{what} {ratio:.2f}" for what, ratio in source["ratios"].items())
        lines += [
            f"**{name}**, {source['tile_size_px']} px, {source['num_tiles']:,} tiles of {kilobytes[0]:.0f} KB raw, "
            f"{kilobytes[1]:.0f} KB in HDF5. Ratios per core used, build with lz4 and one worker: {ratios}. The last is the "
            "most that any build could gain on the row-by-row way, by doing nothing but inflate.",
            "",
            "| way | tiles/s | per core used | raw MB/s per core |",
            "|---|---|---|---|",
        ]
        for way, rates in source["ways"].items():
            per_core = rates["tiles_per_cpu_s"]["median"]
            megabytes = per_core * source["raw_bytes_per_tile"] / 1e6
            lines.append(f"| {way} | {rates['tiles_per_s']['median']:,.0f} | {per_core:,.0f} | {megabytes:,.0f} |")
        steps = ", ".join(f"{step} {micros:,.0f}" for step, micros in source["cpu_us_per_tile"].items())
        lines += ["", f"Where the time of an lz4 build goes, CPU µs a tile: {steps}.", ""]
    lines += [
        f"Taking the chunk addresses of a dataset: {table['us_per_chunk']:.1f} µs and {table['bytes_per_chunk']} bytes a "
        f"chunk (measured at {table['num_chunks']:,} chunks).",
        "",
    ]
    return "\n".join(lines)


def plot(record: dict[str, Any]) -> str:
    """SVG: tiles per CPU second of every way, a panel a source."""
    sources = record["results"]["sources"]
    figure, panels = plt.subplots(1, len(sources), figsize=(4.5 * len(sources) + 1, 3.6), sharey=True, squeeze=False)
    for axes, (name, source) in zip(panels[0], sources.items(), strict=True):
        rates = {way: result["tiles_per_cpu_s"] for way, result in source["ways"].items()}
        medians = [rate["median"] for rate in rates.values()]
        spreads = [
            [rate["median"] - rate["p20"] for rate in rates.values()],
            [rate["p80"] - rate["median"] for rate in rates.values()],
        ]
        colours = [COLOURS[way.split()[0]] for way in rates]
        axes.barh(list(rates), medians, xerr=spreads, color=colours, height=0.65, ecolor="#33363b")
        axes.set_title(f"{name}, {source['tile_size_px']} px", fontsize=10)
        axes.set_xlabel("tiles per CPU second")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    return svg(figure)
