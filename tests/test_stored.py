"""Demonstrations beside the questions: a buffer that loses none, a stream whose order goes on where it stopped."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from verl_hpt.demos.stored import Buffer, Entry, Stream, entry_of
from verl_hpt.errors import UserError


def made(key: str, step: int = 0, **values) -> Entry:
    return Entry(key, "src", [1, 2], [3, 4, 0], [1, 1, 1], 1.0, step=step, **values)


def keys(entries) -> list[str]:
    return [entry.key for entry in entries]


# --- the buffer -------------------------------------------------------------------------------------------------------


def test_the_newest_come_first_and_what_fills_no_step_waits():
    """B1 of the placements: size 3, [a, b] and then [c, d] give c, d, a in one step; b stays. Within a step the order
    is a hash's: here d, c and a, b."""
    buffer = Buffer(3)
    buffer.collect([made("a"), made("b")])
    assert buffer.take() == [] and keys(buffer.entries) == ["a", "b"]
    buffer.collect([made("c"), made("d")])
    assert [keys(part) for part in buffer.take()] == [["d", "c", "a"]]
    assert keys(buffer.entries) == ["b"] and buffer.take() == []


def test_the_order_in_which_a_steps_entries_arrive_leaves_no_trace():
    """verl balances a batch by its rollouts' lengths, so that questions come in another order in a run done again."""
    one, other = Buffer(3), Buffer(3)
    step = [made(key, 4) for key in "abcdefgh"] + [Entry("a", "src", [1], [9], [1], 1.0, step=4)]
    for seed in range(20):
        shuffled = random.Random(seed).sample(step, len(step))
        one.entries, other.entries = [], []
        one.collect(step), other.collect(shuffled)
        assert one.entries == other.entries
    orders = set()
    for number in range(20):
        buffer = Buffer(3)
        buffer.collect([made(key, number) for key in "abcdefgh"])
        orders.add(buffer.entries[0].key)
    assert len(orders) > 4, "no question is always the last"


def test_several_full_steps_are_taken_at_once_in_order():
    buffer = Buffer(2)
    buffer.collect([made(key) for key in "abcde"])
    order = keys(buffer.entries)
    assert sorted(order) == [*"abcde"]
    assert [keys(part) for part in buffer.take()] == [order[:2], order[2:4]] and keys(buffer.entries) == order[4:]
    buffer.collect([made("f")])
    assert [keys(part) for part in buffer.take()] == [["f", order[4]]] and buffer.entries == []


def test_of_a_question_one_entry_stays_the_new_one_and_it_stands_among_the_new():
    buffer = Buffer(9)
    buffer.collect([made("a", 1), made("b", 1), made("c", 1)])
    buffer.collect([made("d", 2), made("b", 2)])
    steps = [(entry.key, entry.step) for entry in buffer.entries]
    assert set(steps[:2]) == {("d", 2), ("b", 2)} and set(steps[2:]) == {("a", 1), ("c", 1)}
    buffer.collect([made("e", 3), made("e", 3)])
    assert keys(buffer.entries) == ["e", *(key for key, _ in steps)]


def test_a_question_that_was_taken_can_be_collected_again():
    buffer = Buffer(1)
    for step in (1, 2):
        buffer.collect([made("a", step)])
        assert [[entry.step for entry in part] for part in buffer.take()] == [[step]]


def test_nothing_is_collected_of_nothing():
    buffer = Buffer(2)
    buffer.collect([])
    assert buffer.take() == [] and buffer.state() == []


