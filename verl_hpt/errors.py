"""What a user can mend: the one error, and values that are checked as they are read, every problem of them named.

Settings are dataclasses: type, default, bounds and meaning stand at the key, and pydantic checks values strictly. It is
imported when a value is read, not where keys are declared: verl imports the plugin in every process.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """Something the user set, wrote or gave is wrong; the message says what, what was got, and what to set.

    The command line prints the message without a traceback and exits with status 2. A training run raises it before
    any model loads where that is possible.
    """


def raise_all(problems: list[str], head: str) -> None:
    """Raise one UserError that lists every problem; without one, do nothing."""
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n  - ".join([head, *problems]))


# --- settings ---------------------------------------------------------------------------------------------------------

WORDS = {"number": "a number", "integer": "a whole number", "string": "text", "boolean": "true or false"}
WORDS |= {"null": "null", "array": "a list", "object": "a mapping"}
BOUNDS = {"minimum": "at least", "ge": "at least", "exclusiveMinimum": "above", "maximum": "at most", "le": "at most",
          "exclusiveMaximum": "below", "minItems": "of at least"}  # fmt: skip
MOST = 50  # problems that one message lists: a row has thousands of numbers
WRONG_KEY = ("unexpected_keyword_argument", "extra_forbidden", "invalid_key")  # pydantic's names of errors


def checked(cls: type) -> type:
    """A frozen dataclass that ``read`` makes from a mapping. "1" is no 1, True is no 1, unknown keys are errors."""
    cls = dataclass(frozen=True)(cls)
    cls.__pydantic_config__ = {"strict": True, "extra": "forbid", "allow_inf_nan": False, "str_min_length": 1}
    # Strict would take instances alone; a mapping is what a config has.
    cls.__get_pydantic_core_schema__ = classmethod(lambda cls, source, handler: {**handler(source), "strict": False})
    return cls


def setting(default: Any, meaning: str, **bounds: float) -> Any:
    """A key of a checked class. default: a value, a function that makes one, or ``...``: it must be set.

    bounds: ge, gt, le, lt; an object that is no number must answer to them.
    """
    metadata = {"description": meaning, **bounds}
    if default is ...:
        return field(metadata=metadata)
    if callable(default) and isinstance(made := default(), list | dict):
        metadata["json_schema_extra"] = {"default": made}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


def read(kind: Any, value: Any, path: str) -> tuple[Any, list[str]]:
    """A plain value as a checked class (or a pydantic model), or None and problems: path, value, what it must be."""
    from pydantic import ValidationError

    adapter, schema = _adapter(kind)
    try:
        return adapter.validate_python(value), []
    except ValidationError as error:
        problems = list(_sentences(error.errors(include_url=False), schema, path))
        return None, [*problems[:MOST], *([f"... and {len(problems) - MOST} more"] if len(problems) > MOST else [])]


def rows(kind: Any, path: str) -> list[dict]:
    """Every key: key, type, default (absent where it must be set) and meaning, in words for people."""
    return list(_rows(_adapter(kind)[1], path))


def nearest(name: Any, known: Iterable) -> str:
    """The known name that is most like a misspelt one, as the end of a message; nothing where none is."""
    near = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    return "null" if value is None else repr(value)


@functools.cache
def _adapter(kind: Any) -> tuple[Any, dict]:
    """Pydantic's validator of a class, and its JSON schema."""
    from pydantic import TypeAdapter

    adapter = TypeAdapter(kind)
    schema = adapter.json_schema()
    return adapter, _inline(schema, schema.get("$defs", {}))


