"""The numbers that people watch: shares, quantiles from histograms, the effective ratio."""

from collections import Counter

import numpy as np
import pytest

from verl_hpt.estimator import METHODS
from verl_hpt.loss import P_EDGES, SUMS, W_EDGES
from verl_hpt.metrics import SENT, of_plan, of_update, quantile
from verl_hpt.mixing import PlanSettings, Question, plan


def question(key, rewards, demos=1) -> Question:
    lengths = np.full(len(rewards), 5)
    return Question(
        key, np.array(rewards, float), lengths, demo_lengths=np.full(demos, 10), demo_rewards=np.ones(demos)
    )


def test_shares_and_rates_of_a_step():
    batch = [question("a", [0, 0]), question("b", [1, 0]), question("c", [1, 1]), question("d", [0, 0], demos=0)]
    settings = PlanSettings(METHODS["hpt"], "question", 8.0, demo_coef=0.1, questions_per_step=4)
    counts = Counter({"unusable": 1, "unusable/empty": 1})
    metrics = of_plan(plan(batch, settings), batch, settings, counts)
    assert metrics["hpt/demo_share"] == 0.25 and metrics["hpt/zone/rl"] == 0.75 and metrics["hpt/zone/demo"] == 0.25
    assert metrics["hpt/solve_rate"] == 3 / 8 and metrics["hpt/rl_solve_rate"] == 3 / 6
    assert metrics["hpt/unusable_demos"] == 1 == metrics["hpt/unusable/empty"]
    assert (metrics["hpt/dropped/rollouts"], metrics["hpt/dropped/demos"]) == (2, 2)
    # A demonstration's token weighs λ/(Q·|τ|), a rollout's 1/(Q·n·L).
    assert metrics["hpt/demo_to_rl_weight"] == pytest.approx((0.1 / 10) / (1 / (2 * 8)))


def test_sums_of_the_loss_become_means_and_shares():
    sent = dict.fromkeys(SUMS, 0.0) | {
        "demo_nll": 6.0,
        "demo_tokens": 3.0,
        "strength_demos": 1.0,
        "strength_rollouts": 3.0,
        "rl_tokens": 4.0,
        "clipped_rollouts": 1.0,
        "demo_p_0": 3.0,
    }
    metrics = {SENT + name: value for name, value in sent.items()} | {"actor/grad_norm": 1.0}
    of_update(metrics)
    assert metrics["hpt/demo_nll"] == 2.0 and metrics["hpt/gradient_share/demos"] == 0.25
    assert metrics["hpt/clip_share/rollouts"] == 0.25 and metrics["hpt/demo_p/q50"] <= P_EDGES[1]
    assert not any(key.startswith(SENT) for key in metrics) and metrics["actor/grad_norm"] == 1.0


def test_quantiles_of_a_histogram_lie_in_the_right_bin():
    draw = np.random.default_rng(0).beta(2, 5, 10_000)
    counts, _ = np.histogram(draw, P_EDGES)
    for q in (0.1, 0.5, 0.9):
        assert quantile(counts, P_EDGES, q) == pytest.approx(np.quantile(draw, q), abs=0.02)


def test_plain_imitation_shows_a_weight_of_one():
    counts = np.zeros(len(W_EDGES) - 1)
    counts[np.searchsorted(W_EDGES, 1.0, side="left") - 1] = 7
    assert quantile(counts, W_EDGES, 0.5) == pytest.approx(1, abs=0.002)
