"""How much of a demonstration a rollout starts from: draws, lengths, hints, lengths that follow the solve rate."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from verl_hpt.config import load, parse, resolve_method, start_of
from verl_hpt.errors import UserError
from verl_hpt.methods import METHODS
from verl_hpt.places.schedule import Schedule
from verl_hpt.places.starts import (
    PLAIN,
    QUESTA,
    Adapted,
    Chunks,
    Start,
    Uniform,
    adapted,
    amounts,
    draw,
    hint_of,
    hinted,
    in_words,
    merged,
    prefix_length,
)

RANGE = Start(Uniform(0.25, 0.75), rollouts="all")
KEYS = [f"question {i}" for i in range(2000)]


def drawn(start: Start, n: int = 4, seed: int = 0, key: str = "a", step: int = 3, **given) -> list[float]:
    return amounts(start, n, seed=seed, key=key, step=step, **given)


# --- draws ------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_parts_alone_and_on_each_of_them():
    assert draw(0, "a", 3, 1) == draw(0, "a", 3, 1)
    parts = [(0, "a", 3, 1), (1, "a", 3, 1), (0, "b", 3, 1), (0, "a", 4, 1), (0, "a", 3, 2), (0, "a", 31), (0, "a3", 1)]
    assert len({draw(*each) for each in parts}) == len(parts)
    assert draw("a", "bc") != draw("ab", "c") and 0 <= draw("\ud800") < 1, "text that is no Unicode is a key too"


def test_draws_are_uniform():
    values = np.array([draw(0, key, step) for key in KEYS for step in range(5)])
    counts, _ = np.histogram(values, 20, (0, 1))
    assert values.min() >= 0 and values.max() < 1 and values.mean() == pytest.approx(0.5, abs=0.01)
    assert np.sum((counts - 500) ** 2 / 500) < 45, "chi² of 19 degrees: above 45 once in a thousand draws"


def test_the_same_question_at_the_same_step_starts_alike_whatever_was_drawn_before():
    first = drawn(RANGE)
    drawn(RANGE, key="b")
    assert drawn(RANGE) == first and len(set(first)) == 4, "each session draws its own"
    for other in ({"seed": 1}, {"key": "b"}, {"step": 4}):
        assert not set(drawn(RANGE, **other)) & set(first), other
    assert drawn(RANGE, n=2) == first[:2], "a session's draw does not depend on how many there are"


# --- shares -----------------------------------------------------------------------------------------------------------


def test_a_uniform_share_lies_in_its_range_and_fills_it():
    values = [share for key in KEYS for share in drawn(RANGE, key=key)]
    assert 0.25 <= min(values) < 0.26 and 0.74 < max(values) < 0.75
    assert np.mean(values) == pytest.approx(0.5, abs=0.005)
    moving = Start(Uniform(Schedule(0.9, 0.0, 10), Schedule(1.0, 0.5, 10)), rollouts="all")
    for step, low, high in ((0, 0.9, 1.0), (5, 0.45, 0.75), (10, 0.0, 0.5), (99, 0.0, 0.5)):
        values = [share for key in KEYS[:500] for share in drawn(moving, key=key, step=step)]
        assert low <= min(values) <= low + 0.01 and high - 0.01 <= max(values) <= high, step


def test_chunks_are_a_binomial_share():
    start = Start(Chunks(5, 0.3), rollouts="all")
    values = Counter(round(5 * share) for key in KEYS for share in drawn(start, key=key))
    expected = {0: 0.16807, 1: 0.36015, 2: 0.3087, 3: 0.1323, 4: 0.02835, 5: 0.00243}
    assert {k: n / 8000 for k, n in values.items()} == pytest.approx(expected, abs=0.015)
    assert set(drawn(start)) <= {0, 0.2, 0.4, 0.6, 0.8, 1.0}
    for p, share in ((0.0, 0.0), (1.0, 1.0)):
        assert drawn(Start(Chunks(3, p), rollouts="all")) == [share] * 4
    fading = Start(Chunks(4, Schedule(1.0, 0.0, 2, "step")), rollouts="all")
    assert [drawn(fading, step=step)[0] for step in (2, 3)] == [1.0, 0.0]


def test_a_number_and_a_schedule_are_the_same_for_every_rollout():
    assert drawn(Start(0.5, rollouts="all")) == [0.5] * 4
    assert drawn(Start(Schedule(1.0, 0.0, 4), rollouts="all"), step=1) == [0.75] * 4


def test_a_list_has_a_share_for_each_rollout_and_those_beyond_it_start_from_nothing():
    start = Start([0.0, 0.25, 0.5], rollouts=1)  # the list says how many
    assert drawn(start, 3) == [0.0, 0.25, 0.5] and drawn(start, 5) == [0.0, 0.25, 0.5, 0.0, 0.0]
    assert drawn(start, 2) == [0.0, 0.25] and drawn(start, 1) == [0.0]


def test_an_adapted_length_is_a_number_of_tokens():
    start = Start(Adapted(3072), rollouts=2)
    assert drawn(start) == [3072.0, 3072.0, 0.0, 0.0] and drawn(start, tokens=100.5) == [100.5, 100.5, 0.0, 0.0]


# --- how many, and when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rollouts", "n", "started"),
    [
        (1, 8, 1),
        (2, 8, 2),
        (7, 8, 7),
        (8, 8, 7),
        (99, 8, 7),
        (1, 2, 1),
        (1, 1, 0),
        (3, 1, 0),
        ("all", 8, 8),
        ("all", 1, 1),
    ],
)
def test_one_rollout_at_least_starts_from_nothing_unless_all_are_asked_for(rollouts, n, started):
    """The early gate may leave few, or one."""
    found = drawn(Start(0.5, rollouts=rollouts), n)
    assert found == [0.5] * started + [0.0] * (n - started)


def test_after_its_last_step_nothing_starts_from_a_demonstration():
    for share in (0.5, [0.5, 0.25], Uniform(0.5, 1.0), Adapted(4)):
        start = Start(share, rollouts="all", until=7)
        assert all(drawn(start, 2, step=7)) and drawn(start, 2, step=8) == [0.0, 0.0]
    assert drawn(Start(0.5, rollouts="all", until=0), 2, step=1) == [0.0, 0.0]
    assert drawn(RANGE, 0) == []


# --- tokens of a prefix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "tokens", "limit", "length"),
    [
        (0.6, 10, 99, 6),  # 0.6·10 is 6 in floats; 0.29·100 is 28.999…96
        (0.29, 100, 999, 29),
        (0.07, 100, 999, 7),
        (0.59, 10, 99, 5),
        (1.0, 10, 99, 9),  # a token of the demonstration is left to the rollout
        (1.0, 10, 10, 9),
        (1.0, 10, 5, 4),  # and one of the response
        (0.4, 10, 5, 4),
        (0.5, 10, 1, 0),
        (0.05, 10, 99, 0),
        (0.0, 10, 99, 0),
        (1.0, 1, 99, 0),
        (1.0, 0, 99, 0),
    ],
)
def test_tokens_of_a_prefix(amount, tokens, limit, length):
    assert prefix_length(amount, merged(Start(0.5)), tokens, limit) == length


def test_no_share_gives_a_whole_demonstration_or_fills_a_response():
    start = merged(Start(0.5))
    for tokens in range(1, 60):
        for amount in (0.1, 0.3, 0.7, 0.9, 0.95, 1.0):
            for limit in (2, 30, 999):
                length = prefix_length(amount, start, tokens, limit)
                assert 0 <= length <= min(tokens - 1, limit - 1) and length <= amount * tokens + 1e-6
                assert length in (int(amount * tokens + 1e-6), tokens - 1, limit - 1)


def test_a_prefix_below_its_least_length_is_none():
    start = merged(Start(0.5, min_length=4))
    assert [prefix_length(share, start, 10, 99) for share in (0.3, 0.39, 0.4, 0.5)] == [0, 0, 4, 5]
    assert prefix_length(1.0, start, 4, 99) == 0


def test_an_adapted_length_does_not_depend_on_the_demonstrations():
    start = merged(Start(Adapted(3072)))
    assert [prefix_length(7.9, start, tokens, 99) for tokens in (100, 8, 7, 1)] == [7, 7, 6, 0]
    assert prefix_length(3072, start, 5000, 1024) == 1023


# --- hints ------------------------------------------------------------------------------------------------------------


def test_a_hint_is_the_first_part_of_what_stands_after_the_thoughts():
    start = merged(Start(0.5))
    assert hint_of(0.5, start, "<think>first\nno</think>\n\n 0123456789 ") == "01234"
    assert hint_of(0.5, start, " 0123456789\n") == "01234" and hint_of(1.0, start, "0123456789") == "0123456789"
    assert hint_of(0.5, start, "a</think>b</think>0123456789") == "01234", "after the last of them"
    assert hint_of(0.29, start, "x" * 100) == "x" * 29


def test_a_hint_below_its_least_length_is_none():
    start = merged(METHODS["questa"].start)
    assert start.min_length == 10
    assert hint_of(0.5, start, "x" * 20) == "x" * 10 and hint_of(0.5, start, "x" * 19) is None
    assert hint_of(1.0, merged(Start(1.0)), "only thoughts</think>  ") is None


def test_a_hinted_prompt_takes_question_and_hint_as_they_are():
    assert hinted(QUESTA, "1 + 1?", "It is") == "1 + 1?\n\n## Hint.It is"
    question, hint = r"What is {hint} in \frac{1}{2}?" + "\n", r"{question} \n \1 \g<0>"
    assert hinted("[{hint}|{question}]", question, hint) == f"[{hint}|{question}]"


def test_a_command_lines_new_line_is_one_in_the_template_alone():
    assert hinted(r"{question}\n\nHint: {hint}", r"a\nb", r"c\nd") == "a\\nb\n\nHint: c\\nd"


# --- a length that follows the solve rate -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "length"),
    [
        ([], 100),
        ([0.5], 100),
        ([0.5, 0.4], 100),
        ([0.5, 0.3, 0.4], 100),  # the mean of the two before, 0.4
        ([0.5, 0.3, 0.2], 200),
        ([0.5, 0.3, 0.8], 50),
        ([0.5, 0.3, 0.8, 0.1], 100),
        ([9.0, 9.0, 9.0, 0.5, 0.3, 0.2], 200),  # of the last three
        ([0.5, 0.5, 0.1], 400),  # 500, and 400 at most
        ([0.01, 0.0, 1.0], 1),  # 0.5, and 1 at least
        ([0.5, 0.0, 0.0], 400),  # nothing is solved any more
        ([0.0, 0.0, 0.0], 100),
        ([0.0, 0.0, 0.5], 1),
    ],
)
def test_the_length_grows_where_the_solve_rate_fell(rates, length):
    assert adapted(100.0, rates, 3, 400) == pytest.approx(length)


def test_the_length_changes_at_every_so_many_steps():
    rates = [0.4, 0.2]
    assert adapted(100.0, rates, 2, 400) == 200 and adapted(100.0, [*rates, 0.1], 2, 400) == 100
    assert adapted(100.0, [0.4, 0.2, 0.6, 0.2], 4, 400) == pytest.approx(200)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_what_the_settings_leave_open_is_the_methods_and_then_the_plain_one():
    mine, methods = Start(0.25, min_length=5), Start(0.75, rollouts=2, until=9)
    assert merged(mine, methods) == Start(0.25, 2, 9, 0, 5, QUESTA)
    assert merged(None, methods) == Start(0.75, 2, 9, 0, 1, QUESTA) and merged(None, None) == PLAIN
    assert dataclasses.asdict(PLAIN) == {
        "share": None, "rollouts": "all", "until": None, "after_failures": 0, "min_length": 1, "template": QUESTA
    }  # fmt: skip
    assert merged(Start(after_failures=0), Start(after_failures=3)).after_failures == 0, "0 is said"


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("prefix_rft", Start(Uniform(Schedule(0.95, 0.0, 300, "cosine"), 0.95), 1, None, 0, 1, QUESTA)),
        ("uft", Start(Chunks(5, Schedule(0.95, 0.05, 300, "cosine")), "all", 300, 0, 1, QUESTA)),
        ("stephint", Start([0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75], "all", None, 0, 1, QUESTA)),
        ("g2rpo_a", Start(Adapted(3072, 3), 2, None, 0, 1, QUESTA)),
        ("questa", Start(0.5, "all", None, 0, 10, QUESTA)),
        ("guide", Start(1.0, 4, None, 1, 1, QUESTA)),
    ],
)
def test_the_methods_own_starts_are_the_papers(method, start):
    assert start_of(load({"method": method}), resolve_method(load({"method": method}))) == start


def test_starts_are_read_from_settings():
    def share(value):
        return load({"start": {"share": value}}).start.share

    assert share(1) == 1.0 and share([0, 0.5]) == [0.0, 0.5] and load({}).start is None
    assert share({"start": 0.9, "end": 0.1, "steps": 5}) == Schedule(0.9, 0.1, 5)
    assert share({"low": {"start": 0.9, "end": 0, "steps": 5}, "high": 0.95}) == Uniform(Schedule(0.9, 0.0, 5), 0.95)
    assert share({"chunks": 3, "p": 0.5}) == Chunks(3, 0.5) and share({"tokens": 9}) == Adapted(9, 3)
    assert share({"low": 0.5, "high": 0.5}) == Uniform(0.5, 0.5), "equal bounds are a range"
    least = load({"start": {"rollouts": 1, "until": 0, "after_failures": 0, "min_length": 1}}).start
    assert (least.rollouts, least.until, least.after_failures, least.min_length) == (1, 0, 0, 1)


def test_all_rollouts_may_start():
    assert load({"start": {"rollouts": "all"}}).start.rollouts == "all"


def saying(node: dict) -> list[str]:
    return parse({"start": node})[1]


SHARE = (
    "a number or a schedule {start, end, steps, shape, warmup} or a uniform {low, high} or a chunks {chunks, p} or an "
    "adapted {tokens, every} or a list"
)
BETWEEN = "must be a number or a schedule {start, end, steps, shape, warmup}, at least 0 and at most 1"


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"share": 1.5}, "share=1.5: must lie between 0 and 1"),
        ({"share": -0.1}, "share=-0.1: must lie between 0 and 1"),
        ({"share": [0.5, 2, -1]}, "share=[0.5, 2.0, -1.0]: must lie between 0 and 1"),
        ({"share": [0, 0]}, "share=[0.0, 0.0]: one must be above 0"),
        ({"share": []}, "share=[]: one must be above 0"),
        ({"share": "half"}, f"share='half': must be null or {SHARE}, got str"),
        ({"share": True}, f"share=True: must be null or {SHARE}, got bool"),
        ({"share": ["a"]}, "share[0]='a': must be a number, got str"),
        ({"share": {"low": 0.5, "high": 0.4}}, "share.low=0.5: must not lie above high, which is 0.4 at step 0"),
        ({"share": {"low": {"start": 0, "end": 0.9, "steps": 10}, "high": 0.5}},
         "share.low=0.54: must not lie above high, which is 0.5 at step 6"),
        ({"share": {"low": 0.5, "high": {"start": 0.9, "end": 0.4, "steps": 1, "shape": "step", "warmup": 2}}},
         "share.low=0.5: must not lie above high, which is 0 at step 0"),
        ({"share": {"low": 0.5, "high": {"start": 0.9, "end": 0.4, "steps": 2, "shape": "step"}}},
         "share.low=0.5: must not lie above high, which is 0.4 at step 3"),
        ({"share": {"low": -0.5, "high": 0.4}}, f"share.low=-0.5: {BETWEEN}: smallest share"),
        ({"share": {"low": 0.5, "high": 1.4}}, f"share.high=1.4: {BETWEEN}: largest share"),
        ({"share": {"low": 0.5}}, "share: needs high; got low"),
        ({"share": {"chunks": 0, "p": 0.5}},
         "share.chunks=0: must be a whole number at least 1: equal parts of a demonstration; each is taken with "
         "probability p"),
        ({"share": {"chunks": 3, "p": 1.5}}, f"share.p=1.5: {BETWEEN}: the probability"),
        ({"share": {"tokens": 0}}, "share.tokens=0: must be a whole number at least 1: tokens of the first steps; then "
         "the length follows the solve rate"),
        ({"share": {"tokens": 9, "every": 1}},
         "share.every=1: must be a whole number at least 2: steps between two changes: tokens · (mean solve rate of "
         "the others) / (the last one)"),
        ({"until": -1}, "until=-1: must be null or a whole number at least 0: the last step at which rollouts start "
         "from demonstrations"),
        ({"after_failures": -1}, "after_failures=-1: must be null or a whole number at least 0: only questions that "
         "failed so many draws in a row; 0: all"),
        ({"min_length": 0}, "min_length=0: must be null or a whole number at least 1: shorter starts are left out: "
         "tokens of a prefix, characters of a hint"),
        ({"template": "{hint}"}, "template='{hint}': must have {question} in it, once"),
        ({"template": "{question}{hint}{hint}"}, "template='{question}{hint}{hint}': must have {hint} in it, once"),
        ({"shares": 1}, "shares: unknown key (value 1); one of share, rollouts, until, after_failures, min_length, "
         "template; did you mean share?"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(node, says):
    assert saying(node) == [f"hpt.start.{says}"]


@pytest.mark.parametrize("rollouts", [0, -1, "some", 1.5, True])
def test_how_many_rollouts_start_is_a_number_from_1_on_or_all(rollouts):
    (problem,) = saying({"rollouts": rollouts})
    assert problem.startswith(f"hpt.start.rollouts={rollouts!r}: must be ")
    assert all(word in problem for word in ("a whole number", "at least 1", "'all'"))


def test_a_schedule_out_of_bounds_is_refused_at_either_end():
    for start, end in ((0.0, 1.2), (1.2, 0.0), (-0.1, 0.5), (0.5, -0.1)):
        (problem,) = saying({"share": {"start": start, "end": end, "steps": 3}})
        assert problem.endswith(": must lie between 0 and 1")
        assert saying({"share": {"low": {"start": start, "end": end, "steps": 3}, "high": 1.0}})
    assert not saying({"share": {"start": 0.0, "end": 1.0, "steps": 3}})


def test_every_problem_of_a_start_comes_at_once():
    assert saying({"share": 3, "template": "x"}) == [
        "hpt.start.share=3.0: must lie between 0 and 1",
        "hpt.start.template='x': must have {question} in it, once",
        "hpt.start.template='x': must have {hint} in it, once",
    ]
    with pytest.raises(UserError, match="these settings cannot work"):
        load({"start": {"share": 3, "template": "x"}})


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (Start(Uniform(Schedule(0.95, 0, 9), 0.95), 1), "1 of 8 rollouts from U(0.95 → 0, 0.95) of the demonstration"),
        (Start(0.5, "all"), "all of 8 rollouts from 0.5 of the demonstration"),
        (Start(Schedule(1, 0, 3), 2), "2 of 8 rollouts from 1 → 0 of the demonstration"),
        (Start(Chunks(5, 0.25), "all"),
         "all of 8 rollouts from 5 parts, each with probability 0.25, of the demonstration"),
        (Start(Adapted(3072), 2), "2 of 8 rollouts from 3072 tokens, adapted every 3 steps, of the demonstration"),
        (Start([0, 0.5], 2), "rollouts start from the shares 0, 0.5 of the demonstration"),
    ],
)  # fmt: skip
def test_a_start_in_words(start, words):
    assert in_words(start, 8) == words
