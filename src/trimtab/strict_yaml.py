"""Strict YAML and strict dataclasses: nothing guessed, nothing ignored.

YAML 1.1 reads ``no`` as False, ``1e-4`` as text and the last of two equal keys as the only one. Here every
scalar stays text until the dataclass field says what it should be, so ``language: no`` is Norwegian and
``learning_rate: 1e-4`` a number; duplicate keys, unknown keys and tags are refused by name.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from trimtab.errors import RecipeError

T = TypeVar("T")

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")  # NUL, and halves of a character, which UTF-8 does not have
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


# Aliases can nest a few lines into a value whose full text has no end.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_show = _SHORT.repr


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves plain scalars as text (null aside), and refuses duplicate keys and what is no text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [("tag:yaml.org,2002:null", _NULL)] for first in ("~", "n", "N", "")
    }

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (bad := _NO_TEXT.search(value)):
            problem = f"{value!r} has the character {bad[0]!r}, which no file name or text can hold; leave it out"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in seen:
                problem = f"duplicate key {key.value!r}, first given in line {seen[key.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


def parse(text: str, where: str) -> Any:
    """Parse one YAML document; scalars come back as text or None, collections as dict and list.

    Args:
        where: what to call the text in messages, for example the file's path.

    Raises:
        RecipeError: malformed YAML, duplicate keys, tags; the message has the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        if "could not determine a constructor for the tag" in problem:
            tag = problem.split("tag ", 1)[1].replace("tag:yaml.org,2002:", "!!")
            problem = f"tag {tag} is refused; write plain text, numbers, lists and mappings"
        raise RecipeError(f"{where}{line}: {problem}") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{where}: cannot be read as YAML ({type(error).__name__}: {error})") from error


def from_mapping(cls: type[T], mapping: Any, where: str) -> T:
    """Build a dataclass, and those nested in it, from plain dicts, lists and scalars.

    A field's annotation decides: str, int, float, bool, Literal, ``X | None``, ``tuple[X, ...]``,
    ``dict[str, X]`` and dataclasses. One item stands for a tuple of one; text stands for a dataclass that
    names a ``SHORTHAND`` field. Keys may be missing where the field has a default.

    Args:
        where: what to call the mapping in messages, for example the file's path.

    Raises:
        RecipeError: unknown or missing keys (the known ones are named), values of the wrong type, and
            whatever the dataclass itself refuses, each with its dotted path.
    """
    return _build(cls, mapping, where, ())


def to_mapping(value: Any) -> Any:
    """Inverse of `from_mapping`: dataclasses become dicts and tuples lists, ready for JSON or YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_mapping(item) for item in value]
    if isinstance(value, dict):
        return {key: to_mapping(item) for key, item in value.items()}
    return value


def to_yaml(value: Any) -> str:
    """YAML text that `parse` and `from_mapping` read back as an equal dataclass."""
    return yaml.safe_dump(to_mapping(value), sort_keys=False, allow_unicode=True, width=100)


def apply_overrides(cls: type, mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with each ``a.b=value`` put in its place; values are parsed as YAML.

    A value replaces what was there as a whole: lists are given anew, ``x=null`` clears an optional field.

    Raises:
        RecipeError: an override without ``=``, an unknown key, a path through something that is no section, a value
            that is no YAML or has a comment.
    """
    result = copy.deepcopy(dict(mapping))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"override {override!r} must have the form key=value, for example seed=1")
        _put(cls, result, path.strip().split("."), _override_value(path.strip(), text, override), override)
    return result


def _override_value(key: str, text: str, override: str) -> Any:
    where, inner = f"override {override!r}", text.strip().strip("\"'").replace("'", "''")
    remedy = f"put quotes around the value and the whole, \"{key}='{inner}'\""
    try:
        yaml.compose(text, _Loader)
        tokens = pairwise(yaml.scan(text, _Loader))
        if any("#" in text[one.end_mark.index : other.start_mark.index] for one, other in tokens):
            raise RecipeError(f"{where}: what follows # would be left out as a comment of YAML: {remedy}")
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{where} is not YAML ({error.problem}): {remedy}") from error
    except (yaml.YAMLError, RecursionError):
        pass  # `parse` says so
    return parse(text, where)


