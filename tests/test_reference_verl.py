"""The references against verl's registered losses and advantage estimators on the same tensors."""

import numpy as np
import pytest
import torch
from reference.cases import random_case
from reference.losses import gradients
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig


def verl_gradients(case: dict, loss_name: str, advantages: dict, mode: str, **clip) -> dict:
    """verl's registered loss on the rollouts of a case, padded to one batch; gradient on each row's tokens."""
    rows = {(q["uid"], i): r for q in case["questions"] for i, r in enumerate(q["rollouts"])}
    width = max(r["length"] for r in rows.values())

    def padded(of) -> torch.Tensor:
        return torch.tensor([of(k, r) + [0.0] * (width - r["length"]) for k, r in rows.items()], dtype=torch.float64)

    log_prob = padded(lambda k, r: r["log_prob"]).requires_grad_()
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=clip.get("low", 0.2),
        clip_ratio_high=clip.get("high", 0.2),
        clip_ratio_c=3.0,
    )
    total, _ = core_algos.get_policy_loss_fn(loss_name)(
        old_log_prob=padded(lambda k, r: r["old_log_prob"]),
        log_prob=log_prob,
        advantages=padded(lambda k, r: advantages[k]),
        response_mask=padded(lambda k, r: [1.0] * r["length"]),
        loss_agg_mode=mode,
        config=config,
    )
    total.backward()
    return {
        (uid, "rollout", i): log_prob.grad[row, : rows[uid, i]["length"]].tolist() for row, (uid, i) in enumerate(rows)
    }


def verl_advantages(case: dict, estimator: str, **options) -> dict:
    """verl's registered estimator on the rollouts of a case: one list of token advantages a row."""
    rows = [((q["uid"], i), r) for q in case["questions"] for i, r in enumerate(q["rollouts"])]
    rewards = torch.tensor([[r["reward"]] for _, r in rows], dtype=torch.float64)
    index = np.array([key[0] for key, _ in rows], dtype=object)
    advantages, _ = core_algos.get_adv_estimator_fn(estimator)(
        token_level_rewards=rewards, response_mask=torch.ones_like(rewards), index=index, **options
    )
    return {key: [a] * r["length"] for (key, r), a in zip(rows, advantages[:, 0].tolist(), strict=True)}


def same_size_groups(seed: int, method: str, normalization: str) -> dict:
    """verl divides by rows, the table by questions and then rows: equal where every group has the same size."""
    case = random_case(seed, method, normalization)
    case["questions"] = [q for q in case["questions"] if len(q["rollouts"]) == 4]
    return case


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "estimator", "loss_name", "normalization", "mode", "clip"),
    [
        ("grpo", "grpo", "vanilla", "token", "token-mean", {}),
        ("grpo", "grpo", "vanilla", "sequence", "seq-mean-token-mean", {}),
        ("grpo", "grpo", "vanilla", "token", "token-mean", {"low": 0.1, "high": 0.28}),
        ("cispo", "grpo", "cispo", "token", "token-mean", {}),
        ("gspo", "grpo", "gspo", "sequence", "seq-mean-token-mean", {"low": 3e-4, "high": 4e-4}),
        ("gspo", "grpo", "gspo", "token", "token-mean", {"low": 0.2, "high": 0.2}),
    ],
)
def test_rollout_methods_equal_verls_registered_losses(seed, method, estimator, loss_name, normalization, mode, clip):
    case = same_size_groups(seed, method, normalization)
    case["hpt"]["clip"] = clip
    ours = gradients(case)
    for key, theirs in verl_gradients(case, loss_name, verl_advantages(case, estimator), mode, **clip).items():
        assert ours[key] == pytest.approx(theirs, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_equals_verls_vanilla_loss_on_a_critics_advantages(seed):
    case = random_case(seed, "ppo", "token")
    given = {(q["uid"], i): r["advantage"] for q in case["questions"] for i, r in enumerate(q["rollouts"])}
    ours = gradients(case)
    for key, theirs in verl_gradients(case, "vanilla", given, "token-mean").items():
        assert ours[key] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "estimator", "options"),
    [
        ("grpo", "grpo", {"norm_adv_by_std_in_grpo": True}),
        ("dr_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "rloo", {}),
    ],
)
def test_advantages_equal_verls_estimators_groups_of_one_included(seed, method, estimator, options):
    """With ratio 1 and one question a step, minus the gradient of a token under `paper` is A / n."""
    case = random_case(seed, method, "paper")
    for question in case["questions"]:
        for row in question["rollouts"]:
            row["old_log_prob"] = row["log_prob"]
    ours = gradients(case)
    for question in case["questions"]:
        n = len(question["rollouts"])
        for (uid, i), advantage in verl_advantages({"questions": [question]}, estimator, **options).items():
            assert [-n * x for x in ours[uid, "rollout", i]] == pytest.approx(advantage, abs=1e-7)
