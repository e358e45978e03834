"""How a batch's rollouts started: what their agent loops told, as numbers of rows, and checked against the data."""

import itertools
import random

import numpy as np
import pytest
import torch
from test_questions import group, reader

from verl_hpt.errors import UserError
from verl_hpt.host.started import check_prefixes, starts_of

END = 0  # of the readers' tokenizer: one token a letter


def told(tokens=0, place=0, missed=False, **hint) -> dict:
    """What an agent loop leaves in a row's extra_fields; hint: prompt and longer, which tells hints apart here."""
    hint |= {"hint": max(hint.get("longer", 0), 0)} if "prompt" in hint else {}
    return {"tokens": tokens, "place": place, "missed": missed, "longer": 0, **hint}


def ids(text: str) -> list[int]:
    return list(map(ord, text))


def starts(groups, rows: dict, count: int | None = None, **settings):
    count = 1 + max((row for one in groups for row in one.rows), default=-1) if count is None else count
    whole = {row: None for one in groups for row in one.rows} | rows
    return starts_of(count, groups, whole, reader(**settings))


# --- numbers of rows --------------------------------------------------------------------------------------------------


def test_rows_that_nothing_is_told_of_started_from_nothing():
    found = starts([group("abc", rows=(2, 0)), group("unread", rows=(3,))], {0: None, 2: {}}, count=6)
    for numbers in (found.prefixes, found.starts, found.longer):
        assert numbers.tolist() == [0] * 6 and numbers.dtype.kind == "i"
    assert found.shown == {} and found.counts == {"start/missed": 0}


def test_every_number_stands_at_its_row_whatever_the_order_of_the_batch():
    first, second = group(["abcde", "xy"], rows=(4, 1, 3)), group("fgh", rows=(0, 6))
    found = starts([first, second], {4: told(3), 3: told(1, place=1), 6: told(2), 1: told()}, count=8)
    assert found.prefixes.tolist() == [0, 0, 0, 1, 3, 0, 2, 0] and found.longer.tolist() == [0] * 8
    assert (found.starts > 0).tolist() == [False, False, False, True, True, False, True, False]
    assert {row: demo.ids for row, demo in found.shown.items()} == {
        4: [*ids("abcde"), END], 3: [*ids("xy"), END], 6: [*ids("fgh"), END],
    }  # fmt: skip


def test_rollouts_start_alike_where_demonstration_and_length_are_the_same_and_nowhere_else():
    kinds = [told(2), told(3), told(2, place=1), told(3, place=1), told(2, place=7), None]
    rows = dict(enumerate(kinds * 2))
    texts = ["abcde", "abxyz", *"cdefg", "abcde"]
    found = starts([group(texts, rows=range(len(rows)))], rows)
    for a, b in itertools.product(rows, rows):
        assert (found.starts[a] == found.starts[b]) == (rows[a] == rows[b])
    assert found.starts[5] == found.starts[11] == 0 and (np.delete(found.starts, [5, 11]) > 0).all()


def test_lengths_and_places_of_any_size_are_told_apart():
    draw = random.Random(0)
    pairs = [(draw.choice([1, 2, 2**16, 2**20, 32_767]), draw.choice([0, 1, 2, 255, 4000])) for _ in range(200)]
    rows = {row: told(0, place, prompt=[1], longer=longer) for row, (longer, place) in enumerate(pairs)}
    found = starts([group("abc", rows=range(200))], rows)
    assert len(set(found.starts.tolist())) == len(set(pairs)) and found.starts.min() > 0


# --- hints ------------------------------------------------------------------------------------------------------------


def test_a_questions_prompt_is_the_one_without_the_hint_whichever_of_its_rollouts_had_one():
    hinted = told(prompt=[1, 2, 3], longer=4)
    for rows in ({0: hinted}, {1: hinted}, {0: hinted, 1: hinted}):
        one, other = group("abc"), group("abc", rows=(2, 3))
        one.prompt = [1, 2, 9, 9, 9, 9, 3] if 0 in rows else [1, 2, 3]
        found = starts([one, other], rows)
        assert list(one.prompt) == [1, 2, 3] == list(other.prompt)
        assert found.longer.tolist() == [4 if row in rows else 0 for row in range(4)]
        assert found.prefixes.tolist() == [0] * 4 and found.shown == {}
        assert (found.starts > 0).tolist() == [row in rows for row in range(4)]


