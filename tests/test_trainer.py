"""The door of the update: what verl's worker gets, what is cleared, what verl goes on with. No cluster, no model."""

import pytest
import torch
import transfer_queue as tq
from batches import (
    EOS,
    ORDER,
    PARTITION,
    TOKENIZER,
    Rollouts,
    likelihood,
    make_trainer,
    step,
    three_questions,
    updated,
)
from quickstart_task import byte_tokenizer

from verl_hpt.demos.read import packed
from verl_hpt.loss import ROW_FIELD, TEACHER, WEIGHTS
from verl_hpt.plan import PADDING

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"

pytestmark = pytest.mark.usefixtures("queue")


# --- what the update gets ---------------------------------------------------------------------------------------------


def test_the_update_gets_the_planned_rows_in_the_plans_order():
    rollouts = three_questions()
    trainer = make_trainer(f"{ACTOR}.ppo_micro_batch_size_per_gpu=3", ranks=2)
    batch = rollouts.batch(ORDER)
    meta, ranks, _ = step(trainer, batch)
    made = trainer.plans[0]
    assert len(meta) == len(made.plan.layout) == 6 and [len(rank) for rank in ranks] == [3, 3]
    expected = []
    for row in made.plan.layout:
        group = made.groups[made.plan.question[row]] if row != PADDING else None
        own = row == PADDING or made.plan.kind[row] == 1
        expected.append("ours" if own else batch.keys[group.rows[made.plan.index[row]]])
    assert ["ours" if key.startswith("hpt") else key for key in meta.keys] == expected
    assert {key for key in expected if key != "ours"} == {"half_0_0", "half_1_0", "lost_0_0"}
    assert expected.count("ours") == 3, "a demonstration and two rows of padding"
    assert meta.tags == [{}] * 6 and meta.partition_id == PARTITION
    assert set(meta.fields) == {
        "prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask", "old_log_probs", ROW_FIELD,
    }  # fmt: skip
    for key, row in zip(meta.keys, updated(ranks), strict=True):
        if not key.startswith("hpt"):
            assert row["responses"].tolist() == rollouts.answers[key]
            assert torch.equal(row["old_log_probs"], likelihood(row["responses"]).bfloat16())


def test_keys_of_ours_have_the_form_that_verl_reads():
    meta, _, _ = step(make_trainer(f"{ACTOR}.ppo_micro_batch_size_per_gpu=3"), three_questions().batch())
    for place, key in enumerate(meta.keys):
        if key.startswith("hpt"):
            mark, session, output = key.rsplit("_", 2)
            assert "_" not in mark and (int(session), output) == (place, "0")


def test_a_demonstration_row_is_the_rollouts_prompt_and_the_answers_tokens_and_one_eos():
    _, ranks, _ = step(make_trainer(), three_questions().batch(ORDER))
    (row,) = [row for row in updated(ranks) if row["is_demo"]]
    prompt, answer = TOKENIZER.encode("Why? "), [*TOKENIZER.encode("abc"), EOS]
    assert row["prompts"].tolist() == prompt and row["responses"].tolist() == answer
    assert row["input_ids"].tolist() == prompt + answer
    assert row["position_ids"].tolist() == list(range(len(prompt) + 4))
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1, 1, 1, 1]
    assert row["old_log_probs"].tolist() == [0, 0, 0, 0]
    # λ = 0.1, three questions, one demonstration of four tokens.
    assert (row["w_rl"], row["reward"], row["correct"]) == (0, 1, 1)
    assert row["w_demo"] == pytest.approx(0.1 / (3 * 4))


def test_rollouts_bring_the_plans_weights_and_advantages():
    meta, ranks, _ = step(make_trainer(), three_questions().batch(ORDER))
    rows = {key: row for key, row in zip(meta.keys, updated(ranks), strict=True) if not key.startswith("hpt")}
    assert {key: (row["is_demo"], row["advantage"], row["reward"], row["correct"]) for key, row in rows.items()} == {
        "half_0_0": (0, 0.5, 1, 1),
        "half_1_0": (0, -0.5, 0, 0),
        "lost_0_0": (0, 0, 0, 0),
    }
    weights = {key: row["w_rl"] for key, row in rows.items()}  # 1/(Q·n·L)
    half, lost = 1 / (3 * 2 * 64), 1 / (3 * 64)
    assert weights == pytest.approx({"half_0_0": half, "half_1_0": half, "lost_0_0": lost})


