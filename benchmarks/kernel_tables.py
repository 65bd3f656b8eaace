"""What a record of the kernels says of each case: its best ways, their ratio, and whether the goal is reached."""

from typing import Any


def table(entries: list[dict[str, Any]]) -> list[str]:
    """A line for each case: the best of ours and the best baseline."""
    lines = [
        f"{'case':<38}{'floor ms':>9}  {'ours':<10}{'ms':>8}{'floor':>7}{'goal':>8}  {'best other':<30}{'ms':>8}{'x':>6}"
    ]
    for entry in entries:
        ours = best(entry, ours=True)
        other = best(entry, ours=False)
        cells = f"{entry['name']:<38}{entry.get('floor_ms', 0):>9.3f}  "
        if ours:
            way = entry["ways"][ours]
            cells += f"{ours:<10}{way['ms']['median']:>8.3f}{100 * way['floor_fraction']:>6.0f}%{verdict(entry):>9}  "
        else:
            cells += f"{'-':<10}{'':>8}{'':>7}{'':>9}  "
        if other:
            cells += f"{other:<28}{entry['ways'][other]['ms']['median']:>8.3f}"
            cells += f"{speedup(entry):>6.1f}" if ours else ""
        lines.append(cells.rstrip())
        lines += [f"  RED {way}: {reason}" for way, reason in entry["failed"].items()]
    return lines


def best(entry: dict[str, Any], ours: bool) -> str | None:
    """The name of the fastest way of a kind."""
    medians = {name: way["ms"]["median"] for name, way in entry["ways"].items() if way["ours"] == ours}
    return min(medians, key=medians.get, default=None)


def speedup(entry: dict[str, Any]) -> float:
    """How many times faster the best of ours is than the best other way."""
    ours, other = (entry["ways"][best(entry, kind)]["ms"]["median"] for kind in (True, False))
    return other / ours


def verdict(entry: dict[str, Any]) -> str:
    """Whether the best of ours reaches the goal of its case."""
    way = entry["ways"][best(entry, ours=True)]
    reached = {"memory": way["copy_fraction"], "matrix": way["matrix_fraction"]}
    return " ".join(f"{'yes' if reached[kind] >= goal else 'no'}>{goal:.0%}" for kind, goal in entry["goals"].items())
