"""What a dataset's columns say of each demonstration beside its text: reward, weights, a teacher's log-probs ..."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_hpt.demos.encode import Demo, EncodedDemo, Unusable, demonstrations, encode_all, plain

_PACKED = "verl-hpt packed: "  # what a text of ours begins with
PER_TOKEN = ("teacher_log_prob", "token_weights")
REQUIRED = ("reward", "other_log_prob", "teacher_log_prob")  # a demonstration without it cannot be trained on
ROUNDING = 1e-3  # log-probs up to here count as 0


@dataclass(frozen=True)
class DemoColumns:
    """Names of the optional columns beside the demonstrations' own; None where there is none.

    Each holds one value for a row with one demonstration, or a list with one value for each demonstration.
    """

    reward: str | None = None  # a number
    log_likelihood: str | None = None  # a number: mean log-prob a token, nats
    other_log_prob: str | None = None  # a number: the same under other models
    teacher_log_prob: str | None = None  # (tokens,) log π of the model that wrote it, at most 0
    token_weights: str | None = None  # (tokens,) at least 0
    source: str | None = None  # text

    def named(self) -> dict[str, str]:
        """The columns that there are."""
        return {name: column for name, column in vars(self).items() if column is not None}


def read_demos(
    rows: Sequence[tuple[Mapping, Sequence[int] | None, list[dict] | None]],
    key: str,
    columns: DemoColumns,
    *encoding: Any,
    skip: Callable[[int], bool] = lambda place: False,
) -> list[list[Demo]]:
    """The demonstrations of each row as training has them: tokens and checked values, or why there are none.

    rows: a row's cells, its prompt's tokens and messages. encoding: the arguments of ``demos.encode_all`` from the
    tokenizer on. skip: places in the cell that are not asked for, and left as they are.
    """
    found, asked = [], []
    for row, prompt_ids, messages in rows:
        try:
            found.append(row_demos(row, key, columns))
            asked += [(demo, prompt_ids, messages) for demo in found[-1] if not skip(demo.index)]
        except Unusable as bad:
            found.append([Demo(content, i, bad=bad) for i, content in enumerate(demonstrations(row.get(key)))])
    encode_all(asked, *encoding)
    for demo in (demo for demo, *_ in asked if demo.bad is None):
        try:
            demo.values = {**demo.values, **check_values(demo, columns, demo.encoded)}
        except Unusable as bad:
            demo.bad = bad
    return found


def row_demos(row: Mapping, key: str, columns: DemoColumns | None = None) -> list[Demo]:
    """The demonstrations of a row, each with its own columns' values, not yet checked.

    Raises `Unusable("bad_column")` where a column has another number of values than there are demonstrations.
    """
    raw = demonstrations(row.get(key))
    if not raw:
        return []
    named = (columns or DemoColumns()).named()
    values = {name: _spread(row.get(column), len(raw), name, column) for name, column in named.items()}
    return [
        Demo(content, i, {name: of[i] for name, of in values.items() if of[i] is not None})
        for i, content in enumerate(raw)
    ]


def _spread(cell: Any, count: int, name: str, column: str) -> list:
    kinds = set(map(type, cell)) if isinstance(cell, list) else set()
    if not kinds or not kinds <= {float, int, type(None)}:  # plain already: thousands of numbers are looked at once
        cell = plain(cell)
        kinds = set(map(type, cell)) if isinstance(cell, list) else set()
    if cell is None or (isinstance(cell, list) and kinds <= {type(None)}):
        return [None] * count
    one = not isinstance(cell, list) or (name in PER_TOKEN and list not in kinds)
    if one and count != 1:
        raise Unusable("bad_column", f"{column} has one value for {count} demonstrations")
    values = [cell] if one else cell
    if len(values) != count:
        raise Unusable("bad_column", f"{column} has {len(values)} values for {count} demonstrations")
    return values


def check_values(demo: Demo, columns: DemoColumns, encoded: EncodedDemo | None = None) -> dict[str, np.ndarray]:
    """Raise `Unusable("bad_column")` for a value that is not what its column holds.

    encoded: the demonstration's tokens, where known: per-token columns must have a value for each of them.

    Returns:
        The per-token columns that have values, as (tokens,) float64.
    """
    of_tokens = {}
    for name, column in columns.named().items():
        value = demo.values.get(name)
        if value is None and name in REQUIRED:
            raise Unusable("bad_column", f"{column} has no value for demonstration {demo.index + 1}")
        if value is None:
            continue
        if name == "source":
            if not isinstance(value, str):
                raise Unusable("bad_column", f"{column} must hold text, got {str(value)[:80]}")
            continue
        given = value if name in PER_TOKEN else [value]
        numbers = _finite(given)
        if numbers is None:
            raise Unusable("bad_column", f"{column} must hold finite numbers, got {str(value)[:80]}")
        if name.endswith(("log_prob", "likelihood")) and (numbers > ROUNDING).any():
            raise Unusable("bad_column", f"{column} must hold log-probabilities, at most 0, got {max(given)}")
        if name == "token_weights" and ((numbers < 0).any() or not numbers.any()):
            raise Unusable("bad_column", f"{column} must hold weights of 0 or more, and one above 0")
        if name not in PER_TOKEN:
            continue
        of_tokens[name] = numbers
        if encoded is None:
            continue
        if len(numbers) != len(encoded.ids):
            detail = f"{column} has {len(numbers)} values for {len(encoded.ids)} tokens, EOS included"
            raise Unusable("bad_column", detail)
        if name == "token_weights" and not (numbers * np.frombuffer(bytes(encoded.mask), np.uint8)).any():
            raise Unusable("bad_column", f"{column} has no weight above 0 on what the assistant says")
    return of_tokens


def packed(rows: Sequence[dict], collate: Callable[[list[dict]], dict]) -> dict:
    """A batch as ``collate`` makes it, with each uneven list of lists as one text; ``unpacked`` is the way back.

    verl's agent loop makes an array of every column (``np.array([value] * n)``), which fails for lists of different
    lengths in a list, and with it every rollout: demonstrations of several turns, weights of several demonstrations.
    """
    return collate([{name: _pack(value) for name, value in row.items()} for row in rows])


def unpacked(value: Any) -> Any:
    """What ``packed`` was given."""
    return json.loads(value[len(_PACKED) :]) if isinstance(value, str) and value.startswith(_PACKED) else value


def _pack(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_PACKED):  # a dataset's own text, which is no JSON of ours
        return _PACKED + json.dumps(value)
    if not isinstance(value, list) or not any(issubclass(kind, list | np.ndarray) for kind in set(map(type, value))):
        return value
    try:
        np.array([value])
    except ValueError:
        try:
            return _PACKED + json.dumps(plain(value))
        except TypeError:  # bytes, dates: no column of ours
            return value
    return value


def _finite(values: Any) -> np.ndarray | None:
    """A list's values as float64, or None where one of them is no finite number (a bool is none)."""
    if not isinstance(values, list):
        return None
    if not all(issubclass(kind, int | float) and kind is not bool for kind in set(map(type, values))):
        return None
    try:
        numbers = np.array(values, dtype=np.float64)
    except OverflowError:  # an int of more than three hundred digits
        return None
    return numbers if np.isfinite(numbers).all() else None
