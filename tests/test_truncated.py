"""From verl's rows to what the gate is told: which rollouts were cut, the metric it reads, rollouts not sampled."""

import json

import numpy as np
import pytest
import torch
import transfer_queue as tq
from batches import EOS, PARTITION, Rollouts, keys_there, make_trainer
from tensordict import TensorDict
from tiny_run import make_run
from transformers import GenerationConfig, Qwen2Config
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from verl_hpt.errors import UserError
from verl_hpt.host.batch import SKIPPED, Group
from verl_hpt.host.run import context_length
from verl_hpt.host.trainer import ROLLOUTS

LIMIT = "data.max_response_length=4"


pytestmark = pytest.mark.usefixtures("queue")


def scored(trainer, rollouts):
    trainer._update_actor(rollouts.batch(), metrics := {})
    return trainer.plans[-1], metrics


# --- cut at the length limit ------------------------------------------------------------------------------------------


def test_a_rollout_is_cut_when_it_fills_the_limit_and_its_last_token_is_no_stop_id():
    """Four tokens: "abcd" is cut, "abc" and EOS is not, "ab" is not though it has no EOS (an agent loop's own end)."""
    rollouts = Rollouts().add("q", [1, 1, 1], answers=["abcd", "abc", "ab"], cut=(0, 2), target="a")
    step, metrics = scored(make_trainer(LIMIT), rollouts)
    assert step.scored.truncated.tolist() == [True, False, False]
    assert step.plan.solved[0].tolist() == [False, True, True]
    assert metrics["hpt/truncated_share"] == metrics["hpt/truncated_success_share"] == pytest.approx(1 / 3)
    assert metrics["hpt/solve_rate"] == pytest.approx(2 / 3) and metrics["hpt/response_length"] == pytest.approx(10 / 3)


def test_a_question_whose_only_successes_were_cut_stays_on_its_demonstration():
    rollouts = Rollouts().add("q", [1, 1], answers=["abcd", "abcd"], cut=(0, 1), target="a")
    step, metrics = scored(make_trainer(LIMIT), rollouts)
    assert step.plan.decisions[0].zone == "demo" and metrics["hpt/solve_rate"] == 0
    step, _ = scored(make_trainer(LIMIT, "++hpt.gate.finished=false"), rollouts)
    assert step.plan.decisions[0].zone == "rl"


def test_padding_of_verl_is_never_cut_and_rows_keep_their_places():
    rollouts = (
        Rollouts().add("a", [0, 0], answers=["abcd", "a"], cut=(0,)).padding().add("b", [0], answers=["wxyz"], cut=(0,))
    )
    trainer = make_trainer(LIMIT)
    batch = rollouts.batch([3, 2, 1, 0])
    trainer._update_actor(batch, {})
    assert trainer.plans[-1].scored.truncated.tolist() == [True, False, False, True]


def model(folder, stops, length=1024) -> str:
    GenerationConfig(eos_token_id=stops).save_pretrained(folder)
    Qwen2Config(max_position_embeddings=length).save_pretrained(folder)
    return f"actor_rollout_ref.model.path={folder}"


def test_every_stop_id_of_the_models_own_generation_config_ends_a_rollout(tmp_path):
    rollouts = Rollouts().add("q", [1, 1], answers=["abc!", "abcd"], cut=(0, 1), target="a")
    stop = rollouts.answers["q_0_0"][-1]
    step, _ = scored(make_trainer(LIMIT, model(tmp_path, [EOS, stop])), rollouts)
    assert step.scored.truncated.tolist() == [False, True]


def test_the_context_of_the_model_bounds_a_response_too(tmp_path):
    """A prompt of 6 tokens in a context of 8 leaves 2 tokens, fewer than data.max_response_length."""
    rollouts = Rollouts().add("q", [1, 1], prompt="sixsix", answers=["ab", "a"], cut=(0,), target="a")
    for override in (model(tmp_path, EOS, 8), "actor_rollout_ref.rollout.max_model_len=8"):
        step, _ = scored(make_trainer(LIMIT, override), rollouts)
        assert step.scored.truncated.tolist() == [True, False]


