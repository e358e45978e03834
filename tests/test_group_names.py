"""How an error speaks of a question, and what packed columns come back as."""

import numpy as np
import pytest

from verl_hpt.demos.read import packed, unpacked
from verl_hpt.host.batch import Group


@pytest.mark.parametrize(
    ("extra", "index"),
    [
        ({"index": 7, "split": "train"}, "7"),
        ({"index": "row 7"}, "row 7"),
        ({"index": np.int64(7)}, "7"),
        ({"split": "train"}, "None"),
        ({}, "None"),
        (None, "None"),
        ("text", "None"),
    ],
    ids=str,
)
def test_a_question_is_named_by_key_source_and_index(extra, index):
    group = Group("u", [0], "abc123", "openai/gsm8k", [1], {"extra_info": extra})
    assert group.named() == f"question abc123 (data source 'openai/gsm8k', index {index})"


def test_a_question_without_source_or_columns_is_named_too():
    assert Group("u", [0], "abc123").named() == "question abc123 (data source 'unknown', index None)"


@pytest.mark.parametrize(
    "value",
    [None, "", "text", "verl-hpt", 3, [1, 2], [[1, 2], [3, 4]], {"a": [1]}, np.array([1, 2]), b"verl-hpt packed: []"],
    ids=str,
)
def test_what_was_not_packed_comes_back_as_itself(value):
    assert unpacked(value) is value


def test_packing_touches_uneven_lists_alone():
    row = {"uneven": [[1], [1, 2]], "even": [[1], [2]], "flat": [1, 2], "text": "x", "bytes": [[b"x"], [b"x", b"y"]]}
    (made,) = packed([row], collate=list)
    assert {name: made[name] is row[name] for name in row} == dict.fromkeys(row, True) | {"uneven": False}
    assert isinstance(made["uneven"], str) and unpacked(made["uneven"]) == [[1], [1, 2]]
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.array([1.0]), np.array([1.0, 2.0])]
    (made,) = packed([{"arrays": list(ragged)}], collate=list)
    assert unpacked(made["arrays"]) == [[1.0], [1.0, 2.0]]
