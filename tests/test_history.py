"""The history of questions, and what follows from it."""

import os
import time

import numpy as np
import pytest

from verl_hpt.errors import UserError
from verl_hpt.history import Draw, History, Index, number, numbers, prompt_number
from verl_hpt.history_file import COLUMNS, FILE

# --- the index --------------------------------------------------------------------------------------------------------


def test_index_agrees_with_a_dictionary_whatever_the_keys():
    """Random keys, consecutive ones and multiples of a power of two, in batches, known and unknown ones mixed."""
    draw = np.random.default_rng(0)
    random_keys = draw.integers(0, 2**64, 5000, dtype=np.uint64)
    for keys in (random_keys, np.arange(5000, dtype=np.uint64), np.arange(5000, dtype=np.uint64) << np.uint64(40)):
        index, known = Index(), {}
        for part in np.array_split(keys, 37):
            found = index.find(part)
            assert found.tolist() == [known.get(int(key), -1) for key in part]
            new = np.unique(part[found < 0])
            known |= {int(key): int(at) for key, at in zip(new, index.add(new), strict=True)}
        assert sorted(known.values()) == list(range(len(index)))
        assert index.find(keys).tolist() == [known[int(key)] for key in keys]
        assert (index.find(keys ^ np.uint64(2**63 + 2**20)) == -1).all()


def test_keys_that_are_sixteen_hex_digits_keep_their_number_and_others_are_hashed():
    assert number("00000000000000ff") == 255
    assert number("question 7") != number("question 8")
    assert number("question 7") == number("question 7")
    assert numbers([]).dtype == np.uint64


# --- what is remembered -----------------------------------------------------------------------------------------------


def observe(history, step, solved, taught=None, *, keys=None, n=4, on_rl=None):
    """One step in which question i had solved[i] of n rollouts solved; on demonstrations where none is, unless said."""
    solved = np.array(solved)
    taught = solved == 0 if taught is None else np.array(taught, dtype=bool)
    keys = np.arange(1, len(solved) + 1, dtype=np.uint64) if keys is None else np.array(keys, dtype=np.uint64)
    history.observe(
        step,
        Draw(
            keys, keys + np.uint64(1000), solved, np.full(len(solved), n), taught, ~taught if on_rl is None else on_rl
        ),
    )


def columns(history, *names, questions=1):
    found = history.look_up(np.arange(1, questions + 1, dtype=np.uint64), *names)
    return [values.tolist() for values in found]


def test_counts_of_draws_failures_and_uses_follow_the_steps():
    history = History()
    for step, solved in enumerate(([0, 4, 0], [0, 0, 1], [0, 0, 0]), 1):
        observe(history, step, solved)
    names = ("drawn", "failures", "uses", "solved", "rollouts", "drawn_at", "taught_at")
    assert columns(history, *names, questions=3) == [
        [3, 3, 3], [3, 2, 1], [3, 2, 2], [0, 0, 0], [4, 4, 4], [3, 3, 3], [3, 3, 3],
    ]  # fmt: skip
    assert columns(history, "drawn", "taught_at", questions=4)[0] == [3, 3, 3, 0], "an unknown question has zeros"


def test_graduated_once_a_taught_question_trains_on_solved_rollouts():
    """Question 1 is taught, then solved; 2 is solved from the start; 3 keeps unsolved rollouts (retired)."""
    history = History()
    observe(history, 1, [0, 2, 0])
    observe(history, 2, [1, 3, 0], taught=[False, False, False])
    assert history.listing("graduated")["key"].tolist() == [1]
    observe(history, 3, [0, 3, 1], taught=[True, False, True], on_rl=np.array([False, True, True]))
    assert history.listing("graduated")["key"].tolist() == [1], "taught while solved is no graduation"
    observe(history, 4, [0, 3, 1], taught=[True, False, False])
    assert sorted(history.listing("graduated")["key"].tolist()) == [1, 3]


def test_forgotten_while_a_solved_question_is_not_solved_now():
    history = History()
    observe(history, 1, [2, 0])
    assert history.totals() == {"questions": 2, "graduated": 0, "forgotten": 0, "hopeless": 1}
    observe(history, 2, [0, 0])
    observe(history, 3, [0, 0])
    assert history.listing("forgotten")["key"].tolist() == [1]
    assert history.listing("hopeless")["key"].tolist() == [2]
    assert len(history.listing("all")["key"]) == 2
    observe(history, 4, [1, 0])
    assert history.totals()["forgotten"] == 0
    with pytest.raises(UserError, match="graduated, forgotten, hopeless, all"):
        history.listing("solved")