def _inline(node: Any, definitions: dict) -> Any:
    """A JSON schema with each reference replaced by what it refers to."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    target = definitions.get(str(node.get("$ref")).rpartition("/")[2], {})
    merged = {**target, **{name: item for name, item in node.items() if name not in ("$ref", "$defs")}}
    return {name: _inline(item, definitions) for name, item in merged.items()}


def _members(schema: dict) -> list[dict]:
    """The alternatives of a schema, null left out."""
    members = [member for part in schema["anyOf"] for member in _members(part)] if "anyOf" in schema else [schema]
    return [member for member in members if member.get("type") != "null"]


def _place(loc: tuple, schema: dict) -> tuple[tuple, dict, list[str], tuple]:
    """An error's path without the alternatives that pydantic tried, the schema there, the known keys beside it, and
    the alternatives that are mappings, each with the path at which it was tried."""
    steps, beside, tried, loc = [], [], [], [part for part in loc if part != "[key]"]
    while loc[len(members := _members(schema)) > 1 :]:
        if len(members) > 1:
            kind = loc.pop(0)
            if mapping := [member for member in members if "properties" in member and member["title"] == kind]:
                tried.append((tuple(steps), kind))
                members = mapping
        name = loc.pop(0)
        steps.append(f"[{name}]" if isinstance(name, int) and any("items" in m for m in members) else f".{name}")
        beside = [name for member in members for name in member.get("properties", ())]
        inner = [
            member.get("properties", {}).get(name) or member.get("additionalProperties") or member.get("items")
            for member in members
        ]
        schema = next((item for item in inner if isinstance(item, dict)), {})
    mappings = {member["title"] for member in _members(schema) if "properties" in member}
    tried += [(tuple(steps), kind) for kind in loc if kind in mappings]  # one that is wrong as a whole
    return tuple(steps), schema, beside, tuple(tried)


def _nearest_alternatives(placed: list[tuple]) -> list[tuple]:
    """Of several mappings that a value could be, the errors of the one whose keys are most like its own."""
    misfits: dict[tuple, dict[str, int]] = {}
    for kind, _, steps, _, _, tried in placed:
        for place, name in tried:
            of_place = misfits.setdefault(place, {})
            of_place[name] = of_place.get(name, 0) + (len(steps) == len(place) + 1) * (kind in ("missing", *WRONG_KEY))
    best = {place: min(counts, key=counts.get) for place, counts in misfits.items()}
    return [one for one in placed if all(best[place] == name for place, name in one[-1])]


def _sentences(errors: list[dict], schema: dict, root: str) -> Iterator[str]:
    """One sentence a place: of a union's alternatives the one that fits a value's form has the helpful problem."""
    placed = _nearest_alternatives([(error["type"], error, *_place(error["loc"], schema)) for error in errors])
    inner = {steps[:i] for _, _, steps, *_ in placed for i in range(len(steps))}
    inner |= {steps for kind, _, steps, *_ in placed if not kind.endswith("_type")}
    done = set()
    for kind, error, steps, of_value, beside, _ in placed:
        value, lack = error["input"], kind == "missing"
        place = steps[:-1] if lack else steps
        if (place, lack) in done or (kind.endswith("_type") and steps in inner):
            continue
        done.add((place, lack))
        path = root + "".join(place)
        if lack:
            missing = [at[-1][1:] for other, _, at, *_ in placed if other == kind and at[:-1] == place]
            yield f"{path}: needs {', '.join(missing)}; got {', '.join(map(str, value)) or 'nothing'}"
        elif kind in WRONG_KEY:
            known = ", ".join(beside) + nearest(steps[-1][1:], beside)
            yield f"{path}: unknown key (value {shown(value)}); one of {known}"
        elif kind == "value_error":
            yield from (f"{path}.{line}" for line in str(error["ctx"]["error"]).splitlines())
        elif "[key]" in error["loc"]:
            yield f"{path}: its name must be text, got {type(value).__name__}"
        else:
            yield f"{path}={shown(value)}: must be {_must(kind, value, of_value)}"


def _must(kind: str, value: Any, schema: dict) -> str:
    if kind == "finite_number" or (kind == "float_type" and type(value) is int):  # an int beyond every float
        return f"{describe(schema)}, and finite"
    if kind == "string_too_short":
        return f"{describe(schema)}, and not empty"
    if kind == "literal_error":
        return describe(schema) + nearest(
            value, [name for member in _members(schema) for name in member.get("enum", ())]
        )
    if kind.endswith("_type"):
        got = "" if value is None or "properties" in schema else f", got {type(value).__name__}"
        return describe(schema) + got
    return describe(schema) + (f": {schema['description']}" if "description" in schema else "")


def describe(schema: dict, among: bool = False) -> str:
    """What a value may be, in words. among: as one of several alternatives."""
    if "anyOf" in schema:
        parts, several = schema["anyOf"], len(_members(schema)) > 1
        text = " or ".join(sorted((describe(part, several) for part in parts), key=lambda word: word != "null"))
    elif "enum" in schema:
        text = f"one of {', '.join(map(str, schema['enum']))}"
    elif "const" in schema:
        text = repr(schema["const"])
    elif "properties" in schema:
        keys = ", ".join(schema["properties"])
        name = schema["title"].lower()
        text = f"{'an' if name[0] in 'aeio' else 'a'} {name} {{{keys}}}" if among else f"a mapping with keys {keys}"
    else:
        text = WORDS.get(schema.get("type"), "any value")
    bounds = " and ".join(f"{word} {schema[bound]:g}" for bound, word in BOUNDS.items() if bound in schema)
    return f"{text}{',' if bounds and 'anyOf' in schema else ''} {bounds}".strip()


def _rows(schema: dict, path: str) -> Iterator[dict]:
    for name, item in schema["properties"].items():
        where, members = f"{path}.{name}", _members(item)
        inner = members[0] if len(members) == 1 else {}
        if "properties" not in item:
            default = {} if name in schema.get("required", ()) else {"default": item["default"]}
            yield {"key": where, "type": describe(item), **default, "meaning": item["description"]}
        inner, where = (inner["items"], f"{where}[]") if "items" in inner else (inner, where)
        if "properties" in inner:
            yield from _rows(inner, where)
