"""verl's own passes over demonstrations, and the stages of verl that the hybrid trainer leaves alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_queue as tq
from batches import (
    EOS,
    ORDER,
    PARTITION,
    TOKENIZER,
    Rollouts,
    keys_there,
    likelihood,
    make_trainer,
    step,
    three_questions,
    updated,
)
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_hpt.host import queue

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
LIKELIHOOD = ["++hpt.demo.select=likelihood", "++hpt.demo.likelihood_of=policy"]

pytestmark = pytest.mark.usefixtures("queue")


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
    assert queue.copies("a_0_0", 0, PARTITION) == []
    keys = queue.copies("a_0_0", 3, PARTITION)
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
    found = trainer._likelihoods(rollouts.batch(), [(group, demo) for demo in encoded])
    assert found == [-(0.125 + 0.75) / 2, -0.25]
    assert keys_there() == set(rollouts.keys)


def test_likelihoods_are_those_at_a_temperature_of_one():
    rollouts = three_questions()
    trainer = make_trainer(*LIKELIHOOD, f"{ROLL}.temperature=0.7")
    group, demo = SimpleNamespace(prompt=np.array([1])), SimpleNamespace(ids=[9], mask=[1])
    assert trainer._likelihoods(rollouts.batch(), [(group, demo)]) == [-0.25]
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
