"""The options of a source: text in, checked values out, every problem at once."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from mpmae.errors import SourceError
from mpmae.modalities import PRODUCT_LEVELS

T = TypeVar("T")


class Options:
    """Reads `key=value` options of a format and collects what is wrong with them; `check` raises it all."""

    def __init__(self, format_name: str, given: Mapping[str, str]):
        self._format, self._given = format_name, dict(given)
        self._known: list[str] = []
        self.problems: list[str] = []

    def text(self, key: str, default: str = "") -> str:
        """The value of `key`."""
        self._known.append(key)
        return self._given.get(key, default)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first is the default."""
        value = self.text(key, choices[0])
        if value not in choices:
            self.problems.append(f"option {key}={value}, expected {' or '.join(choices)}")
            return choices[0]
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        """A comma-separated list; None where the option is not given."""
        value = self.text(key)
        return tuple(part.strip() for part in value.split(",") if part.strip()) or None

    def whole(self, key: str, default: T, minimum: int) -> int | T:
        """A whole number of at least `minimum`."""
        return self._number(key, int, default, lambda v: v >= minimum, f"a whole number of at least {minimum}")

    def fraction(self, key: str, default: float) -> float:
        """A number from 0 to below 1."""
        return self._number(key, float, default, lambda v: 0 <= v < 1, "a number from 0 to below 1")

    def prefixed(self, prefix: str) -> dict[str, tuple[str, ...]]:
        """The lists of all options that begin with `prefix`, by what follows it."""
        keys = [key for key in self._given if key.startswith(prefix)]
        self._known.append(f"{prefix}NAME")
        lists = {key.removeprefix(prefix): self.names(key) or () for key in keys}
        self._known += keys
        return lists

    def check(self) -> None:
        """SourceError with every unknown option and unusable value."""
        known = [key for key in dict.fromkeys(self._known) if key not in self._given or "NAME" not in key]
        unknown = [key for key in self._given if key not in self._known]
        problems = [f"unknown option {key!r}; {self._format} knows {', '.join(known) or 'none'}" for key in unknown]
        if problems or self.problems:
            raise SourceError([f"--format {self._format}: {problem}" for problem in (*problems, *self.problems)])

    def _number(self, key: str, parse: type, default: T, fits, expected: str):
        value = self.text(key)
        if not value:
            return default
        try:
            number = parse(value)
        except ValueError:
            number = None
        if number is None or not fits(number):
            self.problems.append(f"option {key}={value}, expected {expected}")
            return default
        return number


def product_level(options: Options) -> str:
    """Which Sentinel-2 product becomes the modality sentinel2: l2a or l1c."""
    return options.choice("sentinel2", PRODUCT_LEVELS[::-1])
