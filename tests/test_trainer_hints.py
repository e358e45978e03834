"""The door of the update where rollouts have a hint in their prompt: trained with it, or on the prompt without it."""

import math

import pytest
import torch
from batches import TOKENIZER, keys_there, likelihood, make_trainer, step
from started_rows import DEMO, HINT, Started, by_key, with_hint, with_n
from test_trainer_run import drawn

from verl_hpt.history import identity
from verl_hpt.host.started import START

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"

pytestmark = pytest.mark.usefixtures("queue")


def test_a_hint_in_the_prompt_is_trained_with_it_and_its_group_is_those_that_had_one():
    rollouts = Started().hinted("a", [(1, True, "x"), (0, True, "y"), (1, False, "z"), (0, False, "w")])
    meta, ranks, metrics = step(make_trainer("++hpt.method=pope", with_n(4)), rollouts.batch())
    rows = by_key(meta, ranks)
    assert list(rows) == rollouts.keys, "no row of ours"
    assert [TOKENIZER.decode(row["prompts"]) for row in rows.values()] == ["a:|hint"] * 2 + ["a:"] * 2
    advantage = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert [row["advantage"] for row in rows.values()] == pytest.approx([advantage, -advantage] * 2)
    assert [row["prefix"] for row in rows.values()] == [0] * 4
    expected = {"solve_rate": 0.5, "start/solve_rate": 0.5, "start/share": 0.5, "start/tokens": 0, "start/missed": 0}
    assert {name: metrics[f"hpt/{name}"] for name in expected} == expected


def test_two_hints_that_are_as_long_are_not_the_same_start():
    rollouts = Started().hinted("a", [(1, False, "z"), (0, False, "w")])
    for session, (score, hint) in enumerate([(1, 7), (0, 7), (1, 8)], start=2):
        told = with_hint("a:") | {"hint": hint}
        rollouts.session("a", session, score, f"a:{HINT}", "x", [1, 1], DEMO, {}, told)
    meta, ranks, _ = step(make_trainer("++hpt.method=pope", with_n(5)), rollouts.batch())
    advantage = 0.5 / (math.sqrt(0.5) + 1e-6)
    found = [row["advantage"] for row in by_key(meta, ranks).values()]
    assert found == pytest.approx([advantage, -advantage, advantage, -advantage, 1 / (1 + 1e-6)])


def test_a_question_is_itself_with_a_hint_and_without_one():
    """Also where the first rollout has the hint, whose prompt verl's row holds."""
    trainer = make_trainer("++hpt.method=questa")
    step(trainer, Started().hinted("a", [(0, False, "x")]).batch())
    trainer.global_steps = 2
    step(trainer, Started().hinted("a", [(1, True, "y"), (0, False, "zz")]).batch())
    ((key, record),) = trainer.hpt.lifecycle.history.records.items()
    assert key == identity({"data_source": "src", "raw_prompt": [{"role": "user", "content": "a:"}]})
    assert (record.drawn, record.rollouts, record.failures) == (2, 1, 2), "the plain rollouts alone"
    assert [TOKENIZER.decode(made.groups[0].prompt) for made in trainer.plans] == ["a:", "a:"]


GUIDED = [(0, False, "no"), (0, False, "none"), (1, True, "yes"), (0, True, "not")]


def test_hinted_rollouts_become_rows_of_ours_on_the_plain_prompt():
    """guide: the same response and π_old, the question's prompt; Â over the whole group of four."""
    rollouts = Started().hinted("a", GUIDED)
    trainer = make_trainer("++hpt.method=guide", with_n(4))
    before = dict(zip(rollouts.keys, range(4), strict=True))
    meta, ranks, metrics = step(trainer, rollouts.batch([2, 0, 3, 1]))
    rows = by_key(meta, ranks)
    assert list(rows) == ["a_0_0", "a_1_0", "not<|im_end|>", "yes<|im_end|>"]
    prompt = TOKENIZER.encode("a:")
    for text, key in (("yes", "a_2_0"), ("not", "a_3_0")):
        row, said = rows[f"{text}<|im_end|>"], torch.tensor(rollouts.answers[key])
        assert row["prompts"].tolist() == prompt and row["responses"].tolist() == said.tolist()
        assert row["input_ids"].tolist() == prompt + said.tolist()
        assert row["position_ids"].tolist() == list(range(len(prompt) + len(said)))
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1] * 4
        assert torch.equal(row["old_log_probs"], (likelihood(said) - 0.25 * before[key]).bfloat16())
        assert (row["is_demo"], row["prefix"], row["w_demo"]) == (0, 0, 0)
        assert row["w_rl"] == row["w_entropy"] == pytest.approx(1 / (4 * 4))
    advantage = [0.75 / (0.5 + 1e-6) if text.startswith("yes") else -0.25 / (0.5 + 1e-6) for text in rows]
    assert [row["advantage"] for row in rows.values()] == pytest.approx(advantage)
    assert [row["correct"] for row in rows.values()] == [0, 0, 0, 1]
    assert torch.equal(rows["a_1_0"]["old_log_probs"], (likelihood(rows["a_1_0"]["responses"]) - 0.25).bfloat16())
    assert not trainer.actor_rollout_wg.passes and keys_there() == set(rollouts.keys)
    assert metrics["hpt/solve_rate"] == 0 and metrics["hpt/start/solve_rate"] == 0.5


