"""What the dataset says of each demonstration beside its text, at its edges: checks, messages, packing."""

import json
from collections import UserList

import numpy as np
import pyarrow as pa
import pytest
import torch
from some_columns import EVERY, THREE, check_values

from verl_hpt import config
from verl_hpt.demos.demonstration import REASONS, ROUNDING, Unusable, of_row, plain, relative
from verl_hpt.demos.demonstration import Demonstration as Demo
from verl_hpt.demos.read import packed, unpacked
from verl_hpt.host.rows import columns_of_tokens
from verl_hpt.loss import TEACHER, WEIGHTS

GOOD = {"reward": 1, "other_log_prob": -1.0, "teacher_log_prob": [-1.0, 0, 1e-3]}


def complaint(values, columns=EVERY, encoded=THREE, index=0) -> str:
    with pytest.raises(Unusable) as caught:
        check_values(Demo("x", index, values), columns, encoded)
    assert caught.value.reason == "bad_column"
    assert str(caught.value) == f"{REASONS['bad_column']} ({caught.value.detail})"
    return caught.value.detail


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reward", "log_likelihood", "other_log_prob"])
@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf"), True, "1", [1.0], {"a": 1}, 10**400], ids=str
)
def test_a_number_is_finite_and_no_bool(name, bad):
    assert complaint({**GOOD, name: bad}) == f"the_{name} must hold finite numbers, got {str(bad)[:80]}"