def test_padding_rows_are_two_tokens_that_carry_nothing():
    _, ranks, _ = step(make_trainer(f"{ACTOR}.ppo_micro_batch_size_per_gpu=7"), three_questions().batch())
    padding = [row for row in updated(ranks) if row["is_demo"] and not row["w_demo"]]
    assert len(padding) == 3
    for row in padding:
        assert row["prompts"].tolist() == row["responses"].tolist() == [EOS] and row["input_ids"].tolist() == [EOS] * 2
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [0]
        assert row["position_ids"].tolist() == [0, 1] and row["w_rl"] == row["w_entropy"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_ours_have_the_rollouts_dtypes(dtype):
    _, ranks, _ = step(make_trainer(), three_questions(dtype=dtype).batch())
    for row in updated(ranks):
        assert row["old_log_probs"].dtype == dtype
        assert {row[name].dtype for name in ("prompts", "responses", "input_ids", "position_ids")} == {torch.int64}
        assert row["response_mask"].dtype == row["loss_mask"].dtype == torch.int64
        assert row[ROW_FIELD].dtype == torch.float32


def test_rollouts_that_all_have_the_same_length_are_rows_like_others():
    rollouts = Rollouts().add("a", [0, 0], target="ab", answers=["xy", "zw"]).add("b", [1, 0], answers=["xy", "zw"])
    _, ranks, _ = step(make_trainer(), rollouts.batch())
    assert [len(row["responses"]) for row in updated(ranks)] == [3, 3, 3]


@pytest.mark.parametrize(("scores", "ours"), [([0, 0], 1), ([1, 0], 0)])
def test_a_step_of_demonstrations_alone_and_one_of_rollouts_alone(scores, ours):
    meta, ranks, metrics = step(make_trainer(), Rollouts().add("a", scores, target="ab").batch())
    assert sum(key.startswith("hpt") for key in meta.keys) == ours and len(updated(ranks)) == len(meta)
    assert metrics["hpt/rows/demos"] == ours and metrics["hpt/rows/rollouts"] == 2 * (1 - ours)


def test_verl_is_told_the_rows_of_an_optimizer_step_for_the_length_of_the_update():
    trainer = make_trainer(f"{ACTOR}.ppo_mini_batch_size=2", f"{ROLL}.n=4", "++hpt.method=srft")
    seen = []
    actor, rollout = trainer.config.actor_rollout_ref.actor, trainer.config.actor_rollout_ref.rollout
    trainer.actor_rollout_wg.during = lambda: seen.append((rollout.n, actor.calculate_entropy))
    meta, _, metrics = step(trainer, three_questions().batch())
    made = trainer.plans[0].plan
    assert made.steps == 2 == metrics["hpt/optimizer_steps"]
    assert meta.extra_info["mini_batch_size"] == meta.extra_info["global_batch_size"] == made.rows_per_step
    assert meta.extra_info["kept"] == 1 and meta.extra_info["calculate_entropy"] is True
    assert seen == [(1, True)] and (rollout.n, actor.ppo_mini_batch_size, actor.calculate_entropy) == (4, 2, False)


def test_at_another_temperature_each_row_brings_its_own_and_the_batch_none():
    meta, ranks, _ = step(make_trainer(f"{ROLL}.temperature=0.7"), three_questions().batch())
    assert "temperature" in meta.fields and "temperature" not in meta.extra_info
    for row in updated(ranks):
        assert row["temperature"].item() == pytest.approx(1.0 if row["is_demo"] else 0.7)
    meta, ranks, _ = step(make_trainer(), three_questions().batch())
    assert meta.extra_info["temperature"] == 1.0 and "temperature" not in meta.fields


def test_numbers_of_tokens_stand_beside_the_tokens():
    rollouts = Rollouts().add("a", [0], target="ab", w=[1.0, 1.0, 4.0], t=[-1.0, -2.0, -3.0])
    rollouts.add("b", [1], w=None, t=None, answers=["zz"])
    compose = "++hpt.compose={demos: [{kind: R, estimator: {reference: teacher, advantage: reward}}]}"
    trainer = make_trainer(compose, "++hpt.demo.token_weights=w", "++hpt.demo.teacher_log_prob=t",
                           f"{ACTOR}.ppo_micro_batch_size_per_gpu=3")  # fmt: skip
    _, ranks, _ = step(trainer, rollouts.batch())
    rows = [(row["responses"].tolist(), row[WEIGHTS].tolist(), row[TEACHER].tolist()) for row in updated(ranks)]
    assert sorted(rows, key=lambda row: len(row[0]) + row[2][0]) == [
        ([EOS], [1], [0]),
        ([*TOKENIZER.encode("ab"), EOS], [0.5, 0.5, 2.0], [-1, -2, -3]),
        ([*TOKENIZER.encode("zz"), EOS], [1, 1, 1], [0, 0, 0]),
    ]


def test_a_demonstrations_log_prob_under_other_models_stands_in_its_row():
    rollouts = Rollouts().add("a", [0], target=["ab", "cd"], o=[-0.5, -0.25]).add("b", [1], target="ef", o=-0.125)
    trainer = make_trainer("++hpt.method=poft", "++hpt.demo.other_log_prob=o", "++hpt.demo.per_question=2")
    _, ranks, _ = step(trainer, rollouts.batch())
    found = {TOKENIZER.decode(row["responses"][:2]): row["other_log_prob"] for row in updated(ranks)}
    assert found == {"ab": -0.5, "cd": -0.25, "ef": -0.125}


def test_metrics_tell_what_the_gate_did_and_the_history_remembers():
    trainer = make_trainer()
    _, _, metrics = step(trainer, three_questions().batch(ORDER))
    assert metrics["hpt/questions"] == 3 and metrics["hpt/demo_share"] == pytest.approx(1 / 3)
    assert metrics["hpt/solve_rate"] == 0.2 and metrics["hpt/unusable/null"] == 1
    assert metrics["hpt/history/questions"] == 3 and metrics["actor/grad_norm"] == 0.5
    assert trainer.hpt.lifecycle.history.totals()["questions"] == 3


def said(trainer, rollouts) -> tuple[str, list[int]]:
    """Text and mask of the one demonstration that the update gets."""
    (row,) = [row for row in updated(step(trainer, rollouts.batch())[1]) if row["w_demo"]]
    return TOKENIZER.decode(row["responses"]), row["response_mask"].tolist()


TURNS = [
    {"role": "assistant", "content": "calmly look"},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "content": "calmly done"},
]