def test_tokens_that_verl_masks_stay_masked_on_the_plain_prompt():
    rollouts = Started().hinted("a", [(0, False, "x")])
    rollouts.session("a", 1, 1, f"a:{HINT}", "call", [1, 1, 0, 0, 1], DEMO, {}, with_hint("a:"))
    meta, ranks, _ = step(make_trainer("++hpt.method=guide", with_n(4)), rollouts.batch())
    row = by_key(meta, ranks)["call<|im_end|>"]
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1, 1, 0, 0, 1]
    assert row["w_rl"] == pytest.approx(1 / (2 * 3)), "three tokens of its own"


def test_the_kl_loss_of_a_rescored_row_takes_the_reference_models_own_pass():
    """The reference of the other rows is verl's; the pass is over ours alone, filled up for two ranks."""
    rollouts = Started()
    for session, (score, has, text) in enumerate(GUIDED[:1] + GUIDED[2:]):
        kept = {"ref_log_prob": torch.full((len(text) + 1,), -5.0, dtype=torch.bfloat16)}
        rollouts.session("a", session, score, f"a:{HINT}" if has else "a:", text, [1] * (len(text) + 1), DEMO, kept,
                         with_hint("a:") if has else None)  # fmt: skip
    reference = [f"{ACTOR}.use_kl_loss=True", f"{REF}.log_prob_micro_batch_size_per_gpu=2"]
    trainer = make_trainer("++hpt.method=guide", with_n(4), *reference, ranks=2)
    meta, ranks, metrics = step(trainer, rollouts.batch())
    ((passed, given),) = trainer.actor_rollout_wg.passes
    assert len(passed) == 4, "two rows of ours and two that fill up"
    prompts = {TOKENIZER.decode(row) for rank in given for row in rank["prompts"].unbind()}
    assert prompts == {"a:"}
    rows = by_key(meta, ranks)
    for text in ("yes<|im_end|>", "not<|im_end|>"):
        assert torch.equal(rows[text]["ref_log_prob"], likelihood(rows[text]["responses"]).bfloat16())
    assert rows["a_0_0"]["ref_log_prob"].tolist() == [-5.0] * 3
    assert [len(rank) for rank in ranks] == [2, 2] and metrics["hpt/rows/padding"] == 1
    assert keys_there() == set(rollouts.keys)


def test_a_rescored_rollout_that_is_cut_is_masked_as_others_are():
    rollouts = Started().hinted("a", [(0, False, "no")])
    rollouts.session("a", 1, 1, f"a:{HINT}", "x" * 64, [1] * 64, DEMO, {}, with_hint("a:"), ())
    trainer = make_trainer("++hpt.method=guide", with_n(4), "++hpt.rollouts.truncated=mask")
    meta, _, metrics = step(trainer, rollouts.batch())
    assert list(meta.keys) == ["a_0_0"] and metrics["hpt/dropped/rollouts"] == 1 == metrics["hpt/start/cut"]


def test_a_hint_takes_room_from_the_response_where_the_context_is_the_limit():
    """A context of 20: 2 tokens of a prompt leave 18 to the response, with a hint of 5 tokens 13."""
    rollouts = Started().hinted("a", [(1, True, "x" * 13), (1, True, "x" * 12)], end=())
    rollouts.hinted("b", [(1, False, "x" * 17), (1, False, "x" * 18)], end=())
    trainer = make_trainer("++hpt.method=questa", f"{ROLL}.max_model_len=20")
    _, _, metrics = step(trainer, rollouts.batch())
    assert [question.truncated.tolist() for question in trainer.plans[0].questions] == [[True, False], [False, True]]
    assert metrics["hpt/start/cut"] == metrics["hpt/start/solve_rate"] == metrics["hpt/solve_rate"] == 0.5


def test_only_questions_that_failed_get_a_hint():
    trainer = make_trainer("++hpt.method=pope", with_n(4))
    step(trainer, Started().hinted("hard", [(0, False, "x")] * 2).hinted("easy", [(1, False, "y")]).batch())
    batch = drawn(trainer, ["hard", "easy", "new"])
    assert [batch[row][START] for row in range(3)] == [[0.5, 0.5, 0.5, 0], [0] * 4, [0] * 4]
    step(trainer, Started().hinted("hard", [(1, True, "x")] * 3).batch())
    assert drawn(trainer, ["hard"])[0][START] == [0.5, 0.5, 0.5, 0], "what was solved with a hint says nothing"
    step(trainer, Started().hinted("hard", [(1, True, "x"), (1, False, "y")]).batch())
    assert drawn(trainer, ["hard"])[0][START] == [0] * 4
