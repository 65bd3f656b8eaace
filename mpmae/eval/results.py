"""What an evaluation leaves in its output folder: scores with their facts, a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mpmae.config_tree import Section
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.results_picture import write_picture
from mpmae.eval.scores import Score, write_scores
from mpmae.eval.tables import markdown, results_table, terminal
from mpmae.files import write_whole
from mpmae.provenance import commit, environment

SCORES_NAME, RESULTS_NAME, PICTURE_NAME = "scores.json", "results.md", "results.png"
_LOG_COLUMNS = 160


def write_results(
    folder: Path, config: Section, labelled: LabelledSet, scores: Sequence[Score], facts: Mapping[str, Any]
) -> None:
    """Write scores.json, results.md and results.png. facts: beside configuration, set and machine."""
    task = labelled.task
    about = {"name": task.name, "kind": task.kind, "class_names": task.class_names, "bands": task.band_names}
    sizes = {"num_samples": len(labelled), "splits": {name: len(rows) for name, rows in labelled.splits.items()}}
    whole = {
        "config": config.model_dump(mode="json"),
        "set": about | sizes,
        **facts,
        "environment": environment(),
        **commit(),
    }
    write_scores(folder / SCORES_NAME, scores, whole)
    text = f"# {task.name}\n\n{markdown(results_table(scores))}\n![results]({PICTURE_NAME})\n"
    write_whole(folder / RESULTS_NAME, text)
    write_picture(scores, folder / PICTURE_NAME)


def print_results(scores: Sequence[Score]) -> None:
    """The table on standard output; in a log file wide enough to be read."""
    console = Console(highlight=False)
    wide = console if console.is_terminal else Console(highlight=False, width=_LOG_COLUMNS)
    wide.print(terminal(results_table(scores)))
