"""Fields that `data convert --keep` carries over: their names, their types, and that no value is bent to fit a type.

Arrow writes 0.5 into a column of integers as 0 and drops struct keys that the column lacks, both without a word; so
every kept value is compared with its column's type before it is written.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from verl_hpt.data.read import BadRow
from verl_hpt.demos.encode import plain
from verl_hpt.errors import UserError

STANDARD = ("data_source", "ability", "reward_model", "prompt", "target")
OURS = {"extra_info": ("index", "split", "file", "row"), "reward_model": ("style", "ground_truth")}
_TYPES = "double, int64, string, bool, list<double>, list<list<double>>"


def parse_keep(specs: list[str]) -> dict[str, Any]:
    """The names to keep, each with its Arrow type, None where no type was given; raises `UserError`."""
    keep = {}
    for spec in specs:
        head, _, tail = spec.rpartition(":")
        kind = _type(tail) if head else None
        name = head if kind is not None else spec
        parent, _, key = name.partition(".")
        if name in STANDARD:
            more = f"; its further keys can be kept: --keep {name}.KEY" if name in OURS else ""
            raise UserError(f"--keep {name}: convert writes that column itself{more}")
        if key in OURS.get(parent, ()):
            own = "; --keep extra_info lets a row's own index and split win" if parent == "extra_info" else ""
            raise UserError(f"--keep {name}: convert writes that field itself{own}")
        if name == "extra_info" and kind is not None:
            raise UserError(f"--keep {spec}: it has a type for each key; name one as extra_info.KEY:{tail}")
        if name in keep:
            raise UserError(f"--keep {name} is given twice")
        keep[name] = kind
    return keep


def _type(text: str):
    import pyarrow as pa

    text = text.strip()
    if text.startswith("list<") and text.endswith(">"):
        inner = _type(text[len("list<") : -1])
        return None if inner is None else pa.list_(inner)
    try:
        return pa.type_for_alias(text)
    except ValueError:
        return None


def carried(file: str, number: int, row: dict, keep: dict[str, Any], seen: set[str]) -> tuple[dict, dict, dict]:
    """What a row has under the kept names: further columns, keys of extra_info, keys of reward_model.

    A column that is not there is an error (a misspelt name), unless it was `seen` in an earlier row: then it is null.
    """
    columns: dict = {}
    inner: dict[str, dict] = {"extra_info": {}, "reward_model": {}}
    for name, kind in keep.items():
        parent, _, key = name.partition(".")
        if name == "extra_info":
            own = {k: v for k, v in _object(file, number, row, name).items() if k not in OURS[name] or _ours(k, v)}
            inner[name] = {**own, **inner[name]}
        elif key and parent in inner:
            value = _object(file, number, row, parent).get(key)
            if value is not None:
                inner[parent][key] = _cast(value, kind)
        elif name in row:
            columns[name] = _cast(plain(row[name]), kind)
            seen.add(name)
        elif name in seen:
            columns[name] = None
        else:
            tail = name.rpartition(":")[2]
            hint = f"; `{tail}` is no type known here ({_TYPES})" if ":" in name else ""
            there = ", ".join(f"`{k}`" for k in row) or "no fields"
            raise BadRow(file, number, name, f"no such field (--keep); the row has {there}{hint}")
    return columns, inner["extra_info"], inner["reward_model"]


def _object(file: str, number: int, row: dict, name: str) -> dict:
    value = plain(row.get(name))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRow(file, number, name, f"must be an object with named fields to be kept, got {type(value).__name__}")
    return value


def _ours(key: str, value: Any) -> bool:
    """Whether a row's own value may stand under a name that is otherwise ours."""
    if key == "index":
        return type(value) is int and -(2**63) <= value < 2**63
    return key == "split" and isinstance(value, str)


def _cast(value: Any, kind) -> Any:
    """Under a type of text that the user named, whatever is not text becomes JSON text: the way out for mixed types."""
    import pyarrow as pa

    if kind is None or value is None or isinstance(value, str | bytes) or not pa.types.is_string(kind):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def kept_columns(rows: list[dict], keep: dict[str, Any], skip: Callable[[BadRow], None]) -> tuple[list, list, list]:
    """Arrow fields of the further columns, of extra_info's and reward_model's further keys, by the rows looked at.

    A row whose value fits no type that the rows before it allow goes to `skip`, and out of `rows` if that returns.
    """
    inner = {}
    for parent, ours in OURS.items():
        names = dict.fromkeys(k for row in rows for k in row[parent] if k not in ours)
        for name, kind in keep.items():
            key = name.partition(".")[2] if name.startswith(f"{parent}.") else ""
            if key and kind is None and key not in names:
                problem = f"none of the first {len(rows)} rows has it; name its type if later ones do"
                raise UserError(f"--keep {name}: {problem}, as --keep {name}:string")
            if key:
                names[key] = None
        inner[parent] = [
            (k, _column(f"{parent}.{k}", rows, keep, skip, lambda r, p=parent, k=k: r[p].get(k))) for k in names
        ]
    top = [n for n in keep if n != "extra_info" and n.partition(".")[0] not in OURS]
    columns = [(name, _column(name, rows, keep, skip, lambda r, name=name: r[name])) for name in top]
    return columns, inner["extra_info"], inner["reward_model"]