@pytest.mark.parametrize("seed", range(40))
def test_every_entry_is_taken_once_or_waits_or_was_replaced_by_a_newer_one_of_its_question(seed):
    draw = random.Random(seed)
    size, several = draw.randint(1, 7), draw.randint(1, 30)
    buffer, collected, taken, replaced = Buffer(size), [], Counter(), set()
    for step in range(60):
        new = [made(f"q{draw.randrange(several)}", step) for _ in range(draw.choice([0, 1, 2, 5, 20]))]
        collected += new
        for i, entry in enumerate(new):
            later = {one.key for one in new[i + 1 :]}
            replaced |= {id(entry)} if entry.key in later else set()
            replaced |= {id(one) for one in buffer.entries if one.key == entry.key}
        buffer.collect(new)
        parts = buffer.take()
        assert all(len(part) == size for part in parts) and len(buffer.entries) < size
        taken.update(id(entry) for part in parts for entry in part)
        waiting = keys(buffer.entries)
        assert len(set(waiting)) == len(waiting)
        ages = [entry.step for part in parts for entry in part] + [entry.step for entry in buffer.entries]
        assert ages == sorted(ages, reverse=True), "newest first"
    assert set(taken.values()) <= {1}
    waits = {id(entry) for entry in buffer.entries}
    assert not taken.keys() & waits and not taken.keys() & replaced and not waits & replaced
    assert taken.keys() | waits | replaced == {id(entry) for entry in collected}


# --- an entry's state -------------------------------------------------------------------------------------------------


def exact(draw: random.Random) -> float:
    return draw.choice([-1e-300, -0.1, -1 / 3, -5e-324, -math.pi, -1.7976931348623157e308, -draw.random(), 0.0])


@pytest.mark.parametrize("seed", range(20))
def test_an_entry_comes_back_from_json_to_the_last_bit(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 40)
    values = {
        "token_weights": np.array([draw.random() for _ in range(n)]),
        "other_log_prob": exact(draw),
        "teacher_log_prob": np.array([exact(draw) for _ in range(n)], dtype=np.float64),
        "source": draw.choice(["Ö'Brien", "\U0001f600", "", "a\nb"]),
    }
    old = [exact(draw) for _ in range(n)] if draw.random() < 0.5 else None
    ids = [draw.randrange(2**31) for _ in range(n)]
    mask = [1, *(draw.randrange(2) for _ in range(n - 1))]
    key = draw.choice(["6d03e6ec3bdda422", "a/\u2028\\udc80", "名"])
    entry = Entry(key, "src", ids[::-1], ids, mask, exact(draw), values, old, draw.randrange(10**6))
    again = entry_of(json.loads(json.dumps(entry.state())))
    for name in ("key", "source", "prompt", "ids", "mask", "reward", "old_log_probs", "step", "learns"):
        assert getattr(again, name) == getattr(entry, name) and type(getattr(again, name)) is type(getattr(entry, name))
    assert math.copysign(1, again.reward) == math.copysign(1, entry.reward)
    assert again.values.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(np.asarray(again.values[name]), np.asarray(value))
    assert again.state() == entry.state() and isinstance(entry.values["token_weights"], np.ndarray)


def test_a_state_has_no_part_in_the_entry():
    entry = made("a", values={"token_weights": np.ones(3)}, old_log_probs=[-1.0] * 3)
    state = entry.state()
    state["ids"][0], state["values"]["token_weights"][0], state["old_log_probs"][0] = 99, 5.0, -9.0
    assert entry.ids[0] == 3 and entry.values["token_weights"][0] == 1 and entry.old_log_probs[0] == -1


