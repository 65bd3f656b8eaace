"""The report as one HTML file: no scripts, nothing loaded from elsewhere, light and dark."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mpmae.errors import ReportError
from mpmae.files import write_whole
from mpmae.probe_record import method_title, scores_of
from mpmae.report import numbers
from mpmae.report.charts import Chart, legend_swatch, line_chart, ratio_bar
from mpmae.report.data import ReportData
from mpmae.report.embedding_charts import embedding_charts
from mpmae.report.pictures import NO_DATA, dots, hatch, png_data_uri
from mpmae.report.tiles import tile_view
from mpmae.report.vectors import PERIODS

_KEY_SIDE_PX = 24
_RUN_CHARTS = (
    # key of metrics.jsonl, divisor to the unit, title, unit, whether the axis starts at 0
    ("loss", 1, "Total loss", "", False),
    ("lr", 1, "Learning rate", "", True),
    ("grad_norm", 1, "Gradient norm", "", False),
    ("images_per_s", 1, "Images per second", "", True),
    ("data_wait_percent", 1, "Waiting for data", "%", True),
    ("memory_bytes", 1e6, "Memory", "MB", True),
)


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the page of `data` to `path` and return it; parent folders are made, the file appears whole or not at all.

    Raises ReportError, with every problem at once, where parts of `data` do not fit together, and when `path` cannot be
    written.
    """
    path = Path(path)
    text = render_report(data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise ReportError(
            f"{path} cannot be written ({error.strerror or error}); give another file with --output"
        ) from error
    return path


def render_report(data: ReportData) -> str:
    """The page's HTML. Raises ReportError as `write_report` does."""
    data.check()
    environment = Environment(
        loader=PackageLoader("mpmae.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["compact"] = numbers.compact
    template = environment.get_template("page.html.j2")
    return template.render(
        data=data,
        singular={"modalities": "modality", "targets": "target"}[numbers.noun(data)],
        lead=_lead(data),
        css=Markup(environment.loader.get_source(environment, "page.css")[0]),
        verdict=numbers.verdict(data),
        warnings=numbers.warnings(data),
        headlines=numbers.headlines(data),
        comparisons=[(row, Markup(ratio_bar(row.ratio, row.mark))) for row in numbers.comparisons(data)],
        equal_within_percent=numbers.EQUAL_WITHIN_PERCENT,
        run_charts=_markup(_run_charts(data)),
        loss_charts=_markup(_loss_charts(data)),
        log_variance_charts=_markup(_log_variance_charts(data)),
        probe_charts=_markup(_probe_charts(data)),
        probe_note=numbers.probe_note(data),
        swatches={kind: Markup(legend_swatch(kind)) for kind in ("line", "band", "point", "trivial")},
        tiles=[tile_view(tile) for tile in data.tiles],
        is_per_map=any(isinstance(tile.visible, Mapping) for tile in data.tiles),
        embedding_charts=_embedding_charts(data),
        periods=list(PERIODS.values()),
        keys={"hidden": png_data_uri(hatch(_KEY_SIDE_PX)), "unscored": png_data_uri(dots(_KEY_SIDE_PX))},
        no_data_colour="#{:02x}{:02x}{:02x}".format(*NO_DATA),
        folded=_folded(data),
    )


def _lead(data: ReportData) -> str:
    """The line below the title: what the run was."""
    model, shard_set = data.run.model, data.run.shard_set
    num_parameters = model.get("num_parameters")
    size = f" ({numbers.compact(num_parameters / 1e6)} M parameters)" if isinstance(num_parameters, int) else ""
    parts = [
        f"{model['name']}{size}" if model.get("name") else "",
        f"pretrained on {shard_set['name']}" if shard_set.get("name") else "",
        f"finished {data.run.finished}" if data.run.finished else "",
    ]
    return " · ".join(part for part in parts if part)


def _run_charts(data: ReportData) -> Iterator[Chart]:
    for key, divisor, title, unit, zero_based in _RUN_CHARTS:
        values = [(step, value / divisor) for step, value in numbers.series(data.history, key)]
        if values:
            yield line_chart(title, values, unit=unit, zero_based=zero_based)


def _loss_charts(data: ReportData) -> Iterator[Chart]:
    for name in numbers.targets_of(data):
        train = numbers.series(data.history, "losses", name)
        validation, trivial = (numbers.series(data.validation, key, name) for key in ("losses", "trivial"))
        yield line_chart(numbers.title_of(name), train, validation, trivial)


def _log_variance_charts(data: ReportData) -> Iterator[Chart]:
    for name in numbers.targets_of(data, "log_variances"):
        yield line_chart(numbers.title_of(name), numbers.series(data.history, "log_variances", name))


def _probe_charts(data: ReportData) -> Iterator[Chart]:
    for method in dict.fromkeys(method for item in data.history for method in scores_of(item)):
        scores = [(step, 100 * score) for step, score in numbers.series(data.history, "probe", method)]
        if scores:
            yield line_chart(
                method_title(method), scores, trivial=numbers.at_start(scores), unit="%", dashed_name="random init"
            )


def _embedding_charts(data: ReportData) -> list[tuple[Chart, Markup]]:
    found = data.embeddings
    return _markup(iter(embedding_charts(found).values())) if found and found.points else []


def _markup(charts: Iterator[Chart]) -> list[tuple[Chart, Markup]]:
    return [(chart, Markup(chart.svg)) for chart in charts]


def _folded(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, rows of key and value) of the folded sections, without the empty ones."""
    run = data.run
    sections = (
        ("Configuration", run.config),
        ("Model", run.model),
        ("Shard set", run.shard_set),
        ("Environment", run.environment),
    )
    return [(title, list(_flat(tree))) for title, tree in sections if tree]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value_text(value)


def _value_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value_text(item) for item in value) or "none"
    return str(value) if value != {} else "none"