def _put(cls: type, mapping: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    node = mapping
    for depth, key in enumerate(path):
        hints = _hints(cls)
        if key not in hints:
            raise RecipeError(f"override {override!r}: {_unknown(cls, [key], tuple(path[:depth]))}")
        if depth == len(path) - 1:
            node[key] = value
            return
        inner = _without_none(hints[key])
        if not dataclasses.is_dataclass(inner):
            whole = ".".join(path[: depth + 1])
            raise RecipeError(f"override {override!r}: {whole} has no keys; give {whole}=... as a whole")
        cls = inner if isinstance(inner, type) else type(inner)
        child = node.get(key)
        if isinstance(child, (str, os.PathLike)) and (short := getattr(cls, "SHORTHAND", None)):
            child = {short: child}
        elif child is None:
            child = {}
        elif not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {'.'.join(path[: depth + 1])} is {_show(child)}, no section")
        node[key] = child
        node = child


def _build(cls: Any, raw: Any, where: str, path: tuple[str, ...]) -> Any:
    short = getattr(cls, "SHORTHAND", None)
    if isinstance(raw, (str, os.PathLike)) and short:
        raw = {short: raw}
    hints = _hints(cls)
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{_at(where, path)} must be a section with the keys {_listed(hints)}, not {_show(raw)}")
    if unknown := [str(key) for key in raw if key not in hints]:
        raise RecipeError(f"{where}: {_unknown(cls, unknown, path)}")
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in raw]:
        raise RecipeError(f"{_at(where, path)} needs {_listed(missing)}; it has the keys {_listed(hints)}")
    values = {key: _coerce(value, hints[key], where, (*path, key)) for key, value in raw.items()}
    try:
        return cls(**values)
    except RecipeError as error:
        # The dataclass starts its message with the field's name; the section goes before it.
        prefix = "".join(f"{part}." for part in path)
        raise RecipeError(f"{where}: {prefix}{error}") from error


def _coerce(value: Any, kind: Any, where: str, path: tuple[str, ...]) -> Any:
    inner = _without_none(kind)
    if inner is not kind:
        return None if value is None else _coerce(value, inner, where, path)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, path)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        if value is None:
            raise RecipeError(f"{_at(where, path)} is empty; write [] for an empty list")
        items = value if isinstance(value, (list, tuple)) else [value]
        name = path[-1]
        return tuple(_coerce(item, arguments[0], where, (*path[:-1], f"{name}[{i}]")) for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{_at(where, path)} must be a mapping, not {_show(value)}")
        return {str(key): _coerce(item, arguments[1], where, (*path, str(key))) for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            hint = _hint(value, [str(choice) for choice in arguments]) if isinstance(value, str) else ""
            raise RecipeError(f"{_at(where, path)}={_show(value)} must be one of {_listed(arguments)}{hint}")
        return value
    wanted, convert = _SCALARS[kind]
    converted = convert(value)
    if converted is None:
        raise RecipeError(f"{_at(where, path)}={_show(value)} must be {wanted}")
    return converted


def _text(value: Any) -> str | None:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value):
        return int(value)
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _boolean(value: Any) -> bool | None:
    if isinstance(value, str):
        return _BOOLEANS.get(value.lower())
    return value if isinstance(value, bool) else None


_SCALARS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("text (in quotes if it is null or empty)", _text),
    int: ("a whole number", _integer),
    float: ("a finite number", _number),
    bool: ("true or false", _boolean),
}


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _without_none(kind: Any) -> Any:
    """X for ``X | None``, otherwise the annotation itself."""
    if get_origin(kind) in (Union, types.UnionType):
        others = [argument for argument in get_args(kind) if argument is not type(None)]
        if len(others) == 1:
            return others[0]
    return kind


def _at(where: str, path: Sequence[str]) -> str:
    return f"{where}: {'.'.join(path)}" if path else where


def _unknown(cls: Any, keys: list[str], path: tuple[str, ...]) -> str:
    hints = _hints(cls)
    section = ".".join(path) or "the recipe"
    hint = _hint(keys[0], list(hints))
    if not hint and (deeper := [dotted for dotted in _dotted(cls) if dotted.split(".")[-1] == keys[0]]):
        hint = f"; did you mean {'.'.join((*path, deeper[0]))!r}?"
    return f"{section} has no {_listed(keys)}{hint}; it has the keys {_listed(hints)}"


def _dotted(cls: Any, prefix: str = "") -> Iterable[str]:
    for name, hint in _hints(cls).items():
        inner = _without_none(hint)
        if dataclasses.is_dataclass(inner):
            yield from _dotted(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _hint(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)
