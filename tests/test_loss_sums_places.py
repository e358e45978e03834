"""Every number that the loss sends of rows that begin with a demonstration, recomputed by hand: a token's author, not
its row, says where it is counted."""

import dataclasses
import math
import random
from collections import Counter

import pytest
from test_loss_sums import CONSTANTS, FIELDS, NAN, PROBABILITIES, Row, bin_of, sent, tally, tally_rl, tally_taught

from verl_hpt import parts
from verl_hpt.estimator import Estimator, Method, Term
from verl_hpt.metrics import SENT, SUMS, of_update
from verl_hpt.plan import ROLLOUT

# Clips on own tokens, on the R term and on the S term of prefixes, each in its own way.
METHOD = Method(
    "clipped_everywhere",
    Estimator(parts.ppo_clip, parts.old),
    (
        Term("S", Estimator(parts.psft_clip, parts.old, parts.unit)),
        Term("R", Estimator(parts.uncertain_clip, parts.old, parts.against_plain)),
    ),
    place="prefix",
    when="always",
)
S_ALONE = dataclasses.replace(METHOD, demos=METHOD.demos[:1])
R_ALONE = dataclasses.replace(METHOD, demos=METHOD.demos[1:])
CRITIC = dataclasses.replace(METHOD, rollouts=Estimator(parts.ppo_clip, parts.old, parts.gae))
DROPPED = 0.8


def rows_of_a_step(seed=0):
    """Rows with prefixes of several lengths under every pair of weights; what nothing may read is no number."""
    draw = random.Random(seed)
    rows = [
        (Row(ROLLOUT, 0.25, 0.0, 0.5, advantage=1.0, reward=1.0), 0),
        (Row(ROLLOUT, 0.125, 0.0, 0.25, advantage=-0.5, prefix=7, demo_advantage=0.75), 0),
        (Row(ROLLOUT, 0.5, 0.25, 0.125, advantage=0.5, prefix=12, demo_advantage=-1.0), 0),
        (Row(ROLLOUT, 0.25, 0.5, 0.25, advantage=-1.0, prefix=3, demo_advantage=-0.5), 0),
        (Row(ROLLOUT, 0.125, 0.375, 0.25, advantage=0.25, prefix=10, demo_advantage=1.5), 0),
        (Row(ROLLOUT, 0.0, 0.375), 0),  # imitates itself
        (Row(ROLLOUT, 0.25, 0.0, 0.25, advantage=-0.25), 6),  # its prefix is frozen
    ]
    for row, frozen in rows:
        given = row.prefix or frozen
        own = [1] + [int(draw.random() > 0.2) for _ in range(draw.randint(5, 9))]
        row.mask = [0] * given + own
        for t, mask in enumerate(row.mask):
            old = draw.uniform(-3.5, -0.2)
            numbers = {
                "old": old,
                "new": min(old + draw.gauss(0, 0.7), -0.01),
                "ref": old + draw.uniform(-0.5, 0.5),
                "entropy": draw.choice([0.5, draw.uniform(0.1, 2.0)]),
                "is_weight": draw.uniform(0.5, 2.0),
                "weight": 1.0,
                "critic": draw.uniform(-1, 1),
            }
            for name, number in numbers.items():
                of_rollout = name in ("is_weight", "critic")  # verl's, for what the rollout's author wrote
                getattr(row, name).append(number if mask or (t < row.prefix and not of_rollout) else NAN)
    return [row for row, _ in rows]


ROWS = rows_of_a_step()


def learning_of(row) -> set[int]:
    """The tokens of a prefix that are among its most uncertain ones."""
    dropped = math.floor(DROPPED * row.prefix + 1e-6)
    return set(sorted(range(row.prefix), key=lambda t: (row.entropy[t], t))[dropped:])


def by_hand(rows, method, is_weights=True, entropy_coeff=0.0, kl_coef=0.0):
    """From the formulas. -> loss, gradients on log-probs and entropies, Counter by name, and which clips fired"""
    c, sums, fired, loss = CONSTANTS, Counter(), Counter(), 0.0
    has_r, has_s = (method.term(kind) is not None for kind in "RS")
    on_log_prob, on_entropy = [], []
    for row in rows:
        gradient, of_entropy, learns = [0.0] * len(row.mask), [0.0] * len(row.mask), learning_of(row)
        for t in (t for t, mask in enumerate(row.mask) if mask or t < row.prefix):
            given, new, old, p = t < row.prefix, row.new[t], row.old[t], math.exp(row.new[t])
            kind, r = "demos" if given else "rollouts", math.exp(new - old)
            advantage = row.demo_advantage if given else row.critic[t] if method.uses_critic else row.advantage
            up, down = advantage > 0 and r > 1 + c.clip_high, advantage < 0 and r < 1 - c.clip_low
            dual = advantage < 0 and r > c.clip_c
            shown = c.clip_c if dual else 1 + c.clip_high if up else 1 - c.clip_low if down else r
            stopped = up or down or dual
            if given:
                stopped, shown = stopped or t not in learns, 0.0 if t not in learns else shown
            rl, rl_value = 0.0 if stopped else r * advantage, shown * advantage
            if given and not has_r:
                stopped, rl, rl_value = False, 0.0, 0.0
            left = r > 1 + c.psft_clip
            s = r if has_s and not left and (given or not row.prefix) else 0.0
            w_rl, w_demo = row.w_rl, row.w_demo
            if is_weights and not given:
                w_rl *= row.is_weight[t]
            gradient[t] = -(w_rl * rl + w_demo * s)
            value = -(w_rl * rl_value + w_demo * s * new)
            loss += value
            tally(sums, kind, value, gradient[t], new)
            if row.w_rl:
                tally_rl(sums, kind, stopped, old - new)
                fired.update({(kind, "up"): up, (kind, "down"): down, (kind, "dual"): dual})
                fired[kind, "certain"] += given and t not in learns
            if given and row.w_demo:
                sums["clipped_demos"] += has_s and left
                fired["stopped"] += left
            if given and (row.w_rl or row.w_demo):
                tally_taught(sums, p, s if row.w_demo else rl)
            if entropy_coeff and not given:
                sums["entropy_bonus"] += row.w_entropy * row.entropy[t]
                of_entropy[t] = -entropy_coeff * row.w_entropy
            if kl_coef and not given:
                sums["kl_loss"] += w_rl * 0.5 * (new - row.ref[t]) ** 2
                gradient[t] += kl_coef * w_rl * (new - row.ref[t])
        on_log_prob.append(gradient)
        on_entropy.append(of_entropy)
    loss += kl_coef * sums["kl_loss"] - entropy_coeff * sums["entropy_bonus"]
    return loss, [on_log_prob, on_entropy], sums, fired


