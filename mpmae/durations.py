"""Durations as Slurm writes them."""

import re

_DURATION = re.compile(r"(?:(?:(?P<d>\d+)-)?(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)")
FORMS = "h:m:s such as 3:50:00, m:s such as 50:00, or d-h:m:s such as 1-03:50:00"


def seconds_of(text: str) -> float:
    """Seconds of a duration such as `3:50:00`.

    A bare number is refused: Slurm means minutes by it, and YAML makes one of an unquoted 3:50:00. Raises ValueError.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        hint = "; in YAML it needs quotes" if text.strip().isdigit() else ""
        raise ValueError(f"expected {FORMS}{hint}")
    days, hours, minutes, seconds = (int(match[name] or 0) for name in "dhms")
    too_large = [
        f"{name} {value}"
        for name, value, bound in (
            ("hours", hours, 24 if match["d"] else None),
            ("minutes", minutes, 60 if match["h"] else None),
            ("seconds", seconds, 60),
        )
        if bound is not None and value >= bound
    ]
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if too_large or not total:
        raise ValueError(f"{' and '.join(too_large) or 'no time'} in {text.strip()!r}; expected {FORMS}")
    return float(total)
