"""The door of the update: what verl's worker gets, what is cleared, what verl goes on with. No cluster, no model."""

import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_queue as tq
from batches import (
    EOS,
    HERE,
    PARTITION,
    TOKENIZER,
    Rollouts,
    Workers,
    keys_there,
    likelihood,
    make_trainer,
    transfer_queue,
)
from tensordict import TensorDict
from tiny_run import changed
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_hpt.cpu.quickstart import byte_tokenizer
from verl_hpt.demos.columns import packed
from verl_hpt.errors import UserError
from verl_hpt.history_file import FILE
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.host.trainer import ROLLOUTS, RowTemperature, hybrid, settings_for_now
from verl_hpt.lifecycle import SPARED
from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD, TEACHER, WEIGHTS
from verl_hpt.plan import PADDING

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
LIKELIHOOD = ["++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=policy"]


@pytest.fixture(scope="module")
def queue():
    with transfer_queue():
        yield


@pytest.fixture(autouse=True)
def clean(queue):
    """Every test starts with an empty queue, whose fields have no dtype yet."""
    yield
    if keys_there():
        tq.kv_clear(keys=list(keys_there()), partition_id=PARTITION)


def three_questions(**settings) -> Rollouts:
    """One that no rollout solves, one half solved, one that failed but has no demonstration; and verl's padding."""
    rollouts = Rollouts(**settings)
    rollouts.add("hard", [0, 0], target="abc", prompt="Why? ", answers=["no", "none"])
    rollouts.add("half", [1, 0], target="unread", answers=["yes", "no no no"]).add("lost", [0], answers=["never"])
    return rollouts.padding()


ORDER = [5, 3, 0, 4, 1, 2]  # rows as verl's balancing leaves them


def updated(rows) -> list[dict]:
    """The rows of all ranks, in order: each field's own values, and the columns of our row by name."""
    found = []
    for rank in rows:
        fields = {name: column for name, column in rank.items() if isinstance(column, torch.Tensor)}
        for i in range(len(rank)):
            row = {name: column[i] for name, column in fields.items()}
            found.append(row | dict(zip(ROW_COLUMNS, row[ROW_FIELD].tolist(), strict=False)))
    return found


def step(trainer, batch):
    """One update; verl's meta, the rows of each rank, the metrics."""
    metrics = {}
    assert trainer._update_actor(batch, metrics) is batch, "verl goes on with its own batch"
    meta, ranks = trainer.actor_rollout_wg.updates[-1]
    return meta, ranks, metrics


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
    assert trainer.plans[0].demos[0][0][1]["place"] == 1


def test_a_reasoning_tag_that_the_prompt_opens_is_not_said_twice():
    for prompt, text, expected in (
        ("q<think>\n", "<think>\nhm</think>7", "hm</think>7<|im_end|>"),
        ("q<think>\n", "hm</think>7", "hm</think>7<|im_end|>"),
        ("q", "<think>\nhm</think>7", "<think>\nhm</think>7<|im_end|>"),
    ):
        rollouts = Rollouts().add("u", [0, 0], target=text, prompt=prompt)
        assert said(make_trainer(), rollouts)[0] == expected
        tq.kv_clear(keys=rollouts.keys, partition_id=PARTITION)


# --- the gate and the plan on scores as reward functions give them --------------------------------------------------


def test_scores_between_and_beyond_zero_and_one_are_compared_with_success():
    """success = 0.5: [0.25, 0.75] is half solved, [-1, 0.25] not at all, [2, 3] wholly; Â is made of the scores."""
    rollouts = Rollouts().add("half", [0.25, 0.75], target="unread").add("low", [-1, 0.25], target="ab")
    rollouts.add("high", [2, 3], target="unread")
    meta, ranks, metrics = step(make_trainer("++hpt.gate.success=0.5"), rollouts.batch([4, 0, 2, 5, 3, 1]))
    found = {
        key.replace(key, "demo") if key.startswith("hpt") else key: (row["reward"], row["advantage"], row["correct"])
        for key, row in zip(meta.keys, updated(ranks), strict=True)
    }
    assert found == {
        "half_0_0": (0.25, -0.25, 0),
        "half_1_0": (0.75, 0.25, 1),
        "high_0_0": (2, -0.5, 1),
        "high_1_0": (3, 0.5, 1),
        "demo": (0.5, 0, 1),
    }
    assert metrics["hpt/solve_rate"] == 0.5 and metrics["hpt/rl_solve_rate"] == 0.75
    assert metrics["hpt/all_fail_share"] == pytest.approx(1 / 3)