def test_template_arguments_reach_the_tokens_between_turns():
    """A tool's answer is followed by the generation prompt as the run's own template arguments make it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
    )
    trainer = make_trainer(
        "++data.apply_chat_template_kwargs={opening: 'calmly '}", "data.max_response_length=200", tokenizer=tokenizer
    )
    text, mask = said(trainer, Rollouts().add("u", [0, 0], target=TURNS))
    between = "\n<|im_start|>tool\nfound<|im_end|>\n<|im_start|>assistant\ncalmly "
    assert text == f"look<|im_end|>{between}done<|im_end|>"
    assert mask == [1] * 5 + [0] * len(tokenizer.encode(between)) + [1] * 5


def test_demonstrations_of_uneven_turns_come_back_as_they_were():
    """Packed by the data loader into a text, copied by verl's agent loop, read at the door."""
    (row,) = packed([{"target": [TURNS, TURNS[2:]]}], collate=list)
    assert isinstance(row["target"], str)
    trainer = make_trainer("++hpt.demo.select=shortest", "data.max_response_length=200")
    text, mask = said(trainer, Rollouts().add("u", [0, 0], target=row["target"]))
    assert text == "calmly done<|im_end|>" and mask == [1] * 12
    assert trainer.plans[0].demos[0][0].index == 1


def test_a_reasoning_tag_that_the_prompt_opens_is_not_said_twice():
    for prompt, text, expected in (
        ("q<think>\n", "<think>\nhm</think>7", "hm</think>7<|im_end|>"),
        ("q<think>\n", "hm</think>7", "hm</think>7<|im_end|>"),
        ("q", "<think>\nhm</think>7", "<think>\nhm</think>7<|im_end|>"),
    ):
        rollouts = Rollouts().add("u", [0, 0], target=text, prompt=prompt)
        assert said(make_trainer(), rollouts)[0] == expected
        tq.kv_clear(keys=rollouts.keys, partition_id=PARTITION)
