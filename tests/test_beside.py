"""What a run keeps beside its batches: what a step takes of it, what it collects, and what it tells."""

from collections import Counter

import numpy as np
import pytest
from test_questions import Letters, group, reader

from verl_hpt import config
from verl_hpt.demos.demonstration import Demonstration
from verl_hpt.errors import UserError
from verl_hpt.gate import COLLECT, KEEP, RL, GateSettings
from verl_hpt.history import identity
from verl_hpt.host.batch import Reader
from verl_hpt.host.beside import Beside, collected, entry, question_of
from verl_hpt.methods import METHODS
from verl_hpt.plan import PlanSettings

STREAM, BUFFER, STEERED, ADAPTED = "chord_mu", "relift", "amft_style", "g2rpo_a"
ENTROPY, SOLVED = "actor/entropy", "hpt/solve_rate"
PLAIN = ("grpo", "hpt", "prefix_rft", "questa")  # methods that keep nothing


def beside(method: str, most: int = 500, **node) -> Beside:
    """What a run of a method keeps; the stream of chord_mu and amft_style is not open yet."""
    settings = config.load({"method": method, "stream": {"files": "x.parquet", "batch": 3}, **node})
    return Beside(settings, config.resolve_method(settings), 4, most)


def rows(*targets, **columns) -> list[dict]:
    """The stream's files, a row for each target, as verl's dataset gives them."""
    return [
        {"data_source": "math", "raw_prompt": [{"role": "user", "content": f"q{i}"}], "target": target, "index": i}
        | {name: values[i] for name, values in columns.items()}
        for i, target in enumerate(targets)
    ]


def prompt_of(messages) -> list[int]:
    return Letters().encode(messages[-1]["content"])


def opened(method=STREAM, targets="abcdefghijk", columns=(), demo=(), **node) -> Beside:
    made = beside(method, **node)
    made.open_stream(rows(*targets, **dict(columns)), prompt_of, reader(**dict(demo)))
    return made


# --- the stream -------------------------------------------------------------------------------------------------------


def test_a_streams_entry_is_its_row_as_a_rollouts_prompt_would_have_it():
    made, counts = (
        opened(targets=[["ab", "cdef"]], demo={"reward": "score"}, columns={"score": [[0.5, 0.75]]}),
        Counter(),
    )
    (one, *_) = made.from_stream(7, counts)
    assert one.key == identity(rows(["ab", "cdef"])[0]) and one.source == "math" and one.step == 7
    assert (one.prompt, one.ids, one.mask) == (prompt_of([{"content": "q0"}]), [97, 98, 0], [1, 1, 1])
    assert (one.reward, one.values, one.old_log_probs) == (0.5, {}, None) and not counts
    question = question_of(one)
    assert (question.demo_lengths.tolist(), question.demo_rewards.tolist()) == ([3], [0.5])
    assert len(question.rewards) == 0 and question.source == "math" and question.key == one.key


def test_a_demonstration_without_a_reward_of_its_own_counts_as_solved():
    made = opened(targets=["ab"], gate={"success": 0.25})
    assert [one.reward for one in made.from_stream(1, Counter())] == [0.25] * 3


def test_a_streams_unusable_row_is_not_said_to_keep_rollouts(caplog):
    made = opened(targets=["", "a"], stream={"files": "x", "batch": 2})
    made.from_stream(1, Counter())
    assert any("The stream goes on without it" in text for text in caplog.messages)
    assert not any("keeps its rollouts" in text for text in caplog.messages)


def test_the_streams_unusable_rows_are_counted_by_reason_under_its_own_name():
    made = opened(targets=[None, "ab", "", "much too long", 7, "cd"], stream={"files": "x", "batch": 2})
    counts = Counter({"unusable": 5})
    taken = made.from_stream(1, counts)
    assert len(taken) == 2 and counts["unusable"] == 5
    while made.stream.epoch == 0 and made.stream.position < 6:
        made.from_stream(2, counts)
    reasons = {name.rpartition("/")[2]: n for name, n in counts.items() if name.startswith("stream/unusable/")}
    assert sum(reasons.values()) == counts["stream/unusable"] and set(reasons) == {
        "null", "empty", "too_long", "not_text",
    }  # fmt: skip
    assert set(counts) == {"unusable", "stream/unusable", *(f"stream/unusable/{reason}" for reason in reasons)}