@pytest.mark.parametrize("name", ["teacher_log_prob", "token_weights"])
@pytest.mark.parametrize(
    "bad", [[0.0, float("nan"), -1.0], [0, 0, float("inf")], [0, -1, True], [0, 0, False], [0, 0, "1"], [0, 0, None],
            [[0.0], [0.0], [0.0]], 0.0, "000", [0, 0, 10**400], [-0.5] * 50 + ["x"]], ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_numbers_of_tokens_are_finite_and_no_bools(name, bad):
    assert complaint({**GOOD, name: bad}) == f"the_{name} must hold finite numbers, got {str(bad)[:80]}"


def test_log_probs_are_at_most_rounding_above_0():
    told = "must hold log-probabilities, at most 0, got"
    assert ROUNDING == 1e-3
    assert complaint({**GOOD, "log_likelihood": 0.00125}) == f"the_log_likelihood {told} 0.00125"
    assert complaint({**GOOD, "other_log_prob": 1}) == f"the_other_log_prob {told} 1"
    assert complaint({**GOOD, "teacher_log_prob": [0.5, 2, -1.0]}) == f"the_teacher_log_prob {told} 2"
    check_values(Demo("x", 0, {**GOOD, "reward": 7, "log_likelihood": 1e-3, "other_log_prob": 1e-3}), EVERY, THREE)


def test_weights_are_at_least_0_and_one_is_above_on_what_the_assistant_says():
    told = "the_token_weights must hold weights of 0 or more, and one above 0"
    assert complaint({**GOOD, "token_weights": [1.0, 2.0, -1e-9]}) == told
    assert complaint({**GOOD, "token_weights": [0, 0.0, 0]}) == told
    assert complaint({**GOOD, "token_weights": []}) == told
    told = "the_token_weights has no weight above 0 on what the assistant says"
    assert complaint({**GOOD, "token_weights": [0, 1.0, 0]}) == told
    check_values(Demo("x", 0, {**GOOD, "token_weights": [0, 1.0, 0]}), EVERY)  # tokens not known


@pytest.mark.parametrize(("name", "value"), [("token_weights", 1.0), ("teacher_log_prob", -1.0)])
@pytest.mark.parametrize("count", [2, 4])
def test_there_is_a_number_a_token_eos_included(name, value, count):
    told = f"the_{name} has {count} values for 3 tokens, EOS included"
    assert complaint({**GOOD, name: [value] * count}) == told
    check_values(Demo("x", 0, {**GOOD, name: [value] * count}), EVERY)
    check_values(Demo("x", 0, {**GOOD, name: [value] * 3}), EVERY, THREE)


def test_no_log_prob_at_all_is_too_few():
    told = "the_teacher_log_prob has 0 values for 3 tokens, EOS included"
    assert complaint({**GOOD, "teacher_log_prob": []}) == told


@pytest.mark.parametrize("name", ["reward", "other_log_prob", "teacher_log_prob"])
def test_required_columns_have_a_value(name):
    values = {key: value for key, value in GOOD.items() if key != name}
    assert complaint(values, index=1) == f"the_{name} has no value for demonstration 2"
    check_values(Demo("x", 0, {}), dict(log_likelihood="a", token_weights="b", source="c"), THREE)


@pytest.mark.parametrize("bad", [3, ["x"], 0.0, True, b"y"], ids=str)
def test_a_source_is_text(bad):
    assert complaint({**GOOD, "source": bad}) == f"the_source must hold text, got {bad}"


def test_a_long_value_is_told_in_eighty_characters():
    assert complaint({**GOOD, "source": ["x" * 200]}) == f"the_source must hold text, got {str(['x' * 200])[:80]}"


def test_what_is_checked_comes_back_as_arrays_of_tokens():
    found = check_values(Demo("x", 0, {**GOOD, "token_weights": [1, 2.5, 0], "source": "s"}), EVERY, THREE)
    arrays = {name: found.pop(name) for name in ("teacher_log_prob", "token_weights")}
    assert {name: (column.dtype, column.tolist()) for name, column in arrays.items()} == {
        "teacher_log_prob": (np.float64, [-1.0, 0.0, 0.0]),  # rounding above 0 is 0
        "token_weights": (np.float64, [2.0, 0.0, 0.0]),  # relative, over what the assistant says
    }
    assert found == {"reward": 1, "other_log_prob": -1.0, "source": "s"}
    assert check_values(Demo("x", 0, {"reward": 1.0}), dict(reward="r")) == {"reward": 1.0}
    unknown = check_values(Demo("x", 0, {"token_weights": [1, 2.5, 0]}), dict(token_weights="w"))
    assert unknown["token_weights"].tolist() == [1.0, 2.5, 0.0], "as they stand where the tokens are not known"


@pytest.mark.parametrize("made", [list, tuple, np.array, torch.tensor, pa.scalar, UserList], ids=lambda m: m.__name__)
def test_numbers_of_tokens_are_read_from_every_kind_of_list(made):
    for row, expected in (
        ({"target": "a", "w": made([1.0, 0.5])}, [[1.0, 0.5]]),
        ({"target": ["a"], "w": [made([1.0, 0.5])]}, [[1.0, 0.5]]),
        ({"target": ["a", "b"], "w": [made([1.0, 0.5]), made([2.0])]}, [[1.0, 0.5], [2.0]]),
        ({"target": ["a", "b"], "w": [None, made([2.0])]}, [None, [2.0]]),
    ):
        found = [demo.values.get("token_weights") for demo in of_row(row, "target", dict(token_weights="w"))]
        assert found == expected and all(type(w) is list and set(map(type, w)) == {float} for w in found if w)


@pytest.mark.parametrize(
    ("cell", "name", "told"),
    [
        (1.0, "reward", "c has one value for 2 demonstrations"),
        ("s", "source", "c has one value for 2 demonstrations"),
        ([1.0, 2.0], "token_weights", "c has one value for 2 demonstrations"),
        ([1.0], "reward", "c has 1 values for 2 demonstrations"),
        ([1.0, 2.0, 3.0], "log_likelihood", "c has 3 values for 2 demonstrations"),
        ([[1.0], [2.0], None], "teacher_log_prob", "c has 3 values for 2 demonstrations"),
    ],
)
def test_a_column_has_a_value_for_each_demonstration(cell, name, told):
    with pytest.raises(Unusable) as caught:
        of_row({"target": ["a", "b"], "c": cell}, "target", dict(**{name: "c"}))
    assert (caught.value.reason, caught.value.detail) == ("bad_column", told)


@pytest.mark.parametrize("cell", [None, [], [None], [None, None, None], np.array([None, None], dtype=object)], ids=str)
@pytest.mark.parametrize("name", ["reward", "token_weights", "source"])
def test_a_column_that_says_nothing_has_no_entry(cell, name):
    found = of_row({"target": ["a", "b"], "c": cell}, "target", dict(**{name: "c"}))
    assert found == [Demo("a", 0, {}), Demo("b", 1, {})]
    assert of_row({"target": ["a", "b"]}, "target", dict(**{name: "c"})) == found


def test_no_columns_and_no_demonstrations():
    assert of_row({"target": "a", "reward": 1.0}, "target") == [Demo("a", 0, {})]
    assert of_row({"target": None, "c": [1.0, 2.0]}, "target", dict(reward="c")) == []
    named = config.Demo(**{name: column for name, column in EVERY.items()}).columns()
    assert config.Demo().columns() == {} and named == EVERY and len(named) == 6
    assert config.Demo(reward=0.5).columns() == {}, "a number is no column"


def test_zero_is_a_value():
    (demo,) = of_row({"target": "a", "c": 0}, "target", dict(reward="c"))
    assert demo.values == {"reward": 0}


@pytest.mark.parametrize("made", [list, np.array, torch.tensor], ids=lambda made: made.__name__)
def test_relative_weights_and_their_tensors(made):
    mask = made([1, 0, 1])
    assert relative(made([1.0, 9.0, 3.0]), mask).tolist() == [0.5, 0.0, 1.5]
    assert relative([1e308, 1e308, 1e308], mask).tolist() == [1.0, 0.0, 1.0]
    names = ("token_weights", "teacher_log_prob")
    rows = [{"token_weights": made([0.5, 1.5])}, None, {"teacher_log_prob": made([-1.0])}]
    columns = columns_of_tokens(names, [2, 3, 1], rows)
    assert {name: [row.tolist() for row in column.unbind()] for name, column in columns.items()} == {
        WEIGHTS: [[0.5, 1.5], [1.0] * 3, [1.0]],
        TEACHER: [[0.0, 0.0], [0.0] * 3, [-1.0]],
    }
    assert {column.dtype for column in columns.values()} == {torch.float32}
    assert columns_of_tokens(names, [], []) == columns_of_tokens((), [1], [None]) == {}


# --- through verl's batch ---------------------------------------------------------------------------------------------

MARK = "verl-hpt packed: "
TEXTS = [MARK, MARK + "5", MARK + '"a"', MARK + "{no json", MARK + "[1, 2", MARK * 2 + "[1]", MARK + "null", "\ud800"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "around",
    [
        lambda t: t,
        np.str_,
        lambda t: [t],
        lambda t: [t, "b"],
        lambda t: {"role": "assistant", "content": t},
        lambda t: [{"role": "assistant", "content": t}],
        lambda t: [[{"role": "assistant", "content": t}], [{"role": "assistant", "content": "b"}] * 3],
        lambda t: [[t], ["a", t]],
    ],
    ids=["text", "numpy", "list", "two", "message", "messages", "turns", "uneven"],
)
def test_a_text_that_begins_with_our_mark_comes_back(text, around):
    cell = around(text)
    row = {"target": cell, "source": cell, "extra_info": {"text": cell}, "other": cell}
    made = packed([row], collate=lambda rows: {name: [r[name] for r in rows] for name in rows[0]})
    for name, expected in row.items():
        value = np.array([made[name][0]] * 2)[1]  # what verl's agent loop does with a column
        assert unpacked(plain(value)) == expected


def test_only_uneven_lists_are_packed():
    def pack(value):
        return packed([{"c": value}], collate=lambda rows: rows[0])["c"]

    for kept in ("text", None, 5, [1.0, 2.0], [[1.0], [2.0]], [], ["a", "bb"], {"a": [[1], []]}, ([1], [1, 2])):
        assert pack(kept) is kept
    strange = [[b"x"], [b"x", b"y"]]
    assert pack(strange) is strange
    assert pack([[1.0], [1.0, 2.0]]) == MARK + "[[1.0], [1.0, 2.0]]"
    assert pack([np.array([1.0]), np.array([1, 2])]) == MARK + "[[1.0], [1, 2]]"
    assert pack(MARK) == MARK + json.dumps(MARK)
    assert unpacked(MARK[:-1]) == MARK[:-1] and unpacked(5) == 5
