"""The hybrid trainer on the scores of a step: gate and metrics by value, what is cleared, what is refused."""

import pytest
import torch
from batches import (
    PARTITION,
    TOKENIZER,
    Rollouts,
    keys_there,
    make_trainer,
    step,
    three_questions,
    updated,
)
from tiny_run import changed
from transfer_queue import KVBatchMeta

from verl_hpt.errors import UserError
from verl_hpt.host import queue
from verl_hpt.host.trainer import RowTemperature, settings_for_now

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"

pytestmark = pytest.mark.usefixtures("queue")


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
def test_a_field_in_another_dtype_than_the_rollouts_is_named(scores, monkeypatch):
    """With demonstrations alone our own column, registered after it, vanishes; beside rollouts it comes bent."""
    rollouts = Rollouts().add("a", [0, 0], target="ab").add("b", scores, target="ab")
    trainer = make_trainer()
    dtypes = queue.dtypes
    monkeypatch.setattr(queue, "dtypes", lambda *given: dtypes(*given) | {"old_log_probs": torch.float32})
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
