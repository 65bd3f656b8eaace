"""What the sections of RESULTS.md share: the registry's row, the line on the machine, and how a plot becomes SVG."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "mpmae"  # the same bytes every time
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

Text = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Section:
    """A kind of record and what is made of its newest one.

    what: as in `write_record`. section: its Markdown. plot: its SVG, written to plots/`plot_name`.svg.
    readme: text for README.md, put between the comments `<!-- readme_mark -->` and `<!-- /readme_mark -->`.
    unmeasured: what the page says in place of the section while there is no record.
    """

    what: str
    section: Text
    plot_name: str = ""
    plot: Text | None = None
    readme_mark: str = ""
    readme: Text | None = None
    unmeasured: str = ""


def machine(record: dict[str, Any]) -> str:
    """One line on where a record was made."""
    environment = record["environment"]
    packages = environment["packages"]
    device = environment["gpu"] or f"{environment['cores']} CPU cores"
    return f"{device}, torch {packages['torch']}, Python {environment['python']}, commit {record['commit'][:10]}"


def svg(figure: Figure) -> str:
    """The text of a figure, which is closed."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()