def test_a_demonstration_in_its_group_counts_as_success_among_scores_below_it():
    rollouts = Rollouts().add("a", [-1.0, 0.25], target="ab")
    meta, ranks, _ = step(make_trainer("++hpt.method=luffy", "++hpt.gate.success=0.5"), rollouts.batch())
    mean = (-1 + 0.25 + 0.5) / 3
    for key, row in zip(meta.keys, updated(ranks), strict=True):
        reward = 0.5 if key.startswith("hpt") else row["reward"]
        assert row["reward"] == reward and row["advantage"] == pytest.approx(reward - mean, abs=1e-6)
        assert row["w_rl"] == pytest.approx(1 / (3 * 64))


def test_each_source_has_a_success_of_its_own():
    rollouts = (
        Rollouts().add("a", [0.75, 0], target="ab", source="easy").add("b", [0.75, 0], target="cd", source="hard")
    )
    trainer = make_trainer("++hpt.gate.success=0.5", "++hpt.per_source={hard: {gate: {success: 0.875}}}")
    meta, ranks, metrics = step(trainer, rollouts.batch())
    said_by = {row["responses"].tolist()[0]: row["reward"] for row in updated(ranks) if row["w_demo"]}
    assert said_by == {TOKENIZER.encode("c")[0]: 0.875}
    assert {key for key in meta.keys if not key.startswith("hpt")} == {"a_0_0", "a_1_0"}
    assert (metrics["hpt/source/easy/solve_rate"], metrics["hpt/source/hard/solve_rate"]) == (0.5, 0)
    assert (metrics["hpt/source/easy/demo_share"], metrics["hpt/source/hard/demo_share"]) == (0, 1)


def test_the_steps_metrics_by_hand():
    """Four questions: one taught, two on RL, one unusable; two optimizer steps of four rows, two of them padding."""
    rollouts = Rollouts().add("a", [0, 0, 0], target="abcd").add("b", [1, 1], target="x", answers=["y", "zz"])
    rollouts.add("c", [1, 0], target="x", answers=["y", "zz"]).add("d", [0], target="", answers=["y"])
    trainer = make_trainer(f"{ACTOR}.ppo_mini_batch_size=2", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4")
    _, _, metrics = step(trainer, rollouts.batch())
    expected = {
        "questions": 4, "demo_share": 1 / 4, "taught_share": 1 / 4, "zone/rl": 3 / 4, "zone/demo": 1 / 4,
        "solve_rate": 3 / 8, "rl_solve_rate": 3 / 5, "all_fail_share": 2 / 4, "rows/rollouts": 5, "rows/demos": 1,
        "rows/padding": 2, "dropped/rollouts": 3, "dropped/demos": 0, "unusable_demos": 1, "unusable/empty": 1,
        "optimizer_steps": 2,
    }  # fmt: skip
    assert {name: metrics[f"hpt/{name}"] for name in expected} == pytest.approx(expected)
    # λ/(Q·|τ|) on five tokens against the mean of 1/(Q·n·L) over tokens: n is 2 on ten tokens and 1 on two.
    rl = (10 / (2 * 2 * 64) + 2 / (2 * 64)) / 12
    assert metrics["hpt/demo_to_rl_weight"] == pytest.approx((0.1 / (2 * 5)) / rl)


def test_a_return_that_is_not_finite_stops_with_the_question():
    rollouts = Rollouts()
    for session, reward in enumerate([0.5, float("nan")]):
        columns = {"token_level_rewards": torch.tensor([0.0, reward])}
        rollouts.row(f"a_{session}_0", "a", 1.0, "x", None, "a:", "src", columns)
    with pytest.raises(UserError, match=r"\(data source 'src', index 0\): return \[0\.5, nan\] is not finite"):
        make_trainer("algorithm.use_kl_in_reward=True")._update_actor(rollouts.batch(), {})


# --- what is cleared --------------------------------------------------------------------------------------------------


def test_after_a_step_the_queue_holds_verls_keys_alone():
    rollouts = three_questions()
    step(make_trainer("++hpt.method=psft"), rollouts.batch())
    assert keys_there() == set(rollouts.keys)


def test_an_update_that_fails_leaves_nothing_of_ours_behind():
    rollouts, trainer = three_questions(), make_trainer()

    def fail():
        raise OSError("out of memory")

    trainer.actor_rollout_wg.during = fail
    with pytest.raises(OSError, match="out of memory"):
        trainer._update_actor(rollouts.batch(), {})
    assert keys_there() == set(rollouts.keys)
    assert trainer.config.actor_rollout_ref.rollout.n == 2
    assert trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size == 99


def test_settings_come_back_on_errors_too():
    config = changed(f"{ROLL}.n=6")
    with pytest.raises(KeyError), settings_for_now(config, {f"{ROLL}.n": 1, "algorithm.gamma": 0.5}):
        assert (config.actor_rollout_ref.rollout.n, config.algorithm.gamma) == (1, 0.5)
        raise KeyError
    assert (config.actor_rollout_ref.rollout.n, config.algorithm.gamma) == (6, 1.0)


def test_row_temperature_takes_everything_but_a_temperature():
    info = RowTemperature({"kept": 1, "temperature": 0.7})
    assert info == {"kept": 1}, "verl's critic leaves one in the batch"
    info.update({"temperature": 0.7, "epochs": 2})
    info.update(temperature=0.7, seed=3)
    assert info == {"kept": 1, "epochs": 2, "seed": 3}
    meta = KVBatchMeta(partition_id=PARTITION, keys=["a", "b"], tags=[{}, {}], extra_info=info)
    for chunk in meta.chunk(2):
        chunk.extra_info.update({"temperature": 0.7})
        assert "temperature" not in chunk.extra_info, "verl copies it for every rank"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[0, 0], [1, 0]], ids=["demonstrations alone", "beside rollouts"])