def test_a_hint_does_not_read_the_demonstrations_again():
    """One that is unusable would stop the run."""
    found = starts([group(None)], {0: told(prompt=[1], longer=2)}, on_unusable="error")
    assert found.counts == {"start/missed": 0} and found.starts[0] > 0


@pytest.mark.parametrize("longer", [0, -1, -5])
def test_a_hint_that_makes_the_prompt_no_longer_is_a_start_all_the_same(longer):
    assert starts([group("abc")], {0: told(prompt=[1], longer=longer)}).starts.tolist() == [1, 0]


# --- missed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "reason"), [(None, "null"), ("", "empty"), ("much too long", "too_long")])
def test_missed_sessions_are_counted_each_and_the_reason_once_a_question(target, reason):
    rows = {0: told(missed=True), 2: told(missed=True), 3: told(missed=True)}
    found = starts([group(target, rows=(0, 1, 2)), group(target, rows=(3, 4)), group(target, rows=(5,))], rows)
    assert found.counts == {"start/missed": 3, "unusable": 2, f"unusable/{reason}": 2}
    assert found.starts.tolist() == [0] * 6 == found.prefixes.tolist() and found.shown == {}


def test_a_hint_that_did_not_fit_is_missed_though_its_demonstration_is_usable():
    assert starts([group("abc")], {0: told(missed=True)}, on_unusable="error").counts == {"start/missed": 1}


def test_on_unusable_error_stops_the_run_and_names_the_question():
    with pytest.raises(UserError, match=r"question key .*'src', index 7.*'target' is unusable: no demonstration"):
        starts([group(None)], {1: told(missed=True)}, on_unusable="error")
    assert starts([group(None)], {}, on_unusable="error").counts == {"start/missed": 0}, "none was to start"


# --- the check of the tokens ------------------------------------------------------------------------------------------


def begun(target="abcde", place=0, responses=()):
    """Three rollouts, of which two start from 3 and from 2 tokens; their responses."""
    groups = [group(target, rows=(0, 1, 2))]
    found = starts(groups, {0: told(3), 1: told(2, place=place)})
    return groups, found, {0: [*ids("abc"), 9], 1: [*ids("ab"), 8, 8]} | dict(responses)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda row: torch.tensor(row, dtype=torch.int32)])
def test_responses_that_begin_with_their_demonstration_pass(kind):
    groups, found, responses = begun()
    check_prefixes(groups, found, {row: kind(response) for row, response in responses.items()})


@pytest.mark.parametrize(("row", "place"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
def test_one_token_that_is_not_the_demonstrations_stops_the_run_and_names_the_question(row, place):
    groups, found, responses = begun()
    responses[row][place] ^= 1
    message = rf"question key \(data source 'src', index 7\): .*begin with {3 - row} tokens of its demonstration does n"
    with pytest.raises(RuntimeError, match=message):
        check_prefixes(groups, found, responses)


def test_the_tokens_after_the_prefix_are_the_rollouts_own():
    groups, found, responses = begun(responses={0: ids("abc"), 1: ids("ab") + [7] * 50})
    check_prefixes(groups, found, responses)


def test_a_response_shorter_than_its_prefix_stops_the_run():
    groups, found, responses = begun(responses={0: ids("ab")})
    with pytest.raises(RuntimeError, match="begin with 3 tokens"):
        check_prefixes(groups, found, responses)


@pytest.mark.parametrize("target", [None, [], "", "xyz", "ab", "much too long", ["xyz", "abcde"], 7])
def test_a_demonstration_that_is_gone_or_another_stops_the_run(target):
    groups, found, responses = begun(target)
    with pytest.raises(RuntimeError, match="question key"):
        check_prefixes(groups, found, responses)


def test_a_place_that_the_row_does_not_have_stops_the_run():
    groups, found, responses = begun(place=1)
    assert found.shown[1] is None
    with pytest.raises(RuntimeError, match="begin with 2 tokens"):
        check_prefixes(groups, found, responses)


def test_the_place_is_that_among_all_demonstrations_of_the_row_unusable_ones_too():
    one = group([None, "much too long", "abcde"], rows=(0,))
    found = starts([one], {0: told(3, place=2)})
    check_prefixes([one], found, {0: ids("abc")})
    assert found.counts == {"start/missed": 0}


def test_nothing_is_asked_of_rollouts_that_started_from_nothing():
    groups = [group(None, rows=(0, 1))]
    check_prefixes(groups, starts(groups, {}), {})
