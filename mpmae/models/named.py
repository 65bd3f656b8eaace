"""What is wrong with names: of models and of a modality's bands."""

import difflib
from collections.abc import Sequence


def name_problems(name: str, known: Sequence[str]) -> list[str]:
    """What is wrong with the name of a model: nothing or that it is unknown, with the closest known one."""
    if name in known:
        return []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "."
    return [f"unknown model {name!r}{hint} Known: {', '.join(known)}"]


def band_problems(where: str, name: str, bands: Sequence[str], available: tuple[str, ...]) -> list[str]:
    """What is wrong with a list of a modality's bands; `where` names the argument that holds it."""
    missing = [band for band in bands if band not in available]
    problems = []
    if missing:
        problems.append(f"{where}: {name} has no band {', '.join(missing)}; the set has {', '.join(available)}")
    if len(set(bands)) != len(bands):
        problems.append(f"{where}: {name} lists a band twice: {', '.join(bands)}")
    if not bands:
        problems.append(f"{where}: {name} has an empty list of bands; the set has {', '.join(available)}")
    return problems