def test_context_length_is_the_rollouts_own_setting_before_the_models(tmp_path):
    path = model(tmp_path, EOS, 512)
    assert context_length(make_run(path).verl_config.actor_rollout_ref) == 512
    both = make_run(path, "actor_rollout_ref.rollout.max_model_len=99")
    assert context_length(both.verl_config.actor_rollout_ref) == 99
    nothing = make_run(f"actor_rollout_ref.model.path={tmp_path / 'nothing'}")
    assert context_length(nothing.verl_config.actor_rollout_ref) is None
    nothing.context = None
    assert nothing.length_limit(10**6) == nothing.verl_config.data.max_response_length


def test_masked_rollouts_do_not_reach_the_update():
    rollouts = Rollouts().add("q", [1, 0, 0], answers=["abc", "abcd", "a"], cut=(1,), target="a")
    trainer = make_trainer(LIMIT, "++hpt.rollouts.truncated=mask")
    scored(trainer, rollouts)
    meta, _ = trainer.actor_rollout_wg.updates[-1]
    assert sorted(key for key in meta.keys if key.startswith("q")) == ["q_0_0", "q_2_0"]


# --- the metric that the gate reads -----------------------------------------------------------------------------------


def test_the_gate_reads_its_metric_where_the_reward_function_put_it():
    info = [{"acc": True, "shape": 0.2}, {"acc": 0, "shape": -1.0}]
    rollouts = (
        Rollouts().add("q", [0.2, -1.0], info=info, target="a").add("p", [0.9, 0.9], info=[{"acc": 0}] * 2, target="a")
    )
    step, metrics = scored(make_trainer("++hpt.gate.metric=acc"), rollouts)
    assert [d.zone for d in step.plan.decisions] == ["rl", "demo"] and metrics["hpt/solve_rate"] == 0.25
    assert step.questions[0].rewards == pytest.approx([0.2, -1.0]) and step.questions[0].metric.tolist() == [1, 0]
    assert step.plan.advantage[:2] == pytest.approx([0.6, -0.6])


def test_the_gate_reads_its_metric_as_a_column_where_a_colocated_reward_model_put_it():
    rollouts = Rollouts().add("q", [0.2, -1.0], target="a")
    tq.kv_batch_put(rollouts.keys, PARTITION, fields=tu.get_tensordict({"acc": np.array([1.0, 0.0])}))
    step, _ = scored(make_trainer("++hpt.gate.metric=acc"), rollouts)
    assert step.scored.metric.tolist() == [1, 0]


def test_a_source_may_read_its_own_metric_and_another_the_score():
    rollouts = Rollouts()
    rollouts.add("q", [1.0, 1.0], info=[{"acc": 0}] * 2, source="shaped", target="a").add(
        "p", [1.0, 0.0], info=[{}] * 2, target="a"
    )
    step, _ = scored(make_trainer("++hpt.per_source={shaped: {gate: {metric: acc}}}"), rollouts)
    assert step.scored.metric.tolist() == [0, 0, 1, 0] and [d.zone for d in step.plan.decisions] == ["demo", "rl"]


def test_a_metric_that_the_reward_function_does_not_give_stops_the_run_and_names_those_there_are():
    rollouts = Rollouts().add("q", [1.0], info=[{"acc": 1.0, "format": 0.5}], target="a")
    with pytest.raises(UserError, match=r"hpt.gate.metric='correct' is not in .* extra info; it has acc, format"):
        scored(make_trainer("++hpt.gate.metric=correct"), rollouts)


# --- rollouts that are not sampled ------------------------------------------------------------------------------------

SFT_FIRST = "++hpt.gate.threshold={start: 1.0, end: 0.0, steps: 3, shape: step}"


def skipped(*overrides, step=1, targets=("a", "b"), full=(4, 4), sources=("s", "s")):
    run = make_run("actor_rollout_ref.rollout.n=4", *overrides)
    return run.skipped_rollouts(step, drawn(run, targets, sources), list(full))


def drawn(run, targets, sources) -> list[Group]:
    """Questions that are about to be sampled."""
    questions = [Group("", []) for _ in targets]
    for i, (question, target, source) in enumerate(zip(questions, targets, sources, strict=True)):
        cells = {"raw_prompt": [{"role": "user", "content": str(i)}], "target": target, "data_source": source}
        run.read_question(question, cells)
    return questions


