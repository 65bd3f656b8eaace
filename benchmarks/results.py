"""Generate RESULTS.md, its plots and README's figure from the records.

python benchmarks/results.py            (rewrites them)
python benchmarks/results.py --check    (status 1 when they are not what the records give)
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import results_downstream
import results_engines
import results_gpu_step
import results_kernels
import results_loader
import results_multimae
import results_multimae_learning
import results_order
import results_reshard
import results_scaling
from matplotlib.ticker import LogLocator
from page import Section, machine, plt, svg
from record import RECORDS, load_records

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PHASES = {"data wait": "#8a8f98", "forward": "#2563a8", "backward": "#6ea3d8", "optimizer": "#d98a29"}
INITS = {"reference": "#d98a29", "convnextv2": "#2563a8"}
PARTS = ("stem", "stage 0", "stage 1", "stage 2", "stage 3", "decoder block")
DATASETS = {  # name: tile side in px, HDF5 GB (the dataset's own page)
    "MMEarth100k": (128, 48),
    "MMEarth64": (64, 152),
    "MMEarth": (128, 597),
}


def step_plot(record: dict[str, Any]) -> str:
    """SVG: milliseconds a step by phase, one bar a case."""
    cases = record["results"]["cases"]
    figure, axes = plt.subplots(figsize=(7.5, 0.55 * len(cases) + 1.1))
    left = [0.0] * len(cases)
    for phase, colour in PHASES.items():
        widths = [case["ms"][phase]["median"] for case in cases.values()]
        axes.barh(list(cases), widths, left=left, color=colour, label=phase, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, (end, case) in enumerate(zip(left, cases.values(), strict=True)):
        axes.text(end, y, f"  {case['images_per_s']['median']:.0f} images/s", va="center", fontsize=9)
    axes.set_xlim(0, max(left) * 1.2)
    axes.set_xlabel(f"ms a step of {record['case']['global_batch_size']} images (median)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    return svg(figure)


def step_section(record: dict[str, Any]) -> str:
    """Markdown of a training-step record."""
    case, results = record["case"], record["results"]
    lines = [
        "## What a training step costs",
        "",
        f"{case['model']}, {case['img_size']} px, patch {case['patch_size']}, {case['precision']}, {case['engine']}, global "
        f"batch {case['global_batch_size']}; {record['date'][:10]}, {machine(record)}. Made by `python benchmarks/step.py`; "
        f"p20 / median / p80 over {case['rounds']} rounds of {case['steps']} steps, cases alternating.",
        "",
        "![ms a step by phase](plots/training-step.svg)",
        "",
        "| case | images/s | " + " | ".join(f"{phase} ms" for phase in PHASES) + " | speed-up |",
        "|---|---|" + "---|" * (len(PHASES) + 1),
    ]
    for name, result in results["cases"].items():
        rate = result["images_per_s"]
        phases = " | ".join(f"{result['ms'][phase]['median']:.1f}" for phase in PHASES)
        speedup = results["speedup_over_1_rank_1_thread"][name]
        spread = f"{rate['p20']:.1f} / **{rate['median']:.1f}** / {rate['p80']:.1f}"
        lines.append(f"| {name} | {spread} | {phases} | {speedup:.2f} |")
    lines += ["", "Forward by part, median ms:", "", "| case | " + " | ".join(PARTS) + " |", "|---|" + "---|" * len(PARTS)]
    for name, result in results["cases"].items():
        lines.append(f"| {name} | " + " | ".join(f"{result['ms'][part]['median']:.1f}" for part in PARTS) + " |")
    lines += [
        "",
        f"The loader alone, two threads, all modalities: {results['loader_alone_samples_per_s']:.0f} samples/s.",
        "",
    ]
    return "\n".join(lines)


def init_plot(record: dict[str, Any]) -> str:
    """SVG: training loss and relative validation loss by step, mean and range over the seeds; the lesser rate dashed."""
    results = record["results"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for init, colour in INITS.items():
        for lr in results["by_init"][init]:
            runs = [run for run in results["runs"] if run["init"] == init and f"{run['lr']:g}" == lr]
            training = runs[0]["training"]["step"], [run["training"]["loss"] for run in runs]
            validation = (
                [point["step"] for point in runs[0]["validation"]],
                [[point["relative"] for point in run["validation"]] for run in runs],
            )
            is_best = results["best_lr"][init] == lr
            for axes, (steps, curves) in zip(panels, (training, validation), strict=True):
                by_step = list(zip(*curves, strict=True))
                mean = [sum(values) / len(values) for values in by_step]
                axes.plot(steps, mean, color=colour, ls="-" if is_best else ":", label=f"{init}, {lr}")
                if is_best:
                    axes.fill_between(steps, *[[f(v) for v in by_step] for f in (min, max)], color=colour, alpha=0.2, lw=0)
    panels[0].set(ylabel="training loss", yscale="log")
    panels[1].set(ylabel="validation loss / trivial predictor's", yscale="log")
    panels[1].axhline(1, color="#8a8f98", lw=0.8)
    for axes in panels:
        axes.set_xlabel("step")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=9)
    return svg(figure)


def init_section(record: dict[str, Any]) -> str:
    """Markdown of an initial-weights record."""
    case, results = record["case"], record["results"]
    train, val = case["num_samples"].values()
    lines = [
        "## Which initial weights train better",
        "",
        f"{case['model']}, {case['img_size']} px, patch {case['patch_size']}, {case['precision']}, {case['steps']} steps of "
        f"{case['global_batch_size']} images on {case['shards']['name']} ({train} training and {val} validation tiles), "
        f"seeds {', '.join(map(str, case['seeds']))}; {record['date'][:10]}, {machine(record)}. Made by "
        "`python benchmarks/init.py`. Validation loss at the end over the trivial predictor's, mean over the modalities: "
        "below 1 is better.",
        "",
        "![training and validation loss by step](plots/initial-weights.svg)",
        "",
        "| init | peak rate | mean ± std | by seed | pixel modalities | losses summed | largest gradient norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for init, rates in results["by_init"].items():
        for lr, row in rates.items():
            mark = "**" if results["best_lr"][init] == lr else ""
            norms = [run["max_grad_norm"] for run in results["runs"] if run["init"] == init and f"{run['lr']:g}" == lr]
            seeds = ", ".join(f"{value:.3f}" for value in row["relative"]["seeds"])
            mean = f"{mark}{row['relative']['mean']:.3f} ± {row['relative']['std']:.3f}{mark}"
            others = f"{row['relative_pixel']['mean']:.3f} | {row['relative_total']['mean']:.3f} | {max(norms):.0f}"
            lines.append(f"| {init} | {lr} | {mean} | {seeds} | {others} |")
    names = list(next(iter(results["by_init"]["reference"].values()))["by_modality"])
    lines += [
        "",
        "By modality, each init at its better rate:",
        "",
        f"| init | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for init, lr in results["best_lr"].items():
        cells = [f"{results['by_init'][init][lr]['by_modality'][name]:.2f}" for name in names]
        lines.append(f"| {init} | {' | '.join(cells)} |")
    verdict = "no worse than" if results["convnextv2_no_worse"] else "worse than"
    lines += ["", f"By the rule that the script states, convnextv2 trains {verdict} reference. {case['note']}", ""]
    return "\n".join(lines)


def data_section(record: dict[str, Any]) -> str:
    """Markdown of a data-steps record."""
    lines = [
        "## From HDF5 to batches",
        "",
        f"{record['date'][:10]}, {machine(record)}. Made by `python benchmarks/data_steps.py`; medians of "
        f"{record['case']['repeats']} runs, page cache warm; build and verify run in one process. "
        f"Loader: {record['case']['loader']}.",
        "",
        "| source | codec | build tiles/s | verify tiles/s | loader 1 thread | loader 2 threads | KB a tile | of the HDF5 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, source in record["results"].items():
        for codec in ("lz4", "raw"):
            result = source[codec]
            loader = [f"{result['loader_samples_per_s'][f'{n} threads']['median']:,.0f}" for n in (1, 2)]
            cells = (
                f"{name}, {source['tile_size_px']} px",
                codec,
                f"{result['build_tiles_per_s']['median']:,.0f}",
                f"{result['verify_against_source_tiles_per_s']['median']:,.0f}",
                *loader,
                f"{result['bytes_per_tile'] / 1e3:.1f}",
                f"{result['bytes_per_tile'] / source['source_bytes_per_tile']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def readme_disk(record: dict[str, Any]) -> str:
    """README's estimate per dataset: HDF5 size times the measured ratio, and over the measured HDF5 bytes/s."""
    by_size = {source["tile_size_px"]: source for source in record["results"].values()}
    lines = ["", "   | set | HDF5 | LZ4 shards | build | verify |", "   |---|---|---|---|---|"]
    for name, (size, gigabytes) in DATASETS.items():
        if size not in by_size:
            continue
        source = by_size[size]
        ratio = source["lz4"]["bytes_per_tile"] / source["source_bytes_per_tile"]
        hours = [
            f"{gigabytes * 1e9 / (source['lz4'][key]['median'] * source['source_bytes_per_tile']) / 3600:.1f} h"
            for key in ("build_tiles_per_s", "verify_against_source_tiles_per_s")
        ]
        lines.append(f"   | {name} | {gigabytes} GB | about {gigabytes * ratio:.0f} GB | {hours[0]} | {hours[1]} |")
    note = (
        f"   Estimated by bytes from real tiles, on {record['environment']['cores']} cores, page cache warm "
        "([record](benchmarks/RESULTS.md));\n   those tiles lack some modalities, and a slow disk or network share takes "
        "longer."
    )
    return "\n".join([*lines, "", note, ""])


