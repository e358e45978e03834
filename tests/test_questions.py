"""From a batch's rows to questions: identities, failed sessions, unusable demonstrations, broken rewards."""

import logging
from collections import Counter

import numpy as np
import pytest

from verl_hpt.config import Demo
from verl_hpt.errors import UserError
from verl_hpt.history import Past
from verl_hpt.host.batch import Group, Reader, Scored, group_rows, questions_of, row_sums
from verl_hpt.methods import METHODS
from verl_hpt.plan import PlanSettings


class Letters:
    """A tokenizer of one token a letter; 0 ends."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens=False):
        return [ord(letter) for letter in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, token):
        return "<end>" if token == 0 else chr(token)


def reader(**settings) -> Reader:
    return Reader(Letters(), 0, Demo(**settings), max_length=8)


def group(target, rows=(0, 1), **columns) -> Group:
    return Group("u", list(rows), "key", "src", [1, 2, 3], {"target": target, "extra_info": {"index": 7}, **columns})


def scored(scores, length=4) -> Scored:
    """Rows of equal length, none of them cut."""
    scores = np.asarray(scores, dtype=float)
    lengths = np.full(len(scores), length)
    return Scored(scores, scores, lengths, lengths, np.zeros(len(scores), dtype=bool))


def ask(groups, scores, **settings):
    return questions_of(groups, scored(scores), reader(**settings), PlanSettings(METHODS["hpt"], "question", 8.0), 1)[
        :3
    ]


def test_rows_are_grouped_by_question_in_the_order_of_sessions_and_padding_is_left_out():
    groups = group_rows(["b_1_0", "a_0_0", "pad_0_0", "b_0_0"], [False, False, True, False])
    assert [(g.uid, g.rows) for g in groups] == [("b", [3, 0]), ("a", [1])]


def test_several_outputs_of_a_session_are_refused():
    with pytest.raises(UserError, match="a_0 has several outputs"):
        group_rows(["a_0_0", "a_0_1"], [False, False])


def test_row_sums_of_a_jagged_tensor_with_an_empty_row():
    assert row_sums(np.array([1.0, 2, 3]), np.array([0, 2, 2, 3])).tolist() == [3, 0, 3]
    assert row_sums(np.array([2.0]), np.array([0, 0, 1, 1])).tolist() == [0, 2, 0]
    assert row_sums(np.zeros(0), np.array([0, 0])).tolist() == [0]


def test_a_rows_sum_does_not_depend_on_the_rows_beside_it():
    """Differences of one running sum lost a score of 1 beside one of 1e17, and bent it beside values of 1e-8."""
    values = np.array([1e17, 1.0, -1e17, 0.5], dtype=np.float32)
    assert row_sums(values, np.array([0, 1, 2, 3, 4])).tolist() == values.astype(float).tolist()
    draw = np.random.default_rng(0)
    values = np.where(np.arange(8192) % 2, np.float32(1), draw.random(8192, dtype=np.float32) * np.float32(1e-8))
    assert row_sums(values, np.arange(8193)).tolist() == values.astype(float).tolist()


def test_the_tokens_of_a_row_are_summed_in_float64():
    values = np.full(30_000, np.float32(0.1))
    assert row_sums(values, np.array([0, 30_000]))[0] == pytest.approx(30_000 * float(np.float32(0.1)), rel=1e-12)


def test_a_usable_demonstration_ends_with_exactly_one_end_token():
    for text in ("ab", "ab<end>", [{"role": "assistant", "content": "ab"}]):
        _, read, counts = ask([group(text)], [0, 0])
        assert read[0][0].ids == [97, 98, 0] and not counts


@pytest.mark.parametrize(
    ("target", "reason"),
    [(None, "null"), ("", "empty"), ("  ", "empty"), (7, "not_text"), ("much too long", "too_long"), ([], "null")],
)
def test_an_unusable_demonstration_is_counted_and_warned_of_once(target, reason, caplog):
    chosen = reader()
    counts = Counter()
    with caplog.at_level(logging.WARNING):
        assert chosen.usable(group(target), counts) == [] == chosen.usable(group(target), counts)
    assert counts["unusable"] == 2 and counts[f"unusable/{reason}"] == 2
    assert len(caplog.records) == 1 and "question key" in caplog.text and "index 7" in caplog.text


def test_on_unusable_error_stops_and_names_the_question():
    with pytest.raises(UserError, match=r"question key .*'src', index 7.*'target'.*on_unusable=keep"):
        ask([group("")], [0, 0], on_unusable="error")


def test_demonstrations_of_solved_questions_are_not_even_read():
    questions, read, counts = ask([group("")], [1, 0])
    assert read == [[]] and not counts and len(questions[0].demo_lengths) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_with_the_questions_identity(bad):
    with pytest.raises(UserError, match=r"question key \(data source 'src', index 7\): reward .*not finite"):
        ask([group("ab")], [0, bad])


def test_a_demonstrations_reward_comes_from_its_column():
    _, read, _ = ask([group(["ab", "cd"], score=[0.5, 1.0])], [0, 0], reward="score", per_question=2)
    assert [demo.values["reward"] for demo in read[0]] == [0.5, 1.0]
    _, read, counts = ask([group("ab", score=None)], [0, 0], reward="score")
    assert read == [[]] and counts["unusable/bad_column"] == 1


def draws(target, count, **settings) -> list[list[int]]:
    """Places shown at each of ``count`` draws of one question in one batch, none of them solved."""
    groups = [group(target, rows=(2 * i, 2 * i + 1)) for i in range(count)]
    past = settings.pop("past", None)
    _, read, counts, _ = questions_of(
        groups, scored([0.0] * 2 * count), reader(**settings), PlanSettings(METHODS["hpt"], "question", 8.0), 1, past
    )
    return [[demo.index for demo in shown] for shown in read], counts


@pytest.mark.parametrize("select", ["random", "round_robin", "unseen_first"])
def test_a_question_twice_in_a_batch_is_shown_another_demonstration_the_second_time(select):
    shown, _ = draws(["a", "b", "c"], 3, select=select)
    assert sorted(place for places in shown for place in places) == [0, 1, 2]
    pairs, _ = draws(["a", "b", "c", "d"], 2, select=select, per_question=2)
    assert sorted(place for places in pairs for place in places) == [0, 1, 2, 3]
    again, _ = draws(["a"], 2, select=select)
    assert again == [[0], [0]], "the only demonstration there is"


@pytest.mark.parametrize("select", ["first", "shortest"])
def test_a_rule_that_names_one_demonstration_names_it_at_every_draw(select):
    assert draws(["a", "bb"], 2, select=select)[0] == [[0], [0]]


def test_a_demonstration_that_its_first_draw_retires_is_not_shown_to_the_second():
    past = [Past(uses=1, demo_uses=[1], retire_after=2)] * 2
    shown, counts = draws(["a"], 2, past=past)
    assert shown == [[0], []] and counts["history/retired"] == 1


def test_what_two_draws_of_a_question_are_shown_does_not_depend_on_their_order():
    def by_rewards(order):
        groups = [group(["a", "b"], rows=(2 * i, 2 * i + 1)) for i in range(2)]
        scores = [0.1, 0.2, 0.3, 0.4] if order else [0.3, 0.4, 0.1, 0.2]
        questions, read, *_ = questions_of(
            groups, scored(scores), reader(select="random"), PlanSettings(METHODS["hpt"], "question", 8.0), 1
        )
        return {q.rewards[0]: demo.index for q, (demo,) in zip(questions, read, strict=True)}

    assert by_rewards(True) == by_rewards(False)
