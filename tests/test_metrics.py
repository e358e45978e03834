"""The numbers that people watch: shares, quantiles from histograms, the effective ratio."""

from collections import Counter

import numpy as np
import pytest

from verl_hpt.methods import METHODS
from verl_hpt.metrics import HISTOGRAMS, SENT, SUMS, of_plan, of_update, quantile
from verl_hpt.plan import PlanSettings, Question, plan

P_EDGES, W_EDGES = HISTOGRAMS["demo_p"], HISTOGRAMS["demo_w"]


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
        "nll_demos": 6.0,
        "tokens_demos": 3.0,
        "strength_demos": 1.0,
        "strength_rollouts": 3.0,
        "strength_all": 4.0,
        "rl_tokens_rollouts": 4.0,
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


def test_quantiles_by_hand():
    edges = (0.0, 1.0, 3.0, 4.0)
    assert quantile(np.array([2, 4, 2]), edges, 0.5) == 2.0  # the middle of the second bin
    assert quantile(np.array([2, 4, 2]), edges, 0.25) == 1.0 and quantile(np.array([2, 4, 2]), edges, 1.0) == 4.0
    assert quantile(np.array([2, 4, 2]), edges, 0.0) == 0.0 and quantile(np.array([0, 0, 5]), edges, 0.2) == 3.2
    assert quantile(np.array([0, 0, 0]), edges, 0.5) == 0.0
    assert quantile(np.array([0, 3]), (0.0, 2.0, float("inf")), 0.5) == 2.0, "the last bin has no upper edge"


def test_what_the_loss_sends_by_hand():
    sent = {name: float(number) for number, name in enumerate(SUMS, 1)} | {"entropy_bonus": 0.25, "kl_loss": 0.75}
    metrics = {SENT + name: value for name, value in sent.items()}
    of_update(metrics)
    expected = {
        "loss/rl": sent["loss_rollouts"],
        "loss/demo": sent["loss_demos"],
        "demo_nll": sent["nll_demos"] / sent["tokens_demos"],
        "clip_share/demos": sent["clipped_demos"] / sent["tokens_demos"],
        "clip_share/rollouts": sent["clipped_rollouts"] / sent["rl_tokens_rollouts"],
        "approx_kl": sent["approx_kl_rollouts"] / sent["rl_tokens_rollouts"],
        "gradient_share/demos": sent["strength_demos"] / sent["strength_all"],
        "gradient_share/rollouts": sent["strength_rollouts"] / sent["strength_all"],
        "entropy_bonus": 0.25,
        "kl_loss": 0.75,
    }
    for name, edges in (("demo_p", P_EDGES), ("demo_w", W_EDGES)):
        counts = np.array([sent[f"{name}_{i}"] for i in range(len(edges) - 1)])
        expected |= {f"{name}/q{q}": quantile(counts, edges, q / 100) for q in (10, 50, 90)}
    assert {name: metrics[f"hpt/{name}"] for name in expected} == pytest.approx(expected)


def test_a_step_without_demonstrations_or_without_rollouts_has_no_share_of_them():
    for present, absent in (("rl_tokens_rollouts", "demo_nll"), ("tokens_demos", "approx_kl")):
        metrics = {SENT + name: float(name == present) for name in SUMS}
        of_update(metrics)
        assert f"hpt/{absent}" not in metrics and metrics["hpt/loss/rl"] == 0
        assert "hpt/gradient_share/demos" not in metrics and "hpt/kl_loss" not in metrics
    metrics = {"actor/grad_norm": 1.0}
    of_update(metrics)
    assert metrics == {"actor/grad_norm": 1.0}, "an update that sent nothing"
