"""From a dataset's rows to demonstrations as training has them; and how their columns pass verl's agent loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from verl_hpt.demos.demonstration import Demonstration, Unusable, check_values, demonstrations, of_row, plain
from verl_hpt.demos.encode import encode_all

_PACKED = "verl-hpt packed: "  # what a text of ours begins with


def read(
    rows: Sequence[tuple[Mapping, Sequence[int] | None, list[dict] | None]],
    key: str,
    columns: Mapping[str, str],
    *encoding: Any,
    skip: Callable[[int], bool] = lambda place: False,
) -> list[list[Demonstration]]:
    """The demonstrations of each row as training has them: tokens and checked values, or why there are none.

    rows: a row's cells, its prompt's tokens and messages. encoding: the arguments of ``encode_all`` from the
    tokenizer on. skip: places in the cell that are left as they are.
    """
    found, chosen = [], []
    for row, prompt_ids, messages in rows:
        try:
            found.append(of_row(row, key, columns))
            chosen += [(demo, prompt_ids, messages) for demo in found[-1] if not skip(demo.index)]
        except Unusable as bad:
            found.append([Demonstration(content, i, bad=bad) for i, content in enumerate(demonstrations(row.get(key)))])
    encode_all(chosen, *encoding)
    for demo in (demo for demo, *_ in chosen if demo.bad is None):
        try:
            demo.values = check_values(demo, columns)
        except Unusable as bad:
            demo.bad = bad
    return found


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