def test_one_rollout_is_sampled_while_every_question_is_on_its_demonstration():
    assert skipped(SFT_FIRST, step=3) == [3, 3] and skipped(SFT_FIRST, step=4) is None
    assert skipped("++hpt.gate.count=4") == [3, 3] and skipped("++hpt.gate.count=3") is None
    assert skipped() is None
    assert skipped(SFT_FIRST, full=(2, 1)) == [1, 0], "a question's own number of rollouts"


def test_a_question_without_a_demonstration_keeps_its_rollouts():
    assert skipped(SFT_FIRST, targets=(None, "b")) == [0, 3] and skipped(SFT_FIRST, targets=([], "b")) == [0, 3]


def test_only_the_sources_whose_gate_is_open_are_spared_and_an_own_gate_function_never():
    own = "++hpt.per_source={easy: {gate: {threshold: 0.0}}}"
    assert skipped(SFT_FIRST, own, sources=("easy", "s")) == [0, 3]
    assert skipped("++hpt.gate.function=linear", "++hpt.gate.threshold=1.0") is None


def test_where_sampling_runs_ahead_of_training_nothing_is_spared_by_the_schedule():
    assert skipped(SFT_FIRST, "trainer.v1.trainer_mode=colocate_async") is None


def test_methods_without_a_gate_are_not_spared():
    assert skipped("++hpt.method=luffy") is None


def test_the_early_gate_and_the_schedule_together_skip_the_larger_number():
    early = "++hpt.history={early_gate: {after_failures: 1, rollouts: 2}}"
    run = make_run("actor_rollout_ref.rollout.n=4", SFT_FIRST, early)
    questions = drawn(run, ["a", None], ["s", "s"])
    run.lifecycle.skipped_rollouts = lambda *_: [2, 0]
    assert run.skipped_rollouts(1, questions, [4, 4]) == [3, 0]
    assert run.skipped_rollouts(9, drawn(run, ["a", "a"], ["s", "s"]), [4, 4]) == [2, 0]


def test_the_batch_that_is_sampled_says_how_many_and_a_lone_rollout_has_no_advantage(monkeypatch):
    trainer = make_trainer(SFT_FIRST, "actor_rollout_ref.rollout.n=4")
    drawn = TensorDict(
        {
            "raw_prompt": tu.NonTensorStack(*[[{"role": "user", "content": "q"}]] * 2),
            "target": tu.NonTensorStack("a", "b"),
            "data_source": tu.NonTensorStack("s", "s"),
        },
        batch_size=2,
    )
    monkeypatch.setattr(PPOTrainerSync, "_next_train_batch", lambda self, *args, **kwargs: drawn)
    batch = trainer._next_train_batch()
    assert [batch[i][ROLLOUTS] for i in range(2)] == [1, 1] and [batch[i][SKIPPED] for i in range(2)] == [3, 3]
    # Its demonstration turns out unusable: the lone rollout stays, and its raw reward is no advantage.
    rollouts = Rollouts().add("q", [1.0], target="", **{SKIPPED: 3})
    step, metrics = scored(trainer, rollouts)
    assert step.questions[0].skipped_rollouts == 3 and step.plan.advantage.tolist() == [0]
    assert metrics["hpt/unusable/empty"] == 1


# --- alarms in the run ------------------------------------------------------------------------------------------------


def test_alarms_stand_in_the_metrics_of_the_step_and_in_its_checkpoint(tmp_path):
    trainer = make_trainer(LIMIT, folder=str(tmp_path))
    for trainer.global_steps in range(1, 6):
        metrics = scored(trainer, Rollouts().add("q", [1, 1], answers=["abcd", "wxyz"], cut=(0, 1), target="a"))[1]
        tq.kv_clear(keys=list(keys_there()), partition_id=PARTITION)
    assert metrics["hpt/alarm/all_truncated"] == metrics["hpt/alarm/truncated_success"] == 1
    assert metrics["hpt/all_demo_streak"] == 5 and metrics["hpt/alarm/length"] == 0
    trainer.hpt.alarms.save(str(tmp_path / "global_step_1"))
    assert json.loads((tmp_path / "global_step_1" / "hpt_alarms.json").read_text())["held"]["all_truncated"] == 5
    assert torch.tensor(metrics["hpt/truncated_share"]) == 1
