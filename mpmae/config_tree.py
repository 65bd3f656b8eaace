"""Typed configuration trees: sections of keys, read as defaults < YAML file < `key=value`, with every problem told at once.

Used for pretraining (`mpmae.config`) and for evaluation (`mpmae.eval.config`).
"""

import datetime
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from mpmae.errors import ConfigError


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("bool_for_number", "expected a number, not true or false")
    return value


def _as_text(value: Any) -> Any:
    """A number or date, which YAML makes of a text such as 2024, as text again."""
    if isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool):
        return str(value)
    return value


def _as_location(value: Any) -> Any:
    """A text as a path, unless it is a URL of something else than a local file: that stays a text."""
    text = _as_text(value)
    if isinstance(text, str):
        text = text.removeprefix("file://")
        return text if "://" in text else Path(text)
    if not isinstance(text, Path):
        raise PydanticCustomError("no_location", "expected a folder, or a URL such as s3://bucket/folder")
    return text


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Text = Annotated[str, BeforeValidator(_as_text)]
TextPath = Annotated[Path, BeforeValidator(_as_text)]
Location = Annotated[Path | str, BeforeValidator(_as_location)]


class Section(BaseModel):
    """Some keys, or the sections of a whole tree; unknown keys are refused and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Tree = TypeVar("Tree", bound=Section)


def load_tree(schema: type[Tree], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Tree:
    """Defaults of `schema`, then the YAML file at `path`, then `overrides` such as `train.max_steps=20`.

    Raises ConfigError with every problem at once: file absent or not YAML, unknown key (with the closest match), bad value.
    """
    tree = _read_yaml(Path(path)) if path else {}
    problems: list[str] = []
    origins: dict[str, str] = {}
    text_keys = _text_keys(schema)
    for text in overrides:
        key, separator, value = text.partition("=")
        key, value = key.strip(), value.strip()
        if not separator or not key:
            problems.append(f"override {text!r} is not of the form key=value, such as {_example(schema)}")
            continue
        try:
            parsed = yaml.safe_load(value) if value else None
        except yaml.YAMLError as error:
            problems.append(f"override {text!r}: the value is not YAML ({error})")
            continue
        if key in text_keys and not isinstance(parsed, str | None):
            parsed = value  # as typed: YAML reads 2024_01 as the number 202401
        origins[key] = f"override {key}={value}"
        if not _set(tree, key.split("."), parsed):
            problems.append(f"override {text!r}: {key!r} goes through a value that is not a section")
    if problems:
        raise ConfigError(problems)
    return validate_tree(schema, tree, str(path) if path else "the configuration", origins)


def validate_tree(schema: type[Tree], tree: dict[str, Any], where: str, origins: Mapping[str, str] | None = None) -> Tree:
    """The `schema` of a plain tree; ConfigError listing every problem.

    `where` names the source in messages; `origins` has what to show instead for dotted keys that came from elsewhere.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_explain(schema, e, where, origins or {}) for e in error.errors()]) from error


def keys_of(schema: type[Section]) -> list[str]:
    """All keys, dotted."""
    return list(dict.fromkeys(f"{section}.{key}" for section in schema.model_fields for key in _fields(schema, section)))


def kinds_of(schema: type[Section], section: str) -> dict[str, type[Section]]:
    """By tag, the classes that a section may be of: those of a tagged union, or one without a tag."""
    annotation = schema.model_fields[section].annotation
    if isinstance(annotation, type):
        return {"": annotation}
    return {tag.tag: kind for kind, tag in map(get_args, get_args(annotation))}


def _fields(schema: type[Section], section: str) -> list[str]:
    return [key for kind in kinds_of(schema, section).values() for key in kind.model_fields]


def _example(schema: type[Section]) -> str:
    """A key with its default, for messages."""
    section = next(iter(schema.model_fields))
    key, first = next(iter(next(iter(kinds_of(schema, section).values())).model_fields.items()))
    return f"{section}.{key}={first.default}"


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}; see configs/")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level is a {type(tree).__name__}, expected sections such as `train:`")
    return tree or {}


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> bool:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            return False
    tree[keys[-1]] = value
    return True


def _text_keys(schema: type[Section]) -> set[str]:
    """Dotted keys whose value is a text or a path."""
    return {
        f"{section}.{key}"
        for section in schema.model_fields
        for kind in kinds_of(schema, section).values()
        for key, field in kind.model_fields.items()
        if get_origin(field.annotation) not in (dict, tuple)
        and {field.annotation, *get_args(field.annotation)} & {str, Path, Text, TextPath}
    }


def _explain(schema: type[Section], error: dict[str, Any], where: str, origins: Mapping[str, str]) -> str:
    loc = list(error["loc"])
    kinds = kinds_of(schema, loc[0]) if loc[0] in schema.model_fields else {}
    tag = loc.pop(1) if len(loc) > 1 and loc[1] in kinds else ""  # of the kind that the section's values chose
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    origin = [text for given, text in origins.items() if _is_within(key, given) or _is_within(given, key)]
    if error["type"] == "extra_forbidden":
        return f"{origin[-1] if origin else where}: unknown key {key}{_hint(schema, key, loc[0], tag)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "secret_in_options":  # the values must not reach a log
        return f"{'override' if origin else where}: {key}: {message}"
    if not origin:
        return f"{where}: {key} = {error['input']!r}: {message}"
    part = f" at {key}" if key not in origins else ""
    return f"{origin[-1]}{part}: {message}"


def _hint(schema: type[Section], key: str, section: str, tag: str) -> str:
    """What may be meant by an unknown key; `tag`: the kind of its section, if there are several."""
    known = keys_of(schema)
    if tag:
        if key in known:
            return f": no key of {tag} models"
        known = [f"{section}.{name}" for name in kinds_of(schema, section)[tag].model_fields]
    close = difflib.get_close_matches(key, [*known, *schema.model_fields], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known sections: {', '.join(schema.model_fields)}"


def _is_within(key: str, outer: str) -> bool:
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))