def test_the_batch_meets_every_branch():
    *_, sums, fired = by_hand(ROWS, METHOD)
    sides = [fired[kind, side] for kind in ("rollouts", "demos") for side in ("up", "down", "dual")]
    assert min(*sides, fired["stopped"], fired["demos", "certain"]) > 0, fired
    assert sum(name.startswith("demo_p_") for name in sums) > 4 < sum(name.startswith("demo_w_") for name in sums)


def compare(got, expected, dp_size=1, extra=()):
    (loss, gradients, metrics), (expected_loss, expected_gradients, sums, _) = got, expected
    assert loss == pytest.approx(dp_size * expected_loss, rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        for row, by_token in zip(ours, theirs, strict=True):
            assert row == pytest.approx([dp_size * x for x in by_token], rel=1e-6, abs=1e-12)
    wanted = {f"hpt/{name}": dp_size * sums[name] for name in (*SUMS, *extra)}
    assert metrics == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("is_weights", [True, False])
@pytest.mark.parametrize(
    "extra", [{}, {"entropy_coeff": 0.25}, {"kl_coef": 0.5}, {"entropy_coeff": 0.25, "kl_coef": 0.5}]
)
def test_loss_gradient_and_every_sum_by_hand(dp_size, is_weights, extra):
    fields = tuple(x for x in FIELDS if is_weights or x != "rollout_is_weights")
    names = [name for name, key in (("entropy_bonus", "entropy_coeff"), ("kl_loss", "kl_coef")) if key in extra]
    expected = by_hand(ROWS, METHOD, is_weights, **extra)
    compare(sent(ROWS, METHOD, fields, dp_size, **extra), expected, dp_size, names)


def test_a_mask_that_has_the_prefix_too_says_the_same():
    """The row's number says what a demonstration wrote, whoever left the mask as it is."""
    extra = {"entropy_coeff": 0.25, "kl_coef": 0.5}
    masked = [dataclasses.replace(row, mask=[1] * row.prefix + row.mask[row.prefix :]) for row in ROWS]
    fields = tuple(x for x in FIELDS if x != "rollout_is_weights")
    compare(
        sent(masked, METHOD, fields, **extra), by_hand(ROWS, METHOD, False, **extra), 1, ["entropy_bonus", "kl_loss"]
    )


@pytest.mark.parametrize("method", [S_ALONE, R_ALONE], ids=["S", "R"])
def test_one_term_alone_on_prefixes(method):
    """Without an R term a prefix has no part in the RL sum; without an S term nothing imitates."""
    rows = [row for row in ROWS if row.w_rl and (method is S_ALONE or not row.w_demo)]
    compare(sent(rows, method), by_hand(rows, method))


def test_a_critics_advantages_are_read_on_own_tokens_alone():
    """verl's are of its mask: what stands on a prefix is none."""
    compare(sent(ROWS, CRITIC, (*FIELDS, "advantages")), by_hand(ROWS, CRITIC))


def test_shares_and_means_by_hand():
    """One row: a prefix of 2 tokens at log π −2 (old −2) and 3 own at −1 (old −1.1), as a rollout and a demonstration.

    R on the prefix alone learns from its second token, Â 0.5: 0.5·w; own Â −1, r = e^0.1: 3·e^0.1·w. NLL 2, approx_kl
    −0.1; of the two prefix tokens one is dropped.
    """
    row = Row(ROLLOUT, 0.25, 0.0, advantage=-1.0, prefix=2, demo_advantage=0.5)
    row.mask, row.new, row.old = [0, 0, 1, 1, 1], [-2.0] * 2 + [-1.0] * 3, [-2.0] * 2 + [-1.1] * 3
    row.ref, row.is_weight, row.entropy = [0.0] * 5, [1.0] * 5, [0.1, 0.9, 0.0, 0.0, 0.0]
    row.weight = [1.0] * 5
    _, _, metrics = sent([row], R_ALONE)
    told = {SENT + name.removeprefix("hpt/"): value for name, value in metrics.items()}
    of_update(told)
    own = 3 * math.exp(0.1)
    expected = {
        "demo_nll": 2.0,
        "clip_share/demos": 0.5,
        "clip_share/rollouts": 0.0,
        "approx_kl": -0.1,
        "gradient_share/demos": 0.5 / (0.5 + own),
        "gradient_share/rollouts": own / (0.5 + own),
        "loss/rl": 0.25 * own,
        "loss/demo": -0.25 * 0.5,
    }
    assert {name: told[f"hpt/{name}"] for name in expected} == pytest.approx(expected, rel=1e-6)
    low = math.exp(-2.0)
    assert PROBABILITIES[bin_of(low, PROBABILITIES)] <= told["hpt/demo_p/q50"] <= 0.15, "of the prefix alone"
