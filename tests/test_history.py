"""The history of questions, and what follows from it."""

import dataclasses
import os
import time

import numpy as np
import pytest

from verl_hpt.errors import UserError
from verl_hpt.history import LISTINGS, Draw, History, Index, number, numbers, prompt_number
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


def test_numbers_are_those_that_earlier_checkpoints_have():
    """Hashes of keys and prompts, and where a demonstration's uses stand, reckoned without the package."""
    assert number("question 7") == 406501663031947301
    assert number("ABCDEF0123456789") == number("ABCDEF0123456789") != int("ABCDEF0123456789", 16)
    assert number("0" * 15) != 0 != number("0" * 17), "sixteen digits, no more and no fewer"
    messages = [{"role": "user", "content": "Wie groß ist √2?"}]
    assert prompt_number("gsm8k", messages) == 10246916772431935664
    assert prompt_number("a", ["b", None, "\udc80"]) == prompt_number("a", ["b", None, "\udc80"])
    history = History()
    history.observe_demos(np.array([5, 5, 2**64 - 1], dtype=np.uint64), np.array([0, 1, 7]))
    assert sorted(history.state_dict()["demos"].tolist()) == [
        3068323830470825495, 6238072747940578784, 15839785061582574735,
    ]  # fmt: skip


def test_an_index_of_any_size_finds_what_it_holds_and_keeps_room():
    """Around the places at which its table grows, key by key and at once."""
    keys = np.random.default_rng(4).integers(0, 2**64, 3000, dtype=np.uint64)
    one = Index()
    for i, key in enumerate(keys[:1500]):
        assert one.add(np.array([key])).tolist() == [i] and len(one) == i + 1
    assert one.find(keys).tolist() == [*range(1500), *[-1] * 1500]
    for size in (0, 1, 716, 717, 1023, 1024, 1025, 3000):
        index = Index(keys[:size])
        assert len(index) == size and index.keys.tolist() == keys[:size].tolist()
        assert index.find(keys).tolist() == [*range(size), *[-1] * (3000 - size)]
        assert index.add(keys[:0]).tolist() == [] and index.find(keys[:0]).tolist() == []
        assert len(index._table) > size / 0.7, "open addressing needs free places"


def test_an_index_of_more_keys_than_it_places_at_once_finds_them_all():
    """Its table is filled by 2^20 keys at a time."""
    keys = np.arange((1 << 20) + 70_000, dtype=np.uint64)
    index = Index(keys)
    at = np.array([0, (1 << 20) - 1, 1 << 20, len(keys) - 1])
    assert index.find(keys[at]).tolist() == at.tolist() and len(index) == len(keys)
    assert (index.find(keys[1 << 20 :]) >= 1 << 20).all()
    assert index.find(np.array([len(keys)], dtype=np.uint64)).tolist() == [-1]


