"""A plain value from a config as the type that a field asks for, or what is wrong with it."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

WRONG: Any = object()  # stands where a value could not be built
PLAIN = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}


def build(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """A value of the wanted type: a dataclass, Literal, union, list, dict or plain type.

    What cannot be built is left out; problems gains its path, its value and what it may be. ``WRONG`` is returned where
    nothing is left.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return _dataclass(kind, value, path, problems)
        problems.append(f"{path}={value!r}: must be a mapping with keys {', '.join(_keys(kind))}")
        return WRONG
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        likely = [arg for arg in kinds if _could_be(arg, value)]  # its problems are the helpful ones
        if likely or len(kinds) == 1:
            return build((likely or kinds)[0], value, path, problems)
    elif origin is Literal:
        if value in args:
            return value
        problems.append(f"{path}={value!r}: must be one of {', '.join(map(str, args))}{nearest(value, args)}")
        return WRONG
    elif origin is list and isinstance(value, (list, tuple)):
        items = [build(args[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
        return [item for item in items if item is not WRONG]
    elif origin is dict and isinstance(value, Mapping):
        items = {str(key): build(args[1], item, f"{path}.{key}", problems) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not WRONG}
    elif kind is float and _could_be(float, value):
        if abs(value) <= sys.float_info.max:  # neither inf nor nan, nor a whole number beyond
            return float(value)
        problems.append(f"{path}={value!r}: must be a number that is finite")
        return WRONG
    elif kind in (int, str, bool) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    problems.append(f"{path}={value!r}: must be {_name(kind)}, got {type(value).__name__}")
    return WRONG


def _dataclass(kind: Any, value: Mapping, path: str, problems: list[str]) -> Any:
    """Wrong keys keep their defaults; WRONG where a required one is missing or wrong."""
    hints, built = typing.get_type_hints(kind), {}
    for key, item in value.items():
        if key in hints:
            built[key] = build(hints[key], item, f"{path}.{key}", problems)
        else:
            known = f"one of {', '.join(_keys(kind))}{nearest(key, hints)}"
            problems.append(f"{path}.{key}: unknown key (value {item!r}); {known}")
    required = [f.name for f in dataclasses.fields(kind) if _required(f)]
    if missing := [name for name in required if name not in built]:
        problems.append(f"{path}: needs {', '.join(missing)}; got {', '.join(map(str, value)) or 'nothing'}")
    built = {key: item for key, item in built.items() if item is not WRONG}
    return kind(**built) if all(name in built for name in required) else WRONG


def nearest(key: Any, known: Iterable) -> str:
    """The known name that is most like a misspelt one, as the end of a message; nothing where none is."""
    near = difflib.get_close_matches(str(key), [str(name) for name in known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _could_be(kind: Any, value: Any) -> bool:
    """Whether a value has the form of this member of a union."""
    origin = typing.get_origin(kind)
    if isinstance(value, Mapping):
        return dataclasses.is_dataclass(kind) or origin is dict
    if isinstance(value, (list, tuple)):
        return origin is list
    if isinstance(value, str):
        return kind is str
    return kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _keys(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _name(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(arg) for arg in typing.get_args(kind))
    if dataclasses.is_dataclass(kind):
        return f"a {kind.__name__.lower()} {{{', '.join(_keys(kind))}}}"
    return {list: "a list", dict: "a mapping"}.get(origin) or PLAIN.get(kind, str(kind))
