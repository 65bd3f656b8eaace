"""Scores as they are reached, one line each, so that a killed evaluation goes on where it was."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpmae.errors import ConfigError
from mpmae.eval.scores import Score
from mpmae.files import read_jsonl, write_whole
from mpmae.run_lock import LOCK_NAME, claim_folder

LOG_NAME, IDENTITY_NAME = "scores.jsonl", "evaluation.json"
Key = tuple[str, str, int, int | None, float]


def key_of(score: Score) -> Key:
    """What tells the scores of an evaluation apart."""
    return score.encoder, score.method, score.seed, score.fold, score.label_fraction


class ScoreLog:
    """The scores in an output folder. scores: by `key_of`, those of earlier processes included."""

    def __init__(self, path: Path):
        self._path = path
        self.scores: dict[Key, Score] = {}
        for entry in read_jsonl(path):
            score = Score(**entry)
            self.scores[key_of(score)] = score
        write_whole(path, "".join(_line(score) for score in self.scores.values()))  # without a torn last line

    def add(self, score: Score) -> None:
        """Keep a score."""
        self.scores[key_of(score)] = score
        with self._path.open("a") as file:
            file.write(_line(score))


@contextlib.contextmanager
def open_log(folder: Path, identity: Mapping[str, Any], resume: bool) -> Iterator[ScoreLog]:
    """The log of an output folder, held for this process.

    identity: plain values that all its scores depend on. Raises ConfigError: another process is at it, it cannot be written,
    it holds something and `resume` is False, or its scores were made with another identity.
    """
    with held(folder):
        if not resume:
            check_free(folder)
        _check(folder / IDENTITY_NAME, json.loads(json.dumps(identity)))
        yield ScoreLog(folder / LOG_NAME)


def check_free(folder: Path) -> None:
    """Raises ConfigError for an output folder that holds something."""
    if any(path.name != LOCK_NAME for path in folder.iterdir()):
        raise ConfigError(f"output.dir = {folder} is not empty; pass --resume auto to go on with it, or another output.dir")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of an output folder for the block. Raises ConfigError: in use, or it cannot be written."""
    lock = claim_folder(folder, "output.dir", "evaluation")
    try:
        yield
    finally:
        os.close(lock)


def _check(path: Path, identity: dict[str, Any]) -> None:
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        return write_whole(path, json.dumps(identity, indent=1))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); give another output.dir") from error
    keys = sorted(kept.keys() | identity.keys())
    other = [f"{key} was {kept.get(key)}, now {identity.get(key)}" for key in keys if kept.get(key) != identity.get(key)]
    if other:
        raise ConfigError([f"{path.parent} holds another evaluation: {text}; give another output.dir" for text in other])
    return None


def _line(score: Score) -> str:
    return json.dumps(dataclasses.asdict(score)) + "\n"