def test_a_field_in_another_dtype_than_the_rollouts_is_named(scores):
    """With demonstrations alone our own column, registered after it, vanishes; beside rollouts it comes bent."""
    rollouts = Rollouts().add("a", [0, 0], target="ab").add("b", scores, target="ab")
    trainer = make_trainer()
    dtypes = trainer._dtypes
    trainer._dtypes = lambda *given: dtypes(*given) | {"old_log_probs": torch.float32}
    with pytest.raises(RuntimeError, match=r"lack the field\(s\) .*old_log_probs.* in TransferQueue"):
        trainer._update_actor(rollouts.batch(), {})
    assert keys_there() == set(rollouts.keys) and not trainer.actor_rollout_wg.updates


def test_a_field_that_the_rollouts_lack_is_named():
    rollouts, trainer = three_questions(), make_trainer("algorithm.rollout_correction.rollout_is=token")
    with pytest.raises(RuntimeError, match=r"lack the field\(s\) rollout_is_weights in TransferQueue"):
        trainer._update_actor(rollouts.batch(), {})
    assert keys_there() == set(rollouts.keys) and not trainer.actor_rollout_wg.updates


def test_several_outputs_of_a_session_are_refused():
    rollouts = three_questions()
    rollouts.row("half_1_1", "half", 0.0, "more", None, "half:", "src", {})
    with pytest.raises(UserError, match="half_1 has several outputs"):
        make_trainer()._update_actor(rollouts.batch(), {})


def test_multi_modal_prompts_are_refused_with_the_question():
    rollouts = Rollouts().add("a", [0], target="ab", multi_modal_inputs={"pixel_values": [1.0]})
    with pytest.raises(UserError, match=r"question \w+ \(data source 'src', index 0\): multi-modal prompts"):
        make_trainer()._update_actor(rollouts.batch(), {})