def test_which_of_a_rows_demonstrations_is_chosen_anew_at_every_step():
    made = opened(targets=[["a", "b", "c", "d"]], demo={"select": "random"}, stream={"files": "x", "batch": 1})
    shown = [made.from_stream(step, Counter())[0].ids[0] for step in range(1, 40)]
    assert set(shown) == set(map(ord, "abcd"))
    again = opened(targets=[["a", "b", "c", "d"]], demo={"select": "random"}, stream={"files": "x", "batch": 1})
    assert [again.from_stream(step, Counter())[0].ids[0] for step in range(1, 40)] == shown


@pytest.mark.parametrize("targets", [[None], ["", None, 7, "much too long"]])
def test_a_stream_of_which_no_row_is_usable_is_refused_when_it_is_opened(targets):
    with pytest.raises(
        UserError, match=r"hpt\.stream\.files: no row has a usable demonstration; `verl-hpt data check`"
    ):
        opened(targets=targets)


def test_one_usable_row_among_many_opens_a_stream():
    made = opened(targets=[None] * 20 + ["ab"])
    assert [[one.ids for one in made.from_stream(step, Counter())] for step in (1, 2)] == [[[97, 98, 0]] * 3] * 2


def test_a_stream_whose_rows_were_all_filtered_is_refused():
    with pytest.raises(UserError, match=r"hpt\.stream\.files: no row is left; data\.max_prompt_length filters"):
        opened(targets=[])


def test_on_unusable_error_holds_for_the_stream_too():
    with pytest.raises(UserError, match=r"data source 'math'.*unusable: no demonstration"):
        opened(targets=[None, "ab"], demo={"on_unusable": "error"})


def test_a_row_of_the_stream_that_names_no_question_is_told():
    message = (
        r"hpt\.stream\.files: question None \(data source 'math', index None\): its column 'id' .* names no question"
    )
    with pytest.raises(UserError, match=message):
        opened(targets="ab", columns={"id": ["", "b"]}, question_key="id")
    made = opened(targets="ab", columns={"id": ["a", "b"]}, question_key="id")
    assert {one.key for one in made.from_stream(1, Counter())} == {"a", "b"}


def test_a_text_of_the_stream_that_looks_like_one_of_our_own_is_a_text():
    """Training data pass verl's agent loop, where uneven lists are packed into such texts; the stream does not."""
    text = "verl-hpt packed: ["
    made = beside(STREAM)
    made.open_stream(rows(text), prompt_of, Reader(Letters(), 0, config.Demo(), max_length=99))
    assert made.from_stream(1, Counter())[0].ids == [*map(ord, text), 0]


def test_without_a_stream_nothing_comes_of_it():
    counts = Counter()
    assert beside(BUFFER).from_stream(1, counts) == [] and not counts
    assert beside(STREAM).from_buffer([]) == []


# --- the buffer -------------------------------------------------------------------------------------------------------


def demo(text: str, **values) -> Demonstration:
    ids = [*map(ord, text), 0]
    return Demonstration(text, values={"reward": np.nan, **values}, ids=ids, mask=[1] * len(ids))


def of_question(name: str):
    made = group("unread")
    made.key = name
    return made


def test_only_questions_that_the_gate_sends_there_are_collected():
    groups = [of_question(name) for name in "abcde"]
    shown = [[demo("x"), demo("y")], [demo("z")], [], [demo("w", reward=0.5)], [demo("v")]]
    groups[3].source = "strict"
    gates = {"gate": GateSettings(success=0.75), "gates": {"strict": GateSettings(success=2.0)}}
    settings = PlanSettings(METHODS["relift"], "question", 1.0, **gates)
    shown[3].append(demo("w"))
    found = collected(groups, [COLLECT, RL, COLLECT, COLLECT, KEEP], shown, settings, 9)
    shown[3].reverse()
    assert collected(groups, [RL, RL, RL, COLLECT, RL], shown, settings, 9)[0].reward == 2.0, "of its own source"
    assert [(one.key, one.ids[0], one.reward, one.step) for one in found] == [
        ("a", ord("x"), 0.75, 9), ("d", ord("w"), 0.5, 9),
    ]  # fmt: skip
    assert found[0].prompt == [1, 2, 3] and found[0].source == "src" and found[0].old_log_probs is None