def readme_figure(record: dict[str, Any]) -> str:
    """The measured sentence of the README."""
    case, cases = record["case"], record["results"]["cases"]
    best = cases["2 ranks, 1 thread each"]["images_per_s"]["median"]
    one = cases["1 rank, 1 thread"]["images_per_s"]["median"]
    loader = record["results"]["loader_alone_samples_per_s"]
    return (
        f"Measured on {record['environment']['cores']} CPU cores ({case['model']}, {case['img_size']} px, 12 modalities, "
        f"{case['precision']}): **{best:.0f} images/s** pretraining on two ranks, {one:.0f} on one; the loader alone gives "
        f"{loader:.0f} samples/s. {results_gpu_step.readme_sentence(load_records('gpu step'))} "
        "[All records](benchmarks/RESULTS.md).\n"
    )


gpu_loader_section = partial(results_loader.section, title="Loading tiles with a GPU", picture="loader-gpu")
SECTIONS = (  # in the order of RESULTS.md
    Section("training step", step_section, "training-step", step_plot, "figure", readme_figure),
    Section("engines", results_engines.section),
    Section("multimae step", results_multimae.section, readme_mark="multimae", readme=results_multimae.readme),
    Section("initial weights", init_section, "initial-weights", init_plot),
    Section(
        "downstream",
        results_downstream.section,
        "downstream",
        results_downstream.plot,
        "downstream",
        results_downstream.readme,
    ),
    Section("downstream curve", results_downstream.curve_section),
    Section("multimae learning", results_multimae_learning.section, "multimae-learning", results_multimae_learning.plot),
    Section("order", results_order.section, "order", results_order.plot),
    Section("data steps", data_section, readme_mark="disk", readme=readme_disk),
    Section("loader", results_loader.section, "loader", results_loader.plot),
    Section("loader on a GPU", gpu_loader_section, "loader-gpu", results_loader.plot),
    Section("reshard", results_reshard.section, "reshard", results_reshard.plot),
    Section(
        "gpu kernels",
        results_kernels.section,
        "gpu-kernels",
        results_kernels.plot,
        unmeasured="what each kernel reaches of the copy bandwidth and of the matrix rate, and how it compares with cuDNN",
    ),
    Section(
        "gpu step",
        results_gpu_step.section,
        "gpu-step",
        results_gpu_step.plot,
        unmeasured="images/s and memory of a training step beside the dense grid with masking, and from which mask ratio on "
        "the sparse encoder is faster",
    ),
    Section(
        "multimae step on a GPU",
        results_multimae.gpu_section,
        unmeasured="images/s of a training step of MultiMAE beside the published code's way",
    ),
    Section("scaling model", results_scaling.section, "scaling", results_scaling.plot),
)
SUITE = "`MPMAE_COMMIT=$(python benchmarks/record.py) benchmarks/gpu_suite.sh`"