def test_position_ids_of_several_axes_are_refused():
    rollouts = Rollouts().add("a", [0], target="ab", position_ids=torch.zeros(4, 5, dtype=torch.int64))
    with pytest.raises(UserError, match="multi-modal position ids"):
        make_trainer()._update_actor(rollouts.batch(), {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_before_anything_is_written(bad):
    rollouts = Rollouts().add("a", [0, bad], target="ab")
    with pytest.raises(UserError, match=r"reward \[0\.0, (nan|inf)\] is not finite"):
        make_trainer()._update_actor(rollouts.batch(), {})
    assert keys_there() == set(rollouts.keys)


# --- passes over demonstrations ---------------------------------------------------------------------------------------


def test_old_log_probs_of_demonstrations_are_those_of_verls_own_pass():
    cuts = [f"{ROLL}.log_prob_micro_batch_size_per_gpu=3", f"{ACTOR}.ppo_micro_batch_size_per_gpu=5"]
    trainer = make_trainer("++hpt.method=psft", *cuts, ranks=2)
    rollouts = three_questions()
    _, ranks, metrics = step(trainer, rollouts.batch())
    ((meta, passed),) = trainer.actor_rollout_wg.passes
    assert len(meta) == 6, "two demonstrations and four filling rows: ranks and micro-batches divide it"
    assert {tuple(row.tolist()) for rank in passed for row in rank["responses"].unbind()} == {
        (*TOKENIZER.encode("abc"), EOS), (*TOKENIZER.encode("unread"), EOS),
    }  # fmt: skip
    demos = [row for row in updated(ranks) if row["w_demo"]]
    assert len(demos) == 2 == metrics["hpt/rows/demos"] and metrics["hpt/rows/padding"] == 8, "padding needs no pass"
    for row in demos:
        assert torch.equal(row["old_log_probs"], likelihood(row["responses"]).bfloat16())
    assert "actor/entropy" not in metrics, "a pass over demonstrations has no metrics of the run"
    assert keys_there() == set(rollouts.keys)


def test_reference_log_probs_of_demonstrations_are_those_of_verls_own_pass():
    rollouts = Rollouts()
    rollouts.add("a", [0], target="ab", answers=["x"], ref_log_prob=torch.zeros(2, dtype=torch.bfloat16))
    trainer = make_trainer(
        "++hpt.method=asft", f"{ACTOR}.use_kl_loss=True", f"{REF}.log_prob_micro_batch_size_per_gpu=4"
    )
    _, ranks, _ = step(trainer, rollouts.batch())
    (row,) = [row for row in updated(ranks) if row["w_demo"]]
    assert torch.equal(row["ref_log_prob"], likelihood(row["responses"]).bfloat16())
    assert len(trainer.actor_rollout_wg.passes[0][0]) == 4


def test_a_pass_at_another_temperature_scores_demonstrations_at_one():
    trainer = make_trainer("++hpt.method=psft", f"{ROLL}.temperature=0.7")
    step(trainer, three_questions().batch())
    ((meta, passed),) = trainer.actor_rollout_wg.passes
    assert "temperature" in meta.fields and "temperature" not in meta.extra_info
    assert all(rank["temperature"].tolist() == [1.0] * len(rank) for rank in passed)


def test_a_pass_that_fails_clears_its_filling_rows():
    rollouts = three_questions()
    trainer = make_trainer(f"{ROLL}.log_prob_micro_batch_size_per_gpu=4")
    before = keys_there()

    def fail(batch, metrics):
        assert len(batch) == 4 and len(keys_there() - before) == 3
        raise OSError("lost a worker")

    trainer._compute_old_log_prob = fail
    with pytest.raises(OSError, match="lost a worker"):
        trainer._pass("old_log_prob", ["half_0_0"], PARTITION)
    assert keys_there() == before == set(rollouts.keys)
    trainer._pass("old_log_prob", [], PARTITION)  # nothing to do: verl is not called


def test_filling_rows_are_copies_of_one_row():
    Rollouts().add("a", [1, 0], answers=["first", "2nd"], number=torch.tensor(3.5))
    trainer = make_trainer()
    assert trainer._filling_rows(0, "a_0_0", PARTITION) == []
    keys = trainer._filling_rows(3, "a_0_0", PARTITION)
    assert len(set(keys)) == 3 and set(keys) <= keys_there()
    fields = ["prompts", "responses", "input_ids", "position_ids", "response_mask", "old_log_probs", "number"]
    copies = tq.kv_batch_get(keys, PARTITION, select_fields=fields)
    (whole,) = [tq.kv_batch_get(["a_0_0"], PARTITION, select_fields=fields)]
    for name in fields:
        assert copies[name].dtype == whole[name].dtype
        for copy in copies[name].unbind():
            assert torch.equal(copy, whole[name].unbind()[0]), name


@pytest.mark.parametrize("of", ["policy", "reference"])
def test_the_likeliest_demonstration_is_chosen_by_a_pass_of_the_model(of):
    rollouts = Rollouts().add("a", [0, 0], target=["gg", "aa", "hhhh"])  # ids 70, 64, 71
    rollouts.add("b", [0], target="only one")
    overrides = [
        LIKELIHOOD[0],
        f"++hpt.demo.likelihood_of={of}",
        f"{ACTOR}.use_kl_loss=True",
        f"{ACTOR}.kl_loss_coef=0",
    ]
    trainer = make_trainer(*overrides, f"{ROLL}.log_prob_micro_batch_size_per_gpu=2", ranks=2)
    _, ranks, _ = step(trainer, rollouts.batch())
    said = {tuple(row["responses"].tolist()) for row in updated(ranks) if row["w_demo"]}
    assert said == {tuple([*TOKENIZER.encode(text), EOS]) for text in ("aa", "only one")}
    ((meta, _),) = trainer.actor_rollout_wg.passes
    assert len(meta) == 4, "three candidates of the one question that has a choice"
    assert keys_there() == set(rollouts.keys)


def test_likelihoods_are_means_over_what_the_assistant_says():
    rollouts = three_questions()
    trainer = make_trainer(*LIKELIHOOD)
    group = SimpleNamespace(prompt=np.array([1, 2, 3]))
    encoded = [SimpleNamespace(ids=[8, 11, 13], mask=[1, 0, 1]), SimpleNamespace(ids=[9], mask=[1])]
    found = trainer._likelihoods(rollouts.batch(), [(group, (demo, {})) for demo in encoded])
    assert found == [-(0.125 + 0.75) / 2, -0.25]
    assert keys_there() == set(rollouts.keys)


def test_likelihoods_are_those_at_a_temperature_of_one():
    rollouts = three_questions()
    trainer = make_trainer(*LIKELIHOOD, f"{ROLL}.temperature=0.7")
    group, demo = SimpleNamespace(prompt=np.array([1])), SimpleNamespace(ids=[9], mask=[1])
    assert trainer._likelihoods(rollouts.batch(), [(group, (demo, {}))]) == [-0.25]
    ((meta, passed),) = trainer.actor_rollout_wg.passes
    assert "temperature" not in meta.extra_info and [rank["temperature"].tolist() for rank in passed] == [[1.0]]


# --- verl's other stages ----------------------------------------------------------------------------------------------


def test_rollouts_get_the_methods_advantage_from_verls_own_stage():
    batch = three_questions().batch(ORDER)
    make_trainer()._compute_advantage(batch, {})
    found = tq.kv_batch_get(["half_0_0", "half_1_0", "hard_0_0"], PARTITION, select_fields=["advantages"])["advantages"]
    assert [sorted(set(row.tolist())) for row in found.unbind()] == [[0.5], [-0.5], [0.0]]


def test_a_critics_advantage_is_gae_for_the_length_of_the_call(monkeypatch):
    seen = []

    def record(self, batch, metrics):
        seen.append(self.config.algorithm.adv_estimator)
        if metrics is None:
            raise OSError
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_compute_advantage", record)
    ppo, hpt = make_trainer("++hpt.method=ppo", "critic.enable=True"), make_trainer()
    assert ppo._compute_advantage("batch", {}) == "batch" and hpt._compute_advantage("batch", {}) == "batch"
    with pytest.raises(OSError):
        ppo._compute_advantage("batch", None)
    assert seen == ["gae", "hpt", "gae"]
    assert ppo.config.algorithm.adv_estimator == hpt.config.algorithm.adv_estimator == "hpt"


def test_a_critics_advantages_reach_the_update_and_padding_has_none():
    rollouts = Rollouts()
    for session, (score, answer) in enumerate([(1.0, "x"), (0.0, "yz")]):
        values = torch.full((len(answer) + 1,), 0.5)
        rollouts.row(f"a_{session}_0", "a", score, answer, None, "a:", "src", {"values": values})
    trainer = make_trainer("++hpt.method=ppo", "critic.enable=True", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3")
    batch = rollouts.batch()
    trainer._compute_advantage(batch, {})
    meta, ranks, _ = step(trainer, batch)
    # γ = λ = 1: returns − values = ±0.5 on five tokens, then whitened over them.
    raw = torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5])
    white = ((raw - raw.mean()) * torch.rsqrt(raw.var() + 1e-8)).tolist()
    found = {key[:3]: row["advantages"].tolist() for key, row in zip(meta.keys, updated(ranks), strict=True)}
    assert found["a_0"] == pytest.approx(white[:2], abs=1e-5) and found["a_1"] == pytest.approx(white[2:], abs=1e-5)
    assert found["hpt"] == [0]


def test_rollout_corrections_weights_are_verls_on_rollouts_and_one_on_ours():
    rollouts = three_questions(dtype=torch.float32)
    said = torch.tensor(rollouts.answers["half_0_0"])
    columns = TensorDict(
        {"rollout_log_probs": torch.nested.as_nested_tensor([likelihood(said) - 0.5], layout=torch.jagged)},
        batch_size=1,
    )
    tq.kv_batch_put(["half_0_0"], PARTITION, fields=columns)
    trainer = make_trainer("algorithm.rollout_correction.rollout_is=token", f"{ACTOR}.ppo_micro_batch_size_per_gpu=5")
    batch = rollouts.batch()
    trainer._compute_advantage(batch, {})
    meta, ranks, _ = step(trainer, batch)
    for key, row in zip(meta.keys, updated(ranks), strict=True):
        expected = float(np.exp(0.5)) if key == "half_0_0" else 1.0
        assert row["rollout_is_weights"].tolist() == pytest.approx([expected] * len(row["responses"])), key
    assert len(meta) == 5


def test_returns_are_those_under_the_kl_penalty_while_the_gate_reads_scores():
    rollouts = Rollouts()
    for session, (score, reward) in enumerate([(1.0, 0.5), (0.0, -0.25)]):
        rewards = torch.tensor([0.0, reward])
        rollouts.row(f"a_{session}_0", "a", score, "x", "demo", "a:", "src", {"token_level_rewards": rewards})
    trainer = make_trainer("algorithm.use_kl_in_reward=True")
    meta, ranks, metrics = step(trainer, rollouts.batch())
    found = {key: (row["reward"], row["advantage"]) for key, row in zip(meta.keys, updated(ranks), strict=True)}
    assert found == {"a_0_0": (1.0, 0.375), "a_1_0": (0.0, -0.375)} and metrics["hpt/solve_rate"] == 0.5


# --- questions on their way to the rollouts ---------------------------------------------------------------------------


def drawn(trainer, names, **columns):
    """verl's next questions, from a data loader of one batch."""
    batch = {
        "raw_prompt": np.array([[{"role": "user", "content": f"{name}:"}] for name in names] + [None], dtype=object)[
            :-1
        ],
        "data_source": np.array(["src"] * len(names), dtype=object),
        **columns,
    }
    trainer.config.data.train_batch_size = len(names)
    trainer.train_dataloader_it = iter([batch])
    return trainer._next_train_batch()


def test_the_early_gate_tells_verl_how_many_rollouts_and_itself_how_many_it_spared():
    trainer = make_trainer("++hpt.history.early_gate={after_failures: 1, rollouts: 1}", f"{ROLL}.n=5")
    step(trainer, Rollouts().add("hard", [0, 0], target="ab").add("half", [1, 0]).batch())
    batch = drawn(trainer, ["half", "hard", "new"])
    assert [batch[i][ROLLOUTS] for i in range(3)] == [5, 1, 5]
    assert [batch[i][SPARED] for i in range(3)] == [0, 4, 0]
    own = drawn(trainer, ["half", "hard"], **{ROLLOUTS: np.array([2, 3], dtype=object)})
    assert [own[i][ROLLOUTS] for i in range(2)] == [2, 1] and [own[i][SPARED] for i in range(2)] == [0, 2]


def test_without_an_early_gate_verls_questions_are_left_alone():
    batch = drawn(make_trainer(), ["a", "b"])
    assert ROLLOUTS not in batch and SPARED not in batch and len(batch) == 2


def test_spared_rollouts_are_read_back_and_counted():
    trainer = make_trainer("++hpt.history.early_gate={after_failures: 1, rollouts: 1}", f"{ROLL}.n=5")
    rollouts = Rollouts().add("hard", [0], target="ab", answers=["xyz"], **{SPARED: 4})
    _, _, metrics = step(trainer, rollouts.batch())
    assert metrics["hpt/history/early_gated"] == 1 and metrics["hpt/history/tokens_saved"] == 16


def test_a_question_key_names_the_question():
    trainer = make_trainer("++hpt.question_key=id")
    step(trainer, Rollouts().add("u", [0, 0], target="ab", id="my question").batch())
    assert [group.key for group in trainer.plans[0].groups] == ["my question"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Checkpointed(Workers):
    """Worker groups whose checkpoints are empty; notes whether our state was there before them."""

    def save_checkpoint(self, path, *_, **__):
        folder = Path(path).parent
        marker = folder.parent / "latest_checkpointed_iteration.txt"
        self.found = (sorted(os.listdir(folder)), marker.exists())

    def load_checkpoint(self, **_):
        pass


def resumable(folder, *overrides):
    trainer = make_trainer(*overrides, folder=str(folder))
    trainer.actor_rollout_wg = Checkpointed()
    trainer.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    return trainer


def test_our_state_is_written_before_verls_marker(tmp_path):
    trainer = resumable(tmp_path)
    trainer.global_steps = 3
    trainer._save_checkpoint()
    assert trainer.actor_rollout_wg.found == (["hpt_alarms.json", FILE], False)
    assert (tmp_path / "global_step_3" / FILE).exists()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_resuming_reads_the_history_of_the_checkpoint_that_verl_reads(tmp_path):
    trainer = resumable(tmp_path)
    for number in (1, 2):
        step(trainer, Rollouts().add(f"q{number}", [0, 0], target="ab").batch())
        trainer.global_steps = number
        trainer._save_checkpoint()
    shutil.copytree(tmp_path / "global_step_1", tmp_path / "elsewhere" / "global_step_1")
    shutil.rmtree(tmp_path / "global_step_1")

    latest = resumable(tmp_path)
    latest._load_checkpoint()
    assert latest.global_steps == 2 and latest.hpt.lifecycle.history.totals()["questions"] == 2
    path = f"trainer.resume_from_path={tmp_path}/elsewhere/global_step_1"
    chosen = resumable(tmp_path, "trainer.resume_mode=resume_path", path)
    chosen._load_checkpoint()
    assert chosen.global_steps == 1 and chosen.hpt.lifecycle.history.totals()["questions"] == 1


@pytest.mark.parametrize("mode", ["auto", "disable"])
def test_a_run_from_scratch_reads_nothing(tmp_path, mode):
    trainer = resumable(tmp_path, f"trainer.resume_mode={mode}", "++hpt.history.cooldown=3")
    trainer._load_checkpoint()
    assert trainer.global_steps == 0 and trainer.hpt.lifecycle.history.totals()["questions"] == 0


# --- before training --------------------------------------------------------------------------------------------------


class Stock:
    """The least of verl's trainer that ours is built over."""

    columns = ("prompt", "target")

    def __init__(self, config):
        self.config, self.initialized = config, False

    def _init_dataloader(self):
        self.tokenizer = TOKENIZER
        self.train_dataset = SimpleNamespace(dataframe=SimpleNamespace(column_names=self.columns))
        self.train_dataloader = SimpleNamespace(collate_fn=lambda rows: {"rows": rows})
        self.val_dataloader = SimpleNamespace(collate_fn=lambda rows: {"rows": rows})

    def on_init_end(self):
        self.initialized = True


def test_our_trainer_keeps_the_name_of_verls_and_meets_tokenizer_columns_and_loss():
    config = changed(f"actor_rollout_ref.model.path={HERE}", f"{ACTOR}.clip_ratio_low=0.07")
    trainer = hybrid(Stock)(config)
    assert type(trainer).__name__ == "HybridStock" and trainer.config is config
    trainer._init_dataloader()
    assert trainer.hpt.eos == EOS and trainer.hpt.reader.tokenizer is TOKENIZER
    uneven = [{"target": [[1.0], [1.0, 2.0]]}]
    for loader in (trainer.train_dataloader, trainer.val_dataloader):
        assert isinstance(loader.collate_fn(uneven)["rows"][0]["target"], str), "packed on its way to verl"
    losses = []
    trainer.actor_rollout_wg = SimpleNamespace(set_loss_fn=losses.append)
    trainer.on_init_end()
    ((loss,),) = [losses]
    assert trainer.initialized and isinstance(loss, partial) and loss.func is hpt_loss
    assert loss.keywords["spec"].constants.clip_low == 0.07


def test_a_column_that_is_not_there_stops_before_any_model_loads():
    config = changed(f"actor_rollout_ref.model.path={HERE}", "++hpt.demo.key=answer")
    with pytest.raises(UserError, match=r"hpt\.demo\.key='answer': the training data has no such column"):
        hybrid(Stock)(config)._init_dataloader()


def test_ranks_are_asked_of_the_worker_group_once():
    trainer, asked = make_trainer(), []

    def query(name):
        asked.append(name)
        return [0, 0, 1, 1, 2, 2]

    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={}, _query_dispatch_info=query)
    assert trainer._ranks() == 3 == trainer._ranks() and asked == ["actor"]
