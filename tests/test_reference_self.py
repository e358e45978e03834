"""The references against numbers worked out by hand, limits, and finite differences."""

import math

import pytest
import torch
from reference.cases import random_case
from reference.losses import METHODS, gradients, loss_parts, soft_coefficients
from reference.step import OWN, leaves_of, questions_of, settings_of, zone

G1 = {
    "hpt": {"method": "hpt", "rl_length_scale": 16, "demo_coef": 1.0},
    "questions": [
        {
            "uid": "q1",
            "rollouts": [
                {"reward": reward, "length": length, "log_prob": -1.0}
                for reward, length in ((1, 4), (0, 6), (0, 8), (0, 2))
            ],
            "demos": [{"length": 5, "log_prob": -0.5}],
        },
        {
            "uid": "q2",
            "rollouts": [{"reward": 0, "length": 4, "log_prob": -1.0}] * 4,
            "demos": [{"length": 10, "log_prob": -0.5, "reward": 1}],
        },
        {"uid": "q3", "rollouts": [{"reward": 1, "length": 3, "log_prob": -1.0}] * 4, "demos": []},
    ],
}

G2 = {
    "hpt": {"method": "hpt", "rl_length_scale": 16, "demo_coef": 1.0},
    "questions": [
        {
            "uid": uid,
            "rollouts": [{"reward": 0, "length": 3, "log_prob": -1.0}] * 4,
            "demos": [{"length": length, "log_prob": -nll}],
        }
        for uid, length, nll in (("a", 2, 2.0), ("b", 8, 1.0))
    ],
}


def with_settings(case: dict, **hpt) -> dict:
    return {**case, "hpt": {**case["hpt"], **hpt}}


@pytest.mark.parametrize(
    ("normalization", "rl", "demo"),
    [
        ("official", 1 / 16, 0.5),
        ("paper", 1 / 4, 0.5),
        ("token", 1 / 32, 0.5),  # 4 + 6 + 8 + 2 + 4 * 3 rollout tokens
        ("question", 1 / 4 / 16 / 3, 0.5 / 3),
        ("sequence", 0.0, 0.5 / 3),  # (-0.75 + 3 * 0.25) / 4 / 3: a mean over tokens hides the lengths
        (None, 1 / 4 / 16 / 3, 0.5 / 3),
    ],
)
def test_golden_three_questions(normalization, rl, demo):
    """-A * tokens on q1: -(0.75 * 4 - 0.25 * 16) = 1; q3 has no advantage; q2's demonstration has NLL 0.5 a token."""
    parts = loss_parts(with_settings(G1, normalization=normalization))
    assert parts["rl"] == pytest.approx(rl, abs=1e-12)
    assert parts["demo"] == pytest.approx(demo, abs=1e-12)


def test_golden_three_questions_with_smaller_demo_coefficient():
    """0.0625 + 0.3 * 0.5 = 0.2125."""
    parts = loss_parts(with_settings(G1, normalization="official", demo_coef=0.3))
    assert parts["total"] == pytest.approx(0.2125, abs=1e-12)


@pytest.mark.parametrize(
    ("normalization", "total"),
    [("official", 1.2), ("token", 1.2), ("question", 1.5), ("sequence", 1.5), ("paper", 3.0)],
)
def test_golden_two_demonstrations(normalization, total):
    """2 tokens at 2.0 and 8 at 1.0: (4 + 8) / 10 = 1.2 by token; (2 + 1) / 2 = 1.5 and 2 + 1 = 3 by row."""
    assert loss_parts(with_settings(G2, normalization=normalization))["total"] == pytest.approx(total, abs=1e-12)


