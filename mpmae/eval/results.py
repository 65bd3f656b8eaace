"""What an evaluation leaves in its output folder: scores with their facts, a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mpmae.config_tree import Section
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.results_picture import write_picture
from mpmae.eval.scores import Score, write_scores
from mpmae.eval.tables import Table, markdown, results_table, terminal
from mpmae.files import write_whole
from mpmae.provenance import commit, environment

CONFIG_NAME, SCORES_NAME, RESULTS_NAME, PICTURE_NAME = "config.yaml", "scores.json", "results.md", "results.png"
_LOG_COLUMNS = 160


def write_results(
    folder: Path, config: Section, labelled: LabelledSet, scores: Sequence[Score], facts: Mapping[str, Any]
) -> None:
    """Write scores.json, results.md and results.png. facts: beside configuration, set and machine.

    facts["encoders"]: by label, what an encoder reads and how it is pooled; it stands under the table too.
    """
    write_scores(folder / SCORES_NAME, scores, evaluation_facts(config, labelled) | dict(facts))
    told = "".join(f"\n{label}: {_told(entry)}.\n" for label, entry in facts.get("encoders", {}).items() if entry)
    text = f"# {labelled.task.name}\n\n{markdown(results_table(scores))}{told}\n![results]({PICTURE_NAME})\n"
    write_whole(folder / RESULTS_NAME, text)
    write_picture(scores, folder / PICTURE_NAME)


def evaluation_facts(config: Section, labelled: LabelledSet) -> dict[str, Any]:
    """Configuration, set, environment and commit, as plain data."""
    task = labelled.task
    about = {"name": task.name, "kind": task.kind, "class_names": task.class_names, "bands": task.band_names}
    sizes = {"num_samples": len(labelled), "splits": {name: len(rows) for name, rows in labelled.splits.items()}}
    config_tree = config.model_dump(mode="json")
    return {"config": config_tree, "set": about | sizes, "environment": environment(), **commit()}


def print_results(scores: Sequence[Score]) -> None:
    """The table of scores on standard output."""
    print_table(results_table(scores))


def print_table(table: Table) -> None:
    """A table on standard output; in a log file wide enough to be read."""
    console = Console(highlight=False)
    wide = console if console.is_terminal else Console(highlight=False, width=_LOG_COLUMNS)
    wide.print(terminal(table))


def _told(entry: Mapping[str, Any]) -> str:
    reads = [f"reads {', '.join(entry['domains'])}"] if "domains" in entry else []
    pooled = [f"an image's vector is the {entry['pooling'].removeprefix('the ')}"] if "pooling" in entry else []
    return "; ".join(reads + pooled)