def unmeasured(missing: list[Section]) -> str:
    """Markdown that says what no record tells yet and how to make one."""
    if not missing:
        return ""
    rows = [f"- No record `{part.what}` yet: {part.unmeasured}." for part in missing]
    made_by = (
        f"One command on a machine with a CUDA GPU makes them: {SUITE} ([docs/kernels.md](../docs/kernels.md) says more)."
    )
    return "\n".join(["## Not measured", "", *rows, "", made_by, ""])


def outputs(folder: Path = RECORDS) -> dict[Path, str]:
    """Every generated file with its text, each section from the newest record of its kind in `folder`."""
    files: dict[Path, str] = {}
    sections = ["# Results\n\nGenerated by `python benchmarks/results.py` from [records/](records/); do not edit.\n"]
    if not any(record["environment"]["gpu"] for record in load_records(folder=folder)):
        sections.append(
            "No record here was made on a GPU: CUDA, bf16 on tensor cores and multi-node throughput are not measured yet.\n"
        )
    missing = []
    for part in SECTIONS:
        records = load_records(part.what, folder)
        if not records:
            missing += [part] if part.unmeasured else []
            continue
        sections.append(part.section(records[-1]))
        if part.plot:
            files[HERE / "plots" / f"{part.plot_name}.svg"] = part.plot(records[-1])
        if part.readme:
            files[README] = between(part.readme_mark, part.readme(records[-1]), files.get(README, README.read_text()))
    files[HERE / "RESULTS.md"] = "\n".join(filter(None, [*sections, unmeasured(missing)]))
    return files


def between(mark: str, text: str, page: str) -> str:
    """`page` with `text` between its comments `<!-- mark -->` and `<!-- /mark -->`."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    return pattern.sub(lambda found: found[1] + text + found[2], page)


def is_stale(path: Path, text: str) -> bool:
    """Whether a text differs; a plot may, since matplotlib draws the same numbers in its own way from version to version."""
    return path.suffix != ".svg" and path.read_text() != text


def main() -> int:
    """Write or check the generated files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    files = outputs()
    stale = [path for path, text in files.items() if not path.is_file() or is_stale(path, text)]
    if options.check:
        print("\n".join(f"stale: {path.name}; run python benchmarks/results.py" for path in stale))
        return 1 if stale else 0
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    print(f"written: {', '.join(path.name for path in stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