def _column(name: str, rows: list[dict], keep: dict[str, Any], skip, value_of: Callable[[dict], Any]):
    import pyarrow as pa

    if keep.get(name) is not None:
        return keep[name]
    errors = (pa.ArrowException, OverflowError, TypeError, ValueError)
    try:
        kind = pa.array([value_of(row) for row in rows]).type
    except errors:
        good: list = []
        for row in list(rows):
            value = value_of(row)
            try:
                kind = pa.array([*good, value]).type
                good.append(value)
            except errors as error:
                info = row["extra_info"]
                problem = f"fits no one type with the rows before it ({_line(error)}), got {value!r:.80}"
                if isinstance(error, OverflowError):
                    problem = f"is an integer beyond 64 bits, got {value!r:.80}"
                skip(BadRow(info["file"], info["row"], name, f"{problem}: --keep {name}:string writes it as text"))
                rows[:] = [r for r in rows if r is not row]
        kind = pa.array(good).type
    if _hollow(kind):
        problem = "it, or a part of it, has only empty objects in the rows looked at, which parquet cannot hold"
        raise UserError(f"--keep {name}: {problem}; --keep {name}:string writes them as JSON text")
    return kind


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:160]


def _hollow(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind):
        return _hollow(kind.value_type)
    return pa.types.is_struct(kind) and (not kind.num_fields or any(_hollow(f.type) for f in kind))


@lru_cache(maxsize=256)
def _fitting(kind) -> frozenset | None:
    """The Python types that Arrow writes unchanged; None where only a try can tell."""
    import pyarrow as pa

    kinds = pa.types
    for test, fits in (
        (kinds.is_null, ()),
        (kinds.is_boolean, (bool,)),
        (kinds.is_integer, (int,)),
        (kinds.is_float64, (int, float)),
        (kinds.is_string, (str,)),
        (kinds.is_binary, (bytes,)),
    ):
        if test(kind):
            return frozenset(fits) | {type(None)}
    return None


@lru_cache(maxsize=256)
def _largest(kind) -> float | None:
    """From where on a finite number becomes infinite in a type narrower than Python's floats."""
    import pyarrow as pa

    return 65520.0 if pa.types.is_float16(kind) else 3.4028235677973366e38 if pa.types.is_float32(kind) else None


def misfit(value: Any, kind, path: str) -> tuple[str, Any, Any] | None:
    """(path, value, type wanted there) of the first part that the type would bend or drop; None for a key it lacks."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_list(kind):
        if not isinstance(value, list):
            return path, value, kind
        fits = _fitting(kind.value_type)
        if fits is not None and fits.issuperset(map(type, value)):  # long lists of numbers, at C's speed
            return None
        parts = ((v, kind.value_type, f"{path}[{i}]") for i, v in enumerate(value))
        return next(filter(None, (misfit(*part) for part in parts)), None)
    if pa.types.is_struct(kind):
        if not isinstance(value, dict):
            return path, value, kind
        names = {f.name: f.type for f in kind}
        late = next((k for k in value if k not in names), None)
        if late is not None:
            return f"{path}.{late}", value[late], None
        return next(filter(None, (misfit(v, names[k], f"{path}.{k}") for k, v in value.items())), None)
    largest = _largest(kind)
    if largest is not None:  # rounding is no harm, but what is larger becomes infinite
        fine = type(value) in (int, float) and not largest <= abs(value) < float("inf")
        return None if fine else (path, value, kind)
    fits = _fitting(kind)
    if fits is None:
        try:
            same = pa.scalar(value, kind).as_py() == value
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            same = False
        return None if same else (path, value, kind)
    whole = isinstance(value, float) and value.is_integer() and pa.types.is_integer(kind)
    return None if type(value) in fits or whole else (path, value, kind)


def misfit_problem(bad: tuple[str, Any, Any], field, named: dict[str, Any], seen: int, peeked: int = 0) -> str:
    """What is wrong in a field of the schema, and how to go on; `seen` is the number of rows before this one.

    The first `peeked` rows settled the type: looking at more rows helps none of them.
    """
    import pyarrow as pa

    path, value, kind = bad
    name, column = field.name, field.type
    if name in OURS:  # the type to name is that of the key
        name = ".".join(path.partition("[")[0].split(".")[:2])
        column = next((f.type for f in column if f"{field.name}.{f.name}" == name), None)
    remedy = f"--keep {name}:{_wider(value, kind, column)}"
    if named.get(name) is not None:
        return f"must be {_name(kind)} as --keep says, got {value!r:.80}: name a wider type, as {remedy}"
    remedy = f"name the type: {remedy}"
    if seen >= peeked:
        remedy = f"convert again with --peek {seen + 1}, or {remedy}"
    if kind is None or pa.types.is_null(kind):
        return f"appears first here, after {seen} rows without it: {remedy}"
    return f"must be {_name(kind)}, as in the rows that settled its type, got {value!r:.80}: {remedy}"


def _wider(value: Any, kind, column) -> str:
    """A type for the whole column, None for one that has none yet, that takes this value too; text takes all."""
    import pyarrow as pa

    text = "null" if column is None else _name(column)
    if column is None or (kind is not None and pa.types.is_null(kind)):
        try:
            text = text.replace("null", _name(pa.array([value]).type))
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            text = ""
    elif isinstance(value, float) and kind is not None and pa.types.is_integer(kind):
        text = re.sub(r"u?int[0-9]+", "double", text)
    elif kind is not None and _largest(kind) and type(value) in (int, float):
        text = re.sub(r"\b(half)?float\b", "double", text)
    elif isinstance(value, bytes) and kind is not None and pa.types.is_string(kind):
        text = text.replace("string", "binary")
    else:
        text = ""
    return "string (as JSON text)" if not text or "struct" in text or "null" in text else text


def _name(kind) -> str:
    """A type as --keep takes it."""
    import pyarrow as pa

    return f"list<{_name(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)
