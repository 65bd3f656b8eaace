"""What a metrics record says under `probe`, for those that read it: reports, tables, progress lines.

    {"step": 500, ..., "probe": {"knn_5": 0.61, "knn_20": 0.6, "linear": 0.72, "metric": "accuracy", "num_train": 800,
                                 "num_val": 200, "elapsed_s": 3.1}}

Scores are fractions in [0, 1], None where features were not finite. A record of step 0 has nothing else: it is of the
encoder before its first step.
"""

import math
from collections.abc import Mapping
from typing import Any

LINEAR = "linear"
_KNN = "knn_"


def knn_method(k: int) -> str:
    """The key of kNN with `k` neighbours."""
    return f"{_KNN}{k}"


def scores_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """By method, the scores of a metrics record; empty without a probe."""
    probe = record.get("probe")
    if not isinstance(probe, Mapping):
        return {}
    return {name: score for name, score in probe.items() if is_method(name)}


def is_method(name: str) -> bool:
    """Whether a key of a probe is a method, whose value is a score."""
    return name == LINEAR or name.startswith(_KNN)


def method_title(method: str) -> str:
    """A method's name for people: "kNN-5", "Linear probe"."""
    return "Linear probe" if method == LINEAR else f"kNN-{method.removeprefix(_KNN)}"


def percent(score: float | None) -> str:
    """A score for people: "61.2 %", or "-" for none."""
    return f"{100 * score:.1f} %" if isinstance(score, int | float) and math.isfinite(score) else "-"


def summary(record: Mapping[str, Any]) -> str:
    """A metrics record's probe in a line."""
    probe = record["probe"]
    parts = [f"{method_title(method)} {percent(score)}" for method, score in scores_of(record).items()]
    return f"{', '.join(parts)} ({probe['metric']} of {probe['num_val']:,} images; {probe['elapsed_s']:.1f} s)"
