"""`sweep`: the same evaluation of a MultiMAE for several subsets of its input domains, in one table and one picture."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mpmae.config_tree import Section
from mpmae.domains import domain_of, in_order
from mpmae.errors import ConfigError, DatasetError
from mpmae.eval.bands import match_channels
from mpmae.eval.config import InputsSection
from mpmae.eval.dataset import LabelledSet, Task
from mpmae.eval.encoders import domains_of
from mpmae.eval.multimae_encoder import POOLED, channels_of
from mpmae.eval.open_set import open_set
from mpmae.eval.results import CONFIG_NAME, PICTURE_NAME, RESULTS_NAME, SCORES_NAME, evaluation_facts, print_table
from mpmae.eval.score_log import check_free, held
from mpmae.eval.scores import Score, write_scores
from mpmae.eval.sweep_picture import write_sweep_picture
from mpmae.eval.sweep_table import SubsetScores, sweep_table
from mpmae.eval.tables import markdown
from mpmae.eval.worlds import opened_world
from mpmae.files import write_whole

FOLDER = "inputs"
_OWN_BASELINE = "random_init"  # the others see all stored bands, whatever the encoder reads
Evaluate = Callable[..., list[Score]]


@dataclass(frozen=True)
class _Subset:
    """folder: below `inputs`. reason: why it cannot be evaluated, else "". remark: what stands in for a band."""

    name: str
    domains: tuple[str, ...]
    folder: str
    reason: str
    remark: str


def sweep(evaluate: Evaluate, config: Section, *, resume: bool = False, labelled: LabelledSet | None = None) -> list[Score]:
    """Scores of `evaluate` (`probe` or `finetune`) for each of `config.inputs.subsets`; every rank calls it.

    Each subset is a whole evaluation in output.dir/inputs/NAME. output.dir gets scores.json, results.md and results.png,
    written anew whenever a subset is done, and config.yaml. A score's `encoder` is the subset's name, of random weights with
    "random init" behind it. Baselines that see all stored bands are evaluated once, with the first subset. A subset that the
    encoder or the set cannot do is named in the table, with the reason. resume: go on with what output.dir holds; subsets
    may have been added. Raises ConfigError, DatasetError and what `evaluate` raises.
    """
    with opened_world(config.output.device) as world:
        folder = config.output.dir
        with held(folder) if world.rank == 0 else nullcontext():
            if world.rank == 0 and not resume:
                check_free(folder)
            labelled = open_set(config.dataset, progress=world.rank == 0) if labelled is None else labelled
            subsets = _subsets(config, labelled.task)
            if world.rank == 0:
                write_whole(folder / CONFIG_NAME, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            done: list[SubsetScores] = []
            for subset in subsets:
                found = SubsetScores(subset.name, subset.domains, (), subset.reason or subset.remark)
                if not subset.reason:
                    if world.rank == 0:
                        _say(f"input {subset.name}: {', '.join(subset.domains)}")
                    first = not any(entry.scores for entry in done)
                    scores = evaluate(_config_of(config, subset, first), resume=resume, labelled=labelled)
                    found = dataclasses.replace(found, scores=tuple(scores))
                elif world.rank == 0:
                    _say(f"input {subset.name} is left out: {subset.reason}")
                done.append(found)
                if found.scores and world.rank == 0:
                    left = [SubsetScores(s.name, s.domains, (), s.reason) for s in subsets[len(done) :] if s.reason]
                    _write(folder, config, labelled, [*done, *left])
            if world.rank == 0:
                _write(folder, config, labelled, done)
                print_table(sweep_table(done, _pooling(config, labelled)))
    return _named(done)


def _subsets(config: Section, task: Task) -> list[_Subset]:
    """What is evaluated. Raises ConfigError for subsets that mean nothing, DatasetError when none can be evaluated."""
    known = domains_of(config.encoder)
    problems = []
    if known is None:
        problems.append("inputs.subsets: the encoder is a ConvNeXt V2, which always reads the same bands; leave it out")
    if config.encoder.domains is not None:
        problems.append("encoder.domains: inputs.subsets says what is read; give one of the two")
    subsets = []
    for name, domains in config.inputs.subsets.items():
        if not domains or len(set(domains)) < len(domains):
            problems.append(f"inputs.subsets: {name} = {list(domains)}; expected at least one domain, each once")
        for domain in domains:
            try:
                domain_of(domain)
            except ConfigError as error:
                problems += [f"inputs.subsets: {name}: {problem}" for problem in error.problems]
        subsets.append((name, domains, re.sub(r"[^a-z0-9+]+", "-", name.lower()).strip("-")))
    folders = [folder for *_, folder in subsets]
    if len(set(folders)) < len(folders) or "" in folders:
        problems.append(f"inputs.subsets: the names give the folders {', '.join(folders)}; expected different ones")
    if problems:
        raise ConfigError(problems)
    found = [_subset(name, in_order(domains), folder, known, task) for name, domains, folder in subsets]
    if all(subset.reason for subset in found):
        raise DatasetError([f"inputs.subsets: {subset.name} cannot be evaluated: {subset.reason}" for subset in found])
    return found


def _subset(name: str, domains: tuple[str, ...], folder: str, known: Sequence[str], task: Task) -> _Subset:
    unread = [domain for domain in domains if domain not in known]
    if unread:
        return _Subset(name, domains, folder, f"the encoder does not read {', '.join(unread)}", "")
    channels = [channel for domain in domains for channel in channels_of(domain_of(domain))]
    try:
        match = match_channels(task, channels, quiet=True)
    except DatasetError as error:
        return _Subset(name, domains, folder, "; ".join(error.problems), "")
    return _Subset(name, domains, folder, "", ", ".join(match.filled))


def _config_of(config: Section, subset: _Subset, with_baselines: bool) -> Section:
    """The configuration of one subset's evaluation."""
    changes: dict[str, Any] = {
        "inputs": InputsSection(),
        "encoder": config.encoder.model_copy(update={"domains": subset.domains}),
        "output": config.output.model_copy(update={"dir": config.output.dir / FOLDER / subset.folder}),
    }
    for key in ("probe", "finetune"):
        section = getattr(config, key, None)
        if section is not None and not with_baselines:
            own = tuple(name for name in section.baselines if name == _OWN_BASELINE)
            changes[key] = section.model_copy(update={"baselines": own})
    return config.model_copy(update=changes)


def _named(done: Sequence[SubsetScores]) -> list[Score]:
    return [dataclasses.replace(score, encoder=entry.label(score)) for entry in done for score in entry.scores]


def _write(folder: Path, config: Section, labelled: LabelledSet, done: Sequence[SubsetScores]) -> None:
    subsets: dict[str, Mapping[str, Any]] = {
        entry.name: {"domains": entry.domains, "evaluated": bool(entry.scores), "remark": entry.remark} for entry in done
    }
    write_scores(folder / SCORES_NAME, _named(done), evaluation_facts(config, labelled) | {"inputs": subsets})
    table = sweep_table(done, _pooling(config, labelled))
    text = f"# {labelled.task.name}: inputs of one encoder\n\n{markdown(table)}\n![results]({PICTURE_NAME})\n"
    write_whole(folder / RESULTS_NAME, text)
    write_sweep_picture(done, folder / PICTURE_NAME)


def _pooling(config: Section, labelled: LabelledSet) -> str:
    return "" if labelled.task.kind == "segmentation" else POOLED[config.encoder.pooling]


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