def test_golden_token_gradients():
    """question: -0.75 / 16 / 4 / 3 on q1's right rollout, +0.25 of it on the wrong ones, -1 / 10 / 3 on the demo."""
    g = gradients(with_settings(G1, normalization="question"))
    assert g["q1", "rollout", 0] == pytest.approx([-0.75 / 192] * 4, abs=1e-15)
    assert g["q1", "rollout", 2] == pytest.approx([0.25 / 192] * 8, abs=1e-15)
    assert g["q2", "demo", 0] == pytest.approx([-1 / 30] * 10, abs=1e-15)
    assert g["q1", "demo", 0] == [0.0] * 5  # q1 is reinforced: its demonstration is not in the step
    assert g["q2", "rollout", 3] == [0.0] * 4
    assert g["q3", "rollout", 0] == [0.0] * 3


# ---------------------------------------------------------------- one token at p = 1/2


ONE = {  # two rollouts of one token, one solves; a demonstration of one token; p = 1/2 everywhere, p_old = 1/4
    "uid": "q",
    "rollouts": [
        {"reward": r, "length": 1, "log_prob": math.log(0.5), "old_log_prob": math.log(0.25), "entropy": math.log(2)}
        for r in (1.0, 0.0)
    ],
    "demos": [
        {
            "reward": 1.0,
            "length": 1,
            "log_prob": math.log(0.5),
            "old_log_prob": math.log(0.25),
            "ref_log_prob": math.log(0.75),
            "entropy": math.log(2),
            "model_log_prob": math.log(0.5) + math.log(3),  # sigma(mbar - m) = 3 / 4
        }
    ],
}
ALL_FAIL = {**ONE, "rollouts": [{**ONE["rollouts"][1]}, {**ONE["rollouts"][1]}]}
GOLDEN_WEIGHTS = [  # (method, question, rollouts' weights, demonstration's weight); gradient = -weight under `paper`
    # A = +-1/2, r = 2: +1/2 is clipped at 1.2, -1/2 is not (r < 3): -r/2 = -1
    ("dr_grpo", ONE, [0.0, -1.0], 0.0),
    # sample std of (1, 0) is 1/sqrt(2): A = +-0.5 / (0.70711 + 1e-6) = +-0.707106 less 1e-6
    ("grpo", ONE, [0.0, -2 * 0.5 / (math.sqrt(0.5) + 1e-6)], 0.0),
    ("superrl", ONE, [0.0, -2 * 0.5 / (math.sqrt(0.5) + 1e-6)], 0.0),
    ("superrl", ALL_FAIL, [0.0, 0.0], 1.0),
    ("reinforce", ONE, [0.5, -0.5], 0.0),  # baseline: the step's mean reward, 1/2
    ("rloo", ONE, [1.0, -1.0], 0.0),
    ("cispo", ONE, [1.2 * 0.5 / (math.sqrt(0.5) + 1e-6), -1.2 * 0.5 / (math.sqrt(0.5) + 1e-6)], 0.0),
    ("gspo", ONE, [0.0, -2 * 0.5 / (math.sqrt(0.5) + 1e-6)], 0.0),  # one token: the sequence ratio is the token's
    ("raft", ONE, [1.0, 0.0], 0.0),
    ("sft", ONE, [0.0, 0.0], 1.0),
    ("hpt", ONE, [0.0, -1.0], 0.0),
    ("hpt", ALL_FAIL, [0.0, 0.0], 1.0),
    # 0.1 * 0.5 / 0.6^2 = 5 / 36, advantage = the demonstration's reward 1
    ("hpt_off_on", ALL_FAIL, [0.0, 0.0], 5 / 36),
    ("hpt_mix_on", ALL_FAIL, [0.0, 0.0], 0.1 + 5 / 36),
    # 1 of 2 solved -> P = 1/2 -> entry 1 + round(3.5) = 5: (1, .25, 0); 0 of 2 -> entry 1: (0, 0, 1)
    ("hpt_soft", ONE, [0.0, -1.0], 0.25 * 5 / 36),
    ("hpt_soft", ALL_FAIL, [0.0, 0.0], 1.0),
    # group (1, 0, 1): mean 2/3, A = 1/3, -2/3; unclipped r = 2
    ("luffy", ONE, [2 / 3, -4 / 3], 5 / 36 / 3),
    # demonstration: S 0.5 / 2, R A p with sample std 1/sqrt(3); rollouts 0.1 * 2 and -1
    ("srft", ONE, [0.2, -1.0], 0.25 + 0.5 * (1 / 3) / (math.sqrt(1 / 3) + 1e-6)),
    ("srft_hpt", ONE, [0.2, -1.0], 0.25 + 5 / 36 / 3),
    # S 0.5 * 2; rollouts 0.1 * 2 * r A where A > 0
    ("srft_code", ONE, [0.2 * 2 / 3, -4 / 3], 1.0 + 5 / 36 / 3),
    ("dft", ONE, [0.0, 0.0], 0.5),
    ("asft", ONE, [0.0, 0.0], 0.5 + 0.1 * (1.5 - 1)),
    ("otr", ONE, [0.0, 0.0], 0.5),
    ("psft", ONE, [0.0, 0.0], 0.0),  # r = 2 > 1.28
    ("trsft", ONE, [0.0, -1.0], 1.0),  # p >= 0.1
    # (1 - 1/2)^(1/2) * 2 p / (1/8 + 1/2 + 1/4) / 3 = sqrt(1/2) * (8 / 7) / 3
    ("rl_plus", ONE, [2 / 3, -4 / 3], math.sqrt(0.5) * 8 / 7 / 3),
    ("s3ft", ONE, [1.0, 0.0], 0.0),
    ("s3ft", ALL_FAIL, [0.0, 0.0], 1.0),
    ("poft", ONE, [0.0, 0.0], 0.75),
]


