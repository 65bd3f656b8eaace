"""Errors meant for people: each message says where, what was found, what was expected and what to do."""

from collections.abc import Sequence


class MpmaeError(Exception):
    """Base of every error that this package raises on bad input or a failed run.

    `problems` may be one text or several; all of them are shown at once, so that a user mends them in one go.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        text = self.problems[0] if len(self.problems) == 1 else "\n".join(f"- {p}" for p in self.problems)
        super().__init__(text)

    def __reduce__(self):  # crosses process boundaries (worker pools) with its list of problems
        return type(self), (self.problems,)


class ConfigError(MpmaeError):
    """A configuration value, or a combination of values, that cannot run."""


class SourceError(MpmaeError):
    """A source dataset (MMEarth HDF5 folder) that is absent, incomplete or inconsistent."""


class ShardError(MpmaeError):
    """A shard set (manifest, index or tar) that is absent, changed, corrupt or lacks what was asked for."""


class CheckpointError(MpmaeError):
    """A checkpoint that is absent, torn or belongs to another model, world size or shard set."""


class TrainingError(MpmaeError):
    """A run that cannot go on."""


class DatasetError(MpmaeError):
    """A labelled set (GEO-Bench folder, HDF5 file, GeoTIFFs with a table) that is absent, inconsistent or not plain data."""


class EmbeddingError(MpmaeError):
    """A folder of embeddings that is absent, unfinished, changed or of something else, or vectors that cannot be stored."""


class ReportError(MpmaeError):
    """Report data whose parts do not fit together: shapes, units or names."""
