"""Typed configuration: the defaults of a dataclass, then a YAML file, then `key=value` words.

One YAML file describes a whole run; each command reads the section that bears its name
(`data_prep:`, `train:`, `evaluation:`), and its `key=value` words are keys of that section.

A configuration is a tree of frozen dataclasses decorated with `@config`. Every key of a YAML file
is a field of one of them; an unknown key is refused and the nearest valid one is named.

    @config
    class Run:
        seed: int = 17
        optimizer: Optimizer = field(default_factory=Optimizer)

    run = load_config(Run, "train", Path("configs/demo.yaml"), ["optimizer.eps=1e-8"])
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")

SECTIONS = ("data_prep", "train", "evaluation")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and says what to do."""


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that checks types and refuses unknown keys."""
    decorate = pydantic_dataclass(kw_only=True, frozen=True, config=ConfigDict(extra="forbid"))
    return typing.cast(type[T], decorate(cls))


def load_config(
    cls: type[T], section: str, path: Path | None = None, overrides: Sequence[str] = ()
) -> T:
    """The configuration of type `cls`: defaults, then `section` of `path`, then `overrides`.

    Overrides are words `a.b=value`; values are read as YAML, so `lengths=[1024,8192]` and
    `resume=true` mean what they say.
    Raises ConfigError for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    values = _read_section(path, section) if path is not None else {}
    for word in overrides:
        _apply_override(values, word)
    where = f"the section {section!r} of {path}" if path is not None else "the command line"
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ConfigError(_explain(cls, error, where, values)) from None


def config_to_dict(value: Any) -> dict[str, Any]:
    """A configuration as plain values for JSON and YAML (paths become strings)."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def config_to_yaml(value: Any) -> str:
    """A configuration as a YAML text that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config_to_dict(value), sort_keys=False, allow_unicode=True)


def _read_section(path: Path, section: str) -> dict[str, Any]:
    sections = _read_yaml(path)
    for name in sections:
        if name not in SECTIONS:
            nearest = difflib.get_close_matches(str(name), SECTIONS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown section {name!r} in {path}; did you mean {nearest!r}?")
    values = sections.get(section)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} has no section `{section}:` with `key: value` lines")
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r} is not of the form key=value")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {parent} holds a value, so it has no key {leaf!r}")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of {key} is not valid YAML") from None


def _explain(cls: type, error: ValidationError, where: str, values: dict[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location)
        if problem["type"] == "unexpected_keyword_argument":
            fields = _fields_at(cls, location[:-1])
            nearest = difflib.get_close_matches(location[-1], fields, n=1, cutoff=0.0)
            advice = f"; did you mean {'.'.join([*location[:-1], *nearest])!r}?" if nearest else ""
            if key in SECTIONS:
                advice = f"; words are keys of a section already: leave {key + '.'!r} away"
            lines.append(f"unknown key {key!r} in {where}{advice}")
        elif problem["type"] in ("missing", "missing_argument"):
            lines.append(f"{where} lacks the key {key!r}{_named_like(location, values)}")
        elif problem["type"] == "int_parsing" and _has_exponent(problem["input"]):
            lines.append(
                f"{key} in {where}: {problem['input']!r} is no whole number; write it out, as in "
                "1_000_000_000"
            )
        else:
            what = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key or 'the configuration'} in {where}: {what}")
    return "\n".join(lines)


def _has_exponent(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[\d._]+[eE]\+?\d+", text) is not None


def _named_like(location: Sequence[str], values: dict[str, Any]) -> str:
    """A hint where what lacks a key has a name much like one beside it: a misspelt word makes a new
    entry of a mapping such as `phases`."""
    if len(location) < 2:
        return ""
    *around, name, _ = location
    node: Any = values
    for part in around:
        node = node.get(part) if isinstance(node, dict) else None
    others = [str(other) for other in node if other != name] if isinstance(node, dict) else []
    nearest = difflib.get_close_matches(name, others, n=1)
    return f"; did you mean {'.'.join([*around, *nearest])!r}?" if nearest else ""


def _fields_at(cls: Any, location: Sequence[str]) -> list[str]:
    """The field names of the dataclass that `location` leads to from `cls`."""
    node = cls
    for part in location:
        node = _dataclass_in(node) or node
        if dataclasses.is_dataclass(node):
            hints = typing.get_type_hints(node)
            # pydantic puts union members and list positions into the location; they are no fields.
            node = hints.get(part, node)
    node = _dataclass_in(node)
    return [f.name for f in dataclasses.fields(node)] if node is not None else []


def _dataclass_in(node: Any) -> Any:
    """The dataclass that a type such as `X | None` or `list[X]` is about, or None."""
    if dataclasses.is_dataclass(node):
        return node
    if isinstance(node, types.GenericAlias | types.UnionType) or typing.get_origin(node):
        for argument in typing.get_args(node):
            found = _dataclass_in(argument)
            if found is not None:
                return found
    return None