@pytest.mark.parametrize(("method", "question", "rollouts", "demo"), GOLDEN_WEIGHTS)
def test_weight_of_one_token_by_hand(method, question, rollouts, demo):
    """`paper` with one question divides R terms by their number of rows and S terms by 1."""
    case = {"hpt": {"method": method, "normalization": "paper", "demo_coef": 1.0}, "questions": [question]}
    g = gradients(case)
    n_r, demo_r, demo_s = len(question["rollouts"]), 0, 0
    if method in ("luffy", "srft", "srft_hpt", "srft_code", "trsft", "rl_plus"):
        n_r += 1
    if method in ("hpt_off_on", "hpt_mix_on"):
        n_r = 1
    if method == "hpt_soft" and question is ONE:
        n_r = 3
    if method == "s3ft":
        n_r = 1  # an S term on a rollout row
    demo_s = {"srft": 0.25, "srft_hpt": 0.25, "srft_code": 1.0, "hpt_mix_on": 0.1}.get(method, 0.0)
    if method not in ("hpt_off_on", "luffy", "trsft", "rl_plus") and not (method == "hpt_soft" and question is ONE):
        demo_s = demo_s or demo
    demo_r = demo - demo_s
    for i, weight in enumerate(rollouts):
        assert g["q", "rollout", i] == pytest.approx([-weight / n_r], abs=1e-12)
    assert g["q", "demo", 0] == pytest.approx([-(demo_s + demo_r / n_r)], abs=1e-12)


def test_every_method_is_in_the_table_of_golden_weights():
    assert set(METHODS) == set(OWN) == {row[0] for row in GOLDEN_WEIGHTS} | {"ppo"}


def test_s3ft_takes_the_first_right_rollout_alone():
    rollouts = [{**ONE["rollouts"][0], "reward": reward} for reward in (0.0, 1.0, 1.0)]
    case = {"hpt": {"method": "s3ft", "demo_coef": 1.0}, "questions": [{**ONE, "rollouts": rollouts}]}
    assert [gradients(case)["q", "rollout", i] for i in range(3)] == [[0.0], [-1.0], [0.0]]