GOOD = made("a", values={"source": "x"}, old_log_probs=[-1.0, -2.0, -3.0]).state()
HOSTILE = {
    "null": None, "a list": [], "text": "entry", "a number": 3, "nothing": {},
    "a field less": {name: value for name, value in GOOD.items() if name != "reward"}, "a field more": GOOD | {"x": 1},
    "no tokens": GOOD | {"ids": [], "mask": [], "old_log_probs": None}, "no prompt": GOOD | {"prompt": []},
    "a mask too short": GOOD | {"mask": [1, 1]}, "log-probs too long": GOOD | {"old_log_probs": [-1.0] * 4},
    "log-probs of none": GOOD | {"old_log_probs": []},
    "tokens in words": GOOD | {"ids": ["a", "b", "c"]}, "tokens as text": GOOD | {"ids": "abc"},
    "tokens of halves": GOOD | {"ids": [1.5, 2.0, 3.0]}, "tokens below zero": GOOD | {"ids": [1, -2, 3]},
    "a token of truth": GOOD | {"ids": [True, 2, 3]}, "nested tokens": GOOD | {"ids": [[1], [2], [3]]},
    "null tokens": GOOD | {"ids": None}, "tokens by name": GOOD | {"ids": {"0": 1, "1": 2, "2": 3}},
    "a prompt as text": GOOD | {"prompt": "ab"}, "a prompt of null": GOOD | {"prompt": [None]},
    "a mask of twos": GOOD | {"mask": [2, 1, 1]}, "a mask in words": GOOD | {"mask": "111"},
    "a mask of zeros": GOOD | {"mask": [0, 0, 0]}, "a number as key": GOOD | {"key": 5},
    "null as source": GOOD | {"source": None}, "a reward in words": GOOD | {"reward": "1"},
    "no reward": GOOD | {"reward": None}, "a reward of nothing": GOOD | {"reward": math.nan},
    "an endless reward": GOOD | {"reward": math.inf}, "values as a list": GOOD | {"values": []},
    "log-probs in words": GOOD | {"old_log_probs": ["a", "b", "c"]},
    "log-probs of nothing": GOOD | {"old_log_probs": [math.nan, -1.0, -1.0]}, "a step in words": GOOD | {"step": "1"},
    "a token of no vocabulary": GOOD | {"ids": [10**400] * 3}, "a reward of no float": GOOD | {"reward": 10**400},
}  # fmt: skip


