"""The loader's section of RESULTS.md and its plot, from a record of `loader.py`."""

from typing import Any

from page import machine, plt, svg

OURS, PEERS = ("#2563a8", "#6ea3d8"), ("#6b7078", "#b4b8be")  # most workers, fewer
INK = "#30343a"
DEFAULT = "mpmae cpu, lz4"
LIMITS = {  # key of the record: what it is
    "copy GB/s": "copying memory",
    "copy of a sample's tensors, tiles/s": "copying a sample's tensors once",
    "write to fresh memory, tiles/s": "writing a sample's tensors to newly allocated memory",
    "pread lz4, tiles/s": "reading an lz4 sample, one `pread` each, random order",
    "pread raw, tiles/s": "reading a raw sample, one `pread` each, random order",
    "LZ4 inflate GB/s": "inflating LZ4, bytes inflated",
    "LZ4 inflate, tiles/s": "inflating a sample's LZ4 members",
}


def plot(record: dict[str, Any]) -> str:
    """SVG: samples/s by case at each number of workers, fastest first, ours in blue."""
    cases = record["results"]["cases"]
    most = max(int(key) for case in cases.values() for key in case["samples_per_s"])
    by_rate = sorted(cases, key=lambda name: -cases[name]["samples_per_s"][str(most)]["median"])
    counts = sorted({int(key) for case in cases.values() for key in case["samples_per_s"]}, reverse=True)
    height = 0.8 / len(counts)
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(cases) + 0.9))
    longest = max(spread["p80"] for case in cases.values() for spread in case["samples_per_s"].values())
    for y, name in enumerate(by_rate):
        for i, count in enumerate(counts):
            rate, at = cases[name]["samples_per_s"][str(count)], y - 0.4 + (i + 0.5) * height
            error = [[rate["median"] - rate["p20"]], [rate["p80"] - rate["median"]]]
            colour = (OURS if cases[name]["ours"] else PEERS)[min(i, 1)]
            axes.barh(at, rate["median"], height * 0.92, color=colour, xerr=error, error_kw={"lw": 0.8, "ecolor": INK})
            workers = f"   {count} worker{'s' * (count > 1)}" if y == 0 else ""
            text = f"{rate['median']:,.0f}{workers}"
            axes.text(rate["p80"] + longest * 0.012, at, text, va="center", fontsize=8, color=INK)
    target = record["case"].get("target_samples_per_s")
    if target:
        axes.axvline(target, color=INK, lw=0.8, ls=":")
    axes.set_yticks(range(len(by_rate)), by_rate)
    for label, name in zip(axes.get_yticklabels(), by_rate, strict=True):
        label.set_fontweight("bold" if cases[name]["ours"] else "normal")
    axes.set_xlim(0, longest * 1.22)
    axes.margins(y=0.01)
    axes.set_xlabel("samples/s (median; line: p20 to p80)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def section(record: dict[str, Any], title: str = "Loading tiles", picture: str = "loader") -> str:
    """Markdown of a loader record; `picture` names its plot."""
    case, results = record["case"], record["results"]
    compiling = max((c["first_process_to_first_batch_s"] for c in results["cases"].values() if c["ours"]), default=0.0)
    lines = [
        f"## {title}",
        "",
        f"{case['num_tiles']:,} tiles of {case['tile_size_px']} px ({case['source']}, {case['repeats']} times over, "
        f"{case['num_tiles'] * case['decoded_bytes_per_tile'] / 1e9:.1f} GB decoded), all {len(case['modalities'])} "
        f"modalities, to batches of {case['batch_size']} at {case['img_size_px']} px: {case['transform']}. Page cache "
        f"{case['page_cache']}. {record['date'][:10]}, {machine(record)}. Made by `{case['command']}`; p20 / median / p80 "
        f"over {case['rounds']} rounds of at least {case['seconds']:g} s or the rest of an epoch, cases taking turns, each "
        f"turn a new process. Gate: {case['gate']}.",
        "",
        f"![samples/s by loader](plots/{picture}.svg)",
        "",
        table(results["cases"]),
        "",
        *ratios(results["cases"]),
        "First batch: from the start of the process (Python and its imports included) / from the opening of the data set. "
        "MB/s are decoded bytes. A worker is a thread of ours, a process of the others'. The very first batch of mpmae's "
        f"loaders on a machine took up to {compiling:.0f} s: their loops are compiled then, and kept.",
        "",
    ]
    if "target_samples_per_s" in case:
        lines += [f"To reach: {case['target_samples_per_s']:,} tiles/s.", ""]
    for name, modules in results["left_out"].items():
        lines += [f"Left out: {name} ({', '.join(modules)} not installed).", ""]
    lines += ["What one thread of this machine does at most, measured between the rounds:", ""]
    lines += ["| step | tiles/s | GB/s |", "|---|---|---|"]
    for key, what in LIMITS.items():
        value = results["limits"][key]["median"]
        lines.append(f"| {what} | {'' if 'GB' in key else f'{value:,.0f}'} | {f'{value:.1f}' if 'GB' in key else ''} |")
    versions = ", ".join(f"{name} {version}" for name, version in case["packages"].items() if version)
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def ratios(cases: dict[str, Any]) -> list[str]:
    """How many times as fast as the others' loaders the default one is, at each number of workers, as lines of Markdown."""
    if DEFAULT not in cases:
        return []
    lines = []
    for count, ours in cases[DEFAULT]["samples_per_s"].items():
        times = ", ".join(
            f"{ours['median'] / case['samples_per_s'][count]['median']:.1f} x {name}"
            for name, case in cases.items()
            if not case["ours"]
        )
        if times:
            lines += [f"{DEFAULT} with {count} worker{'s' if count != '1' else ''}: {times}.", ""]
    return lines


def table(cases: dict[str, Any]) -> str:
    """Markdown table of the cases, in the order of the record."""
    counts = list(next(iter(cases.values()))["samples_per_s"])
    titles = [f"samples/s, {count} worker{'s' if count != '1' else ''}" for count in counts]
    lines = [
        f"| loader | {' | '.join(titles)} | MB/s, {counts[0]} workers | first batch s | KB a tile on disk |",
        "|---" * (len(titles) + 4) + "|",
    ]
    for name, case in cases.items():
        rates = [case["samples_per_s"][count] for count in counts]
        cells = [f"{rate['p20']:,.0f} / **{rate['median']:,.0f}** / {rate['p80']:,.0f}" for rate in rates]
        first = f"{case['process_to_first_batch_s']['median']:.1f} / {case['open_to_first_batch_s']['median']:.2f}"
        size = f"{case['bytes_per_tile'] / 1e3:.0f}"
        if case["bytes_per_tile_in_use"] > 1.01 * case["bytes_per_tile"]:
            size += f", {case['bytes_per_tile_in_use'] / 1e3:.0f} once inflated"
        speed = f"{case['decoded_mb_per_s'][counts[0]]['median']:,.0f}"
        lines.append(f"| {f'**{name}**' if case['ours'] else name} | {' | '.join([*cells, speed, first, size])} |")
    return "\n".join(lines)