def test_trsft_is_a_straight_line_in_p_outside_the_trust_region():
    """p = 0.02 < alpha = 0.1: weight p / alpha = 0.2."""
    demo = {**ONE["demos"][0], "log_prob": math.log(0.02)}
    case = {"hpt": {"method": "trsft", "normalization": "paper"}, "questions": [{**ONE, "demos": [demo]}]}
    assert gradients(case)["q", "demo", 0] == pytest.approx([-0.2 / 3], abs=1e-12)


def test_asft_cap_bounds_the_anchor():
    """ref / p = 1.5 under cap 1.2: weight 0.5 + 0.1 * (1.2 - 1) = 0.52."""
    hpt = {"method": "asft", "normalization": "paper", "demo_coef": 1.0, "options": {"kl_cap": 1.2}}
    assert gradients({"hpt": hpt, "questions": [ONE]})["q", "demo", 0] == pytest.approx([-0.52], abs=1e-12)


def test_otr_expectation_equals_the_mean_over_sampled_tokens():
    """E over tokens a ~ pi of R(a) grad log pi(a), written over a vocabulary of 5, at the demonstration's log-prob."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.2], dtype=torch.float64, requires_grad=True)
    log_pi = torch.log_softmax(logits, -1)
    pi = log_pi.exp().detach()
    beta, target = -0.3, 2
    reward = torch.tensor([1.0 if a == target else beta for a in range(5)], dtype=torch.float64)
    (expected,) = torch.autograd.grad(-(pi * reward * log_pi).sum(), logits, retain_graph=True)
    demo = {"length": 1, "log_prob": log_pi[target].item()}
    hpt = {"method": "otr", "normalization": "paper", "demo_coef": 1.0, "options": {"otr_beta": beta}}
    (by_log_prob,) = gradients({"hpt": hpt, "questions": [{"uid": "q", "demos": [demo]}]})["q", "demo", 0]
    (through_logits,) = torch.autograd.grad(log_pi[target] * by_log_prob, logits)
    torch.testing.assert_close(through_logits, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- gate


def test_gate_zones():
    def where(rewards, **gate):
        case = {
            "hpt": {"method": "hpt", "gate": gate},
            "questions": [
                {
                    "uid": "q",
                    "rollouts": [{"reward": r, "length": 1, "log_prob": -1.0} for r in rewards],
                    "demos": [{"length": 1, "log_prob": -1.0}],
                }
            ],
        }
        s = settings_of(case)
        return zone(questions_of(case, leaves_of(case), s)[0], s)

    assert where([0, 0, 0, 0]) == "demo"
    assert where([1, 0, 0, 0]) == "rl"
    assert where([0.9, 0, 0, 0]) == "demo"  # below success
    assert where([1] * 15 + [0] * 7, threshold=15 / 22) == "demo"  # 15 / 22 * 22 < 15 in floats
    assert where([1, 1, 1, 1], threshold=1.0) == "demo"
    assert where([0, 0, 0, 0], threshold=-1.0) == "rl"
    assert where([], threshold=-1.0) == "rl"
    assert where([1, 1, 0, 0], count=2) == "demo"
    assert where([1, 0, 0, 0], off=0.25) == "off"
    assert where([1, 1, 0, 0], off=0.25) == "rl"


def test_soft_with_a_step_table_is_the_switch():
    for seed in range(3):
        case = random_case(seed, "hpt_soft", "question")
        for question in case["questions"]:
            n = len(question["rollouts"])
            step = [(0.0, 0.0, 1.0)] + [(1.0, 0.0, 0.0)] * n
            one = {"hpt": {**case["hpt"], "gate": {"soft": step}}, "questions": [question]}
            switch = with_settings(one, method="hpt", gate={})
            assert gradients(one) == gradients(switch)


def test_published_soft_table_at_its_native_group_of_seven_and_a_demo():
    assert [soft_coefficients(k, 7, None)[2] for k in range(8)] == [1.0, 0.5, 0.25, 0.125, 0.0, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------- limits


def assert_same(left: dict, right: dict) -> None:
    a, b = gradients(left), gradients(right)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_superrl_is_hpt_over_grpo_for_zero_one_rewards(seed):
    """Where every rollout failed both imitate; elsewhere SuperRL is GRPO."""
    case = random_case(seed, "superrl", "question", binary=True)
    imitate, reinforce = gradients(with_settings(case, method="hpt")), gradients(with_settings(case, method="grpo"))
    mixed = gradients(case)
    for question in case["questions"]:
        failed = bool(question["demos"]) and all(r["reward"] == 0 for r in question["rollouts"])
        source = imitate if failed else reinforce
        for key in (k for k in mixed if k[0] == question["uid"]):
            assert mixed[key] == source[key]


@pytest.mark.parametrize("seed", range(3))
def test_luffy_without_demonstrations_is_dr_grpo_without_clip(seed):
    case = random_case(seed, "luffy", "question")
    case["questions"] = [{**q, "demos": []} for q in case["questions"]]
    assert_same(case, with_settings(case, method="dr_grpo", clip={"low": None, "high": None, "c": None}))


@pytest.mark.parametrize("seed", range(3))
def test_otr_is_dft_times_one_minus_beta(seed):
    case = random_case(seed, "otr", options={"otr_beta": 0.25})
    otr, dft = gradients(case), gradients(with_settings(case, method="dft"))
    for key in otr:
        assert otr[key] == pytest.approx([0.75 * x for x in dft[key]], abs=1e-12)


# ---------------------------------------------------------------- random cases


def test_random_cases_reach_every_clip_branch():
    high = low = dual = inside = below_alpha = above_psft = gspo_inside = 0
    for seed in range(3):
        case = random_case(seed, "ppo")
        for row in (r for q in case["questions"] for r in q["rollouts"]):
            gap = [a - b for a, b in zip(row["log_prob"], row["old_log_prob"], strict=True)]
            gspo_inside += abs(sum(gap) / len(gap)) < 3e-4
            for x, a in zip(gap, row["advantage"], strict=True):
                ratio = math.exp(x)
                high += a > 0 and ratio > 1.2
                low += a < 0 and ratio < 0.8
                dual += a < 0 and ratio > 3
                inside += 0.8 < ratio < 1.2
        for row in (r for q in case["questions"] for r in q["demos"]):
            gap = [a - b for a, b in zip(row["log_prob"], row["old_log_prob"], strict=True)]
            below_alpha += sum(x < math.log(0.1) for x in row["log_prob"])
            above_psft += sum(x > math.log(1.28) for x in gap)
    assert min(high, low, dual, inside, below_alpha, above_psft, gspo_inside) >= 3


def test_random_cases_hold_every_zone():
    case = random_case(0, "hpt", gate={"threshold": 0.0, "off": 0.3})
    s = settings_of(case)
    assert {zone(q, s) for q in questions_of(case, leaves_of(case), s)} == {"demo", "off", "rl"}


@pytest.mark.parametrize("method", ["ppo", "gspo", "luffy", "psft", "trsft", "poft", "otr", "hpt_off_on"])
def test_gradients_are_finite_differences_of_the_loss(method):
    """Methods whose loss has no stop-gradient: central differences, step 1e-6, away from kinks."""
    case = random_case(5, method)
    g = gradients(case)
    step = 1e-6
    for question in case["questions"][:4]:
        for kind in ("rollout", "demo"):
            for index, row in enumerate(question[kind + "s"]):
                original = row["log_prob"][0]
                row["log_prob"][0] = original + step
                up = loss_parts(case)["total"]
                row["log_prob"][0] = original - step
                down = loss_parts(case)["total"]
                row["log_prob"][0] = original
                assert (up - down) / (2 * step) == pytest.approx(g[question["uid"], kind, index][0], abs=1e-7)