@pytest.mark.parametrize("state", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_state_that_no_entry_gives_is_refused(state):
    assert entry_of(GOOD).state() == GOOD
    with pytest.raises(ValueError, match="an entry of the buffer"):
        entry_of(state)


# --- the stream -------------------------------------------------------------------------------------------------------


def reads(usable, seen=None):
    """A file of which these rows are usable. seen: gains every row that is read, in order."""

    def read(rows):
        if seen is not None:
            seen.extend(rows)
        return [made(str(row)) if row in usable else None for row in rows]

    return read


def drawn(stream: Stream, steps: int, usable) -> list[list[int]]:
    return [[int(entry.key) for entry in stream.take(reads(usable))] for _ in range(steps)]


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (7, 3), (10, 10), (5, 12), (100, 7)])
def test_each_epoch_has_every_row_once_in_an_order_of_its_own(rows, batch):
    stream = Stream(rows, batch, seed=3)
    steps = drawn(stream, 40, range(rows))
    assert {len(step) for step in steps} == {batch}
    flat = [row for step in steps for row in step]
    epochs = [flat[i : i + rows] for i in range(0, len(flat) - rows + 1, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows == 100:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 2
        assert epochs[0] != list(range(rows)) and flat[:100] != drawn(Stream(100, 100, seed=4), 1, range(100))[0]


def test_the_order_is_of_seed_and_epoch_alone_and_never_changes():
    """Numbers of a checkpoint of today go on tomorrow, with another NumPy."""
    stream = Stream(8, 3, seed=0)
    assert drawn(stream, 6, range(8)) == drawn(Stream(8, 3, seed=0), 6, range(8))
    one = Stream(8, 8, seed=0)
    assert drawn(one, 2, range(8)) == [[7, 5, 3, 6, 0, 1, 2, 4], [4, 2, 0, 7, 1, 6, 5, 3]]
    by_fives = [row for step in drawn(Stream(8, 5, 0), 8, range(8)) for row in step]
    assert by_fives == [row for step in drawn(Stream(8, 8, 0), 5, range(8)) for row in step]


@pytest.mark.parametrize("seed", range(10))
def test_unusable_rows_are_skipped_and_a_step_has_as_many_as_ever(seed):
    draw = random.Random(seed)
    rows, batch = draw.randint(2, 40), draw.randint(1, 12)
    usable = set(draw.sample(range(rows), draw.randint(1, rows)))
    stream, whole, seen = Stream(rows, batch, seed), Stream(rows, batch, seed), []
    steps = [[int(entry.key) for entry in stream.take(reads(usable, seen))] for _ in range(30)]
    assert {len(step) for step in steps} == {batch}
    every = [row for step in drawn(whole, 30 * batch * rows // len(usable) + rows, range(rows)) for row in step]
    assert every[: len(seen)] == seen, "each row is read once an epoch, in order"
    assert [row for step in steps for row in step] == [row for row in seen if row in usable]


@pytest.mark.parametrize("rows", [2, 3, 5, 50])
def test_one_usable_row_is_enough_wherever_it_stands_in_two_epochs(rows):
    """First in one epoch and last in the next, as many rows lie between as the file has, and more."""
    for seed in range(20):
        assert drawn(Stream(rows, 1, seed), 6, {rows - 1}) == [[rows - 1]] * 6


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (6, 4), (6, 50)])
def test_a_file_without_a_usable_row_is_refused_after_two_epochs_at_most(rows, batch):
    seen = []
    with pytest.raises(
        UserError, match=r"hpt\.stream\.files: no row has a usable demonstration; `verl-hpt data check`"
    ):
        Stream(rows, batch, 0).take(reads((), seen))
    assert set(seen) == set(range(rows)) and len(seen) <= 2 * rows + batch


@pytest.mark.parametrize("seed", range(10))
def test_a_stream_goes_on_where_its_state_was_written(seed):
    draw = random.Random(seed)
    rows, batch = draw.randint(1, 30), draw.randint(1, 9)
    usable = set(draw.sample(range(rows), draw.randint(1, rows)))
    whole = drawn(Stream(rows, batch, seed), 25, usable)
    stream, steps = Stream(rows, batch, seed), []
    while len(steps) < 25:
        steps += drawn(stream, draw.randint(0, 4), usable)
        state = json.loads(json.dumps(stream.state()))
        drawn(stream, draw.randint(0, 3), usable)  # done, and lost when the run was killed
        stream = Stream(rows, batch, seed)
        stream.load(state)
        assert stream.state() == state
    assert steps[:25] == whole


@pytest.mark.parametrize("rows", [9, 11, 1])
def test_files_with_another_number_of_rows_are_refused(rows):
    stream = Stream(10, 2, 0)
    state = stream.state()
    other = Stream(rows, 2, 0)
    with pytest.raises(UserError, match=rf"have {rows} .*rows, and had 10 .*Set the old files back"):
        other.load(state)
    assert other.state() == Stream(rows, 2, 0).state()


STATE = {"rows": 10, "files": "", "seed": 0, "epoch": 0, "position": 0}


@pytest.mark.parametrize("other", [{"files": "f1"}, {"seed": 7}])
def test_other_files_or_another_seed_are_refused_by_name(other):
    stream = Stream(10, 2, **{"seed": 0, "files": "", **other})
    name, remedy = (
        ("hpt.seed=7: it was 0", "Set it back") if "seed" in other else ("other prompts", "Set the old files")
    )
    with pytest.raises(UserError, match=rf"{name}.*would not come again. {remedy}"):
        stream.load(STATE)
    assert (stream.epoch, stream.position) == (0, 0)


@pytest.mark.parametrize(
    "state",
    [
        {}, [], None, 5, "rows", *({name: STATE[name] for name in STATE if name != gone} for gone in STATE),
        *(STATE | change for change in (
            {"epoch": "0"}, {"position": "3"}, {"epoch": None}, {"position": 2.5}, {"epoch": -1}, {"position": -1},
            {"position": 11}, {"epoch": True}, {"seed": "0"}, {"rows": 10.0},
        )),
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_no_stream_gives_is_refused(state):
    stream = Stream(10, 2, 0)
    with pytest.raises((ValueError, KeyError, TypeError)):
        stream.load(state)
    assert stream.state() == STATE