def test_the_order_of_a_batch_leaves_no_trace():
    draw = np.random.default_rng(1)
    one, other = History(), History()
    for step in range(1, 9):
        keys = draw.integers(0, 300, 64, dtype=np.uint64)  # some twice in a batch
        solved, taught = draw.integers(0, 3, 64), draw.random(64) < 0.5
        turned = draw.permutation(64)
        observe(one, step, solved, taught, keys=keys)
        observe(other, step, solved[turned], taught[turned], keys=keys[turned])
        one.observe_demos(keys, solved)
        other.observe_demos(keys[turned], solved[turned])
    for name, value in one.state_dict().items():
        assert np.array_equal(value, other.state_dict()[name]), name


def test_a_question_twice_in_a_batch_is_two_draws():
    history = History()
    observe(history, 1, [0, 0], keys=[1, 1])
    assert columns(history, "drawn", "failures", "uses") == [[2], [2], [2]]


@pytest.mark.parametrize("solved", [0, 1])
def test_counts_stop_at_the_largest_number_of_their_type_instead_of_starting_again(solved):
    """Each column at its limit, and once below it; then a draw that would go beyond."""
    most = {name: np.iinfo(kind).max for name, kind in COLUMNS.items() if name != "flags"}
    for below in (0, 1):
        history = History()
        observe(history, 1, [0])
        for name, limit in most.items():
            history._rows[name][:] = limit - below
        observe(history, 2**40, [solved and 2**40], n=2**40, taught=[True])
        expected = most | ({"failures": 0} if solved else {"solved": 0})
        assert {name: columns(history, name)[0][0] for name in most} == expected


def test_uses_of_a_demonstration_stop_at_the_largest_number():
    history = History()
    history.observe_demos(numbers(["a", "b"]), np.array([0, 1]))
    history._demo_uses[:] = 65534
    for _ in range(2):
        history.observe_demos(numbers(["a", "a", "a", "b"]), np.array([0, 0, 0, 1]))
        assert history.demo_uses(numbers(["a", "b"]), np.array([1, 2])) == [[65535], [0, 65535]]


def test_columns_below_their_limits_are_as_they_came():
    history = History()
    observe(history, 2**31 - 1, [65535], n=65535, taught=[False])
    assert columns(history, "solved", "rollouts", "drawn_at", "taught_at") == [[65535], [65535], [2**31 - 1], [0]]


def test_uses_of_each_demonstration_are_counted_apart():
    history = History()
    history.observe_demos(numbers(["a", "a", "b"]), np.array([0, 2, 0]))
    history.observe_demos(numbers(["a", "a"]), np.array([2, 2]))
    assert history.demo_uses(numbers(["a", "b", "c", "a"]), np.array([3, 2, 0, 1])) == [[1, 0, 3], [1, 0], [], [1]]


def test_a_prompt_leads_to_its_question():
    history = History()
    prompt = prompt_number("gsm8k", [{"role": "user", "content": "2+2?"}])
    key = numbers(["0000000000000007"])
    history.observe(1, Draw(key, np.array([prompt], dtype=np.uint64), *(np.array([x]) for x in (0, 4, 1, 0))))
    assert prompt == prompt_number("gsm8k", [{"content": "2+2?", "role": "user"}])
    asked = np.array([prompt, prompt_number("other", [{"role": "user", "content": "2+2?"}])], dtype=np.uint64)
    assert history.look_up_prompts(asked, "failures")[0].tolist() == [1, 0]
    known, keys = history.keys_of_prompts(asked)
    assert known.tolist() == [True, False] and keys[0] == 7


def drawn(history, step, keys, prompts, solved):
    """Questions by key and prompt, all of four rollouts, none taught."""
    none = np.zeros(len(keys), dtype=bool)
    keys, prompts = np.array(keys, dtype=np.uint64), np.array(prompts, dtype=np.uint64)
    history.observe(step, Draw(keys, prompts, np.array(solved), np.full(len(keys), 4), none, ~none))


def failures_of(history, *prompts):
    return history.look_up_prompts(np.array(prompts, dtype=np.uint64), "failures")[0].tolist()