def test_what_a_step_did_cannot_be_changed():
    draw = Draw(*(np.zeros(0) for _ in range(6)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        draw.keys = draw.prompts


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


# A draw: solved of 4, taught on a demonstration, trained on rollouts. Then: what the question is, failures in a row.
TAUGHT, RL, BOTH, NOTHING = (True, False), (False, True), (True, True), (False, False)
CAREERS = [
    ([], "", 0),
    ([(0, TAUGHT)], "hopeless", 1),
    ([(0, RL)], "hopeless", 1),
    ([(0, NOTHING)] * 3, "hopeless", 3),
    ([(1, RL)], "", 0),
    ([(4, TAUGHT)], "", 0),
    ([(0, TAUGHT), (1, RL)], "graduated", 0),
    ([(2, TAUGHT), (1, RL)], "graduated", 0),
    ([(0, TAUGHT), (1, NOTHING)], "", 0),
    ([(0, TAUGHT), (1, BOTH)], "", 0),
    ([(0, BOTH), (1, RL)], "graduated", 0),
    ([(0, TAUGHT), (0, RL)], "hopeless", 2),
    ([(0, RL), (1, RL)], "", 0),
    ([(0, TAUGHT), (1, TAUGHT), (1, RL)], "graduated", 0),
    ([(0, TAUGHT), (0, RL), (0, RL), (4, RL)], "graduated", 0),
    ([(0, TAUGHT), (1, RL), (0, TAUGHT)], "graduated forgotten", 1),
    ([(0, TAUGHT), (1, RL), (0, TAUGHT), (1, TAUGHT)], "graduated", 0),
    ([(1, RL), (0, TAUGHT)], "forgotten", 1),
    ([(1, RL), (0, RL), (0, RL)], "forgotten", 2),
    ([(1, RL), (0, RL), (1, RL)], "", 0),
    ([(1, RL), (0, RL), (1, RL), (0, RL)], "forgotten", 1),
    ([(1, RL), (0, TAUGHT), (1, RL)], "graduated", 0),
]


@pytest.mark.parametrize(("draws", "is_", "failures"), CAREERS)
def test_what_a_question_is_after_its_draws(draws, is_, failures):
    history = History()
    for step, (solved, (taught, on_rl)) in enumerate(draws, 1):
        observe(history, step, [solved], [taught], on_rl=np.array([on_rl]))
    named = [name for name in LISTINGS if name != "all" and len(history.listing(name)["key"])]
    assert named == is_.split()
    assert history.totals() == {"questions": len(history)} | {
        name: int(name in named) for name in ("graduated", "forgotten", "hopeless")
    }
    assert columns(history, "failures", "drawn", "uses") == [
        [failures], [len(draws)], [sum(taught for _, (taught, _) in draws)],
    ]  # fmt: skip
    last = [step for step, (_, (taught, _)) in enumerate(draws, 1) if taught][-1:] or [0]
    assert columns(history, "taught_at", "drawn_at", "solved") == [last, [len(draws)], [(draws or [(0,)])[-1][0]]]


def test_a_listing_has_every_column_of_its_questions_in_the_order_in_which_they_came():
    history = History()
    observe(history, 3, [0, 2], keys=[7, 5])
    observe(history, 4, [0, 0], keys=[7, 5], n=3)
    listed = history.listing("all")
    assert {name: values.tolist() for name, values in listed.items()} == {
        "key": [5, 7], "solved": [0, 0], "rollouts": [3, 3], "drawn": [2, 2], "failures": [1, 2], "uses": [1, 2],
        "drawn_at": [4, 4], "taught_at": [4, 4],
    }  # fmt: skip
    assert listed["key"].dtype == np.uint64
    assert history.listing("forgotten")["failures"].tolist() == [1]
    assert history.listing("hopeless")["uses"].tolist() == [2]
    assert history.listing("graduated")["key"].tolist() == []


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


def test_a_question_several_times_in_a_batch_is_so_many_draws_the_unsolved_first():
    history = History()
    observe(history, 1, [0, 2, 0, 1, 0], keys=[1, 2, 1, 3, 1])
    assert columns(history, "drawn", "failures", "uses", questions=3) == [[3, 1, 1], [3, 0, 0], [3, 0, 0]]
    for solved in ([3, 0, 1], [0, 1, 3]):
        history = History()
        observe(history, 5, solved, taught=[False] * 3, keys=[1, 1, 1])
        assert columns(history, "drawn", "failures", "solved", "drawn_at") == [[3], [0], [3], [5]]
        assert history.totals() == {"questions": 1, "graduated": 0, "forgotten": 0, "hopeless": 0}
    for order in ([0, 1], [1, 0]):  # equal scores: the one of fewer rollouts, then the untaught, then the one off RL
        history = History()
        none, keys = np.zeros(2, dtype=bool), np.ones(2, dtype=np.uint64)
        history.observe(1, Draw(keys, keys, np.ones(2), np.array([4, 2])[order], none, ~none))
        assert columns(history, "rollouts") == [[4]]
        taught = np.array([True, False])[order]
        history.observe(2, Draw(keys, keys, np.ones(2), none + 4, taught, none))
        history.observe(3, Draw(keys, keys, np.ones(2), none + 4, none, ~none))
        assert columns(history, "uses", "taught_at") == [[1], [2]] and history.totals()["graduated"] == 1


def test_an_empty_step_leaves_the_history_as_it_was():
    history = some_history()
    before = {name: value.copy() for name, value in history.state_dict().items()}
    observe(history, 9, np.zeros(0))
    history.observe_demos(numbers([]), np.zeros(0, dtype=int))
    assert all(np.array_equal(value, before[name]) for name, value in history.state_dict().items())
    assert History().demo_uses(numbers([]), np.zeros(0, dtype=int)) == []


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
    before = {name: value.copy() for name, value in one.state_dict().items()}
    keys, prompts = before["keys"][:3], before["prompts"][:3]
    none = np.zeros(3, dtype=bool)
    other.observe(9, Draw(keys[::-1], prompts, none * 0, none * 4, ~none, none))
    other.observe_demos(np.repeat(keys, 4), np.tile(np.arange(4), 3))
    after = other.state_dict()
    for name in ("drawn", "uses", "drawn_at", "prompt_rows", "demo_uses"):
        assert not np.array_equal(after[name][: len(before[name])], before[name]), f"{name} changed"
    for name, value in one.state_dict().items():
        assert np.array_equal(value, before[name]), name


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