def test_an_entry_is_a_copy_of_its_question_and_demonstration():
    question, chosen = of_question("a"), demo("x", token_weights=np.ones(2))
    question.prompt = np.array([5, 6], dtype=np.int32)
    made = entry(question, chosen, 1.0, 1)
    question.prompt[0], chosen.ids[0], chosen.mask[0] = 0, 0, 0
    assert (made.prompt, made.ids, made.mask) == ([5, 6], [ord("x"), 0], [1, 1]) and set(made.values) == {
        "token_weights"
    }


def test_what_a_step_collects_can_fill_its_own_buffer_steps():
    made = beside(BUFFER, buffer={"size": 2})
    entries = [entry(of_question(name), demo("x"), 1.0, 1) for name in "abc"]
    (part,) = made.from_buffer(entries)
    assert {one.key for one in part} | {one.key for one in made.buffer.entries} == {*"abc"} and len(part) == 2
    assert len(made.buffer.entries) == 1


# --- numbers that follow the run --------------------------------------------------------------------------------------


def test_a_scheduled_lambda_is_told_as_it_was_at_the_step():
    made = opened(demo_coef={"start": 1.0, "end": 0.0, "steps": 4})
    assert [made.demo_coef(step) for step in (0, 1, 4, 9)] == [1, 0.75, 0, 0]
    assert [made.after(step, {})["hpt/demo_coef"] for step in (1, 2, 3)] == [0.75, 0.5, 0.25]


def test_a_number_as_lambda_is_no_metric_and_neither_is_anything_else_of_a_method_that_keeps_nothing():
    for method in PLAIN:
        assert beside(method).after(1, {ENTROPY: 1.0, SOLVED: 0.5}) == {}


def test_a_steered_lambda_is_told_as_it_was_and_then_follows_the_entropy():
    """λ ← clip(λ + 0.1·(0.3 − H)); 0.5, then H = 1.3, 0.8, 9, 0: 0.4, 0.35, 0.05 (clipped), 0.08."""
    made = opened(STEERED, demo_coef={"start": 0.5, "target": 0.3, "rate": 0.1})
    told = [
        made.after(step, {ENTROPY: entropy})["hpt/demo_coef"] for step, entropy in enumerate([1.3, 0.8, 9.0, 0.0], 1)
    ]
    assert told == pytest.approx([0.5, 0.4, 0.35, 0.05], abs=1e-12) and made.demo_coef(99) == pytest.approx(0.08)


def test_a_step_without_the_entropy_that_steers_lambda_stops_the_run():
    made = opened(STEERED)
    with pytest.raises(RuntimeError, match=r"hpt\.demo_coef follows the entropy, and .* no metric actor/entropy"):
        made.after(1, {SOLVED: 0.5})


def test_an_adapted_length_is_told_as_it_was_and_then_follows_the_solve_rate():
    """100 · ((0.5+0.3)/2)/0.2 = 200; the next three solve as much as before; then nothing: the longest there is."""
    made = beside(ADAPTED, start={"share": {"tokens": 100}})
    rates = [0.5, 0.3, 0.2, 0.4, 0.4, 0.4, 0.1, 0.1, 0.0, 0.3]
    told = [made.after(step, {SOLVED: rate})["hpt/start/length"] for step, rate in enumerate(rates, 1)]
    assert told == pytest.approx([100, 100, 100, 200, 200, 200, 200, 200, 200, 500], abs=1e-9)
    assert made.amounts("q", 0, 4, 11) == [500, 500, 0, 0]


def test_buffer_and_stream_are_told_by_value():
    made = beside(BUFFER, buffer={"size": 2})
    made.from_buffer([entry(of_question(name), demo("x"), 1.0, 1) for name in "abc"])
    assert made.after(1, {}) == {"hpt/buffer/entries": 1.0}
    stream, told = opened(targets="abcdefgh", demo_coef=0.5), []
    for step in range(1, 5):
        stream.from_stream(step, Counter())
        told.append(stream.after(step, {}))
    assert told == [{"hpt/stream/epoch": epoch} for epoch in (3 / 8, 6 / 8, 1 + 1 / 8, 1 + 4 / 8)]


def test_only_questions_that_failed_so_often_start_from_demonstrations():
    made = beside("pope", start={"after_failures": 2, "rollouts": 3, "share": 0.4})
    assert [made.amounts("q", failures, 4, 1) for failures in range(4)] == [[0] * 4] * 2 + [[0.4] * 3 + [0]] * 2
    assert made.amounts("q", 5, 1, 1) == [0.0], "one at least starts from nothing"
    assert beside("questa").amounts("q", 0, 2, 1) == [0.5, 0.5]
