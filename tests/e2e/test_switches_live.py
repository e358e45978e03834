"""verl's own switches in a real training: KL in the reward, rollout correction, a length scale.

One start, about a minute and a half on two cores.
"""

import json

import numpy as np
import pytest
from test_methods_live import STEPS, records_of, rollouts, train

from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD

SCALE, COEF = 7.0, 0.3
OVERRIDES = [
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_ctrl.kl_coef=0.5",
    "++actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=6",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "algorithm.rollout_correction.rollout_is=token",
    "actor_rollout_ref.rollout.dtype=bfloat16",  # else the weights of rollout correction are 1 up to 1e-6
    f"++hpt.rl_length_scale={SCALE}",
    f"++hpt.demo_coef={COEF}",
    "++hpt.gate.finished=false",
]


def test_kl_in_the_reward_rollout_correction_and_length_scale_reach_every_token(tmp_path, monkeypatch):
    train(tmp_path, [f"hpt rl_length_scale={SCALE} demo_coef={COEF}"], OVERRIDES, monkeypatch)
    penalised = weighted = demonstrations = 0
    for step in range(1, STEPS + 1):
        verl = rollouts(tmp_path, step)
        plan = json.loads((tmp_path / "records" / f"plan_{step}.json").read_text())["rows"]
        (record,) = records_of(tmp_path, step)
        questions = {row["question"] for row in plan if row["kind"] >= 0}
        returns = {row["row"]: sum(verl["token_level_rewards"][row["row"]]) for row in plan if row["kind"] == 0}
        for place, row in enumerate(plan):
            if row["kind"] < 0:
                assert not any(record["gradient"][place])
                continue
            n = row["tokens"]
            gradient = record["gradient"][place][:n]
            if row["kind"] == 1:
                demonstrations += 1
                assert gradient == pytest.approx([-COEF / len(questions) / n] * n, rel=1e-5)
                assert record["rollout_is_weights"][place][:n] == [1.0] * n
                continue
            at, group = row["row"], [r["row"] for r in plan if r["kind"] == 0 and r["question"] == row["question"]]
            advantage = returns[at] - (np.mean([returns[i] for i in group]) if len(group) > 1 else 0.0)
            assert record[ROW_FIELD][place][ROW_COLUMNS.index("advantage")] == pytest.approx(advantage, abs=1e-5)
            trust = verl["rollout_is_weights"][at]
            assert record["rollout_is_weights"][place][:n] == pytest.approx(trust, abs=1e-6)
            weight = advantage / (len(questions) * len(group) * SCALE)
            assert gradient == pytest.approx([-weight * w for w in trust], rel=2e-3, abs=1e-7)
            penalised += abs(returns[at] - sum(verl["rm_scores"][at])) > 1e-4
            weighted += any(abs(w - 1) > 1e-4 for w in trust)
    assert penalised and weighted and demonstrations, (penalised, weighted, demonstrations)