def test_a_prompt_leads_to_the_row_of_its_latest_draw():
    """Its question comes under another key (a run resumed with another tokenizer), and later under the first again."""
    history = History()
    for step in (1, 2, 3):
        drawn(history, step, [1, 2], [70, 80], [0, 0])
    assert failures_of(history, 70, 80) == [3, 3]
    drawn(history, 4, [9], [70], [1])
    assert failures_of(history, 70, 80) == [0, 3]
    drawn(history, 5, [9, 8], [70, 80], [0, 0])
    assert failures_of(history, 70, 80) == [1, 1]
    assert history.keys_of_prompts(np.array([70, 80], dtype=np.uint64))[1].tolist() == [9, 8]
    drawn(history, 6, [2], [80], [0])
    assert failures_of(history, 70, 80) == [1, 4]
    assert len(history) == 4 and len(history._prompts) == 2


def test_one_prompt_of_two_questions_in_a_batch_leads_to_the_first_by_key_in_either_order():
    for keys, solved in (([5, 6], [0, 1]), ([6, 5], [1, 0])):
        history = History()
        drawn(history, 1, keys, [70, 70], solved)
        assert failures_of(history, 70) == [1]
        assert history.keys_of_prompts(np.array([70], dtype=np.uint64))[1].tolist() == [5]


def test_a_prompt_that_is_not_known_leads_nowhere():
    """Number 0 stands for a batch without prompts; it takes no place and does not hide the others."""
    history = History()
    drawn(history, 1, [1, 2, 3], [0, 70, 0], [0, 0, 0])
    assert failures_of(history, 0, 70, 71) == [0, 1, 0]
    assert len(history) == 3 and history._prompts.keys.tolist() == [70]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def some_history(questions=500, steps=6) -> History:
    draw, history = np.random.default_rng(2), History()
    for step in range(1, steps):
        keys = draw.integers(0, questions, 128, dtype=np.uint64)
        observe(history, step, draw.integers(0, 5, 128), draw.random(128) < 0.5, keys=keys)
        history.observe_demos(keys, draw.integers(0, 4, 128))
    history.tokens_saved = 12.5
    return history


def test_a_restored_history_is_the_same_and_goes_on_the_same(tmp_path):
    one = some_history()
    one.save(str(tmp_path / "global_step_5" / FILE))
    other = History.read(str(tmp_path / "global_step_5" / FILE))
    for _ in range(2):
        for name, value in one.state_dict().items():
            assert np.array_equal(value, other.state_dict()[name]) and value.dtype == other.state_dict()[name].dtype
        for history in (one, other):
            observe(history, 9, [0, 1, 2], keys=[5, 10**9, 3])
            history.observe_demos(numbers(["x"]), np.array([1]))
    assert os.listdir(tmp_path / "global_step_5") == [FILE], "nothing is left beside it"


def test_a_loaded_state_is_a_copy():
    one, other = some_history(), History()
    other.load_state_dict(one.state_dict())
    before = one.column("drawn").copy()
    observe(other, 9, [0] * 3, keys=one.state_dict()["keys"][:3])
    assert np.array_equal(one.column("drawn"), before)


def test_a_write_that_is_cut_off_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / FILE
    some_history().save(str(path))
    good = path.read_bytes()

    def cut_off(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(OSError, match="no space"):
        History().save(str(path))
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 100, lambda data: data[:-5000]],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / FILE
    some_history().save(str(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=str(path)):
        History.read(str(path))


def test_another_version_or_arrays_that_do_not_fit_are_refused():
    state = some_history().state_dict()
    with pytest.raises(UserError, match="version 3; this verl-hpt reads version 2"):
        History().load_state_dict(state | {"version": np.array(3)})
    with pytest.raises(UserError, match="drawn has shape"):
        History().load_state_dict(state | {"drawn": state["drawn"][:-1]})
    with pytest.raises(UserError, match="without flags"):
        History().load_state_dict({name: value for name, value in state.items() if name != "flags"})


# --- size and speed ---------------------------------------------------------------------------------------------------


def test_history_is_small_and_a_steps_look_ups_are_quick():
    """107 bytes a question are 1 GiB at ten million; 1,024 look-ups take at most 10 ms of a step that takes seconds."""
    draw, history = np.random.default_rng(3), History()
    keys = np.unique(draw.integers(0, 2**64, 300_000, dtype=np.uint64))
    for part in np.array_split(draw.permutation(keys), 8):
        observe(history, 1, np.zeros(len(part)), keys=part)
    assert history.nbytes < 107 * len(keys)
    asked = draw.choice(keys, 1024)
    seconds = []
    for _ in range(20):
        start = time.thread_time()
        history.look_up(asked, "uses", "taught_at")
        history.look_up_prompts(asked + np.uint64(1000), "failures")
        history.demo_uses(asked, np.ones(1024, dtype=int))
        observe(history, 2, np.zeros(1024), keys=asked)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.01, seconds
