"""Limits in which one row of the table must become another, to 1e-6."""

import copy

import pytest
import torch
from reference.cases import random_case
from test_methods import our_gradients, ours

from verl_hpt.config import estimator_of
from verl_hpt.estimator import coefficient
from verl_hpt.methods import METHODS
from verl_hpt.parts import Constants, Tokens
from verl_hpt.tools.explain import explain

OPEN = {"low": 1e9, "high": 1e9, "c": 1e9}  # a clip that never fires


def same(a: dict, b: dict, tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    assert any(any(g) for g in a.values())
    for key in a:
        assert a[key] == pytest.approx(b[key], abs=tolerance), key


def of(case: dict, **hpt) -> dict:
    case = copy.deepcopy(case)
    case["hpt"] = {**case["hpt"], **hpt}
    return our_gradients(case)


def test_dft_is_sft_weighted_by_the_tokens_probability():
    case = random_case(1, "sft")
    weighted = of(case, method="dft")
    log_prob = {(r["uid"], i): r["log_prob"] for r, i in _demos(case)}
    for key, gradient in of(case, method="sft").items():
        p = torch.tensor(log_prob[key[0], key[2]], dtype=torch.float64).exp()
        assert (torch.tensor(gradient, dtype=torch.float64) * p).tolist() == pytest.approx(weighted[key], abs=1e-12)


def _demos(case):
    return [({**d, "uid": q["uid"]}, i) for q in case["questions"] for i, d in enumerate(q["demos"])]


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_otr_at_temperature_one_is_dft_times_one_minus_beta_in_expectation_and_by_sampling(beta):
    """OTR rewards one token drawn from the policy: 1 if it is the label, β if not. Its REINFORCE gradient on the
    logits, averaged over draws, is (1−β)·p·∇ log p(label): the β part multiplies Σ_v p_v ∇ log p_v = 0."""
    torch.manual_seed(0)
    logits, label, draws = torch.randn(7, dtype=torch.float64), 3, 400_000
    p = logits.softmax(0)
    sampled = torch.multinomial(p, draws, replacement=True)
    reward = torch.where(sampled == label, 1.0, beta).double()
    score = torch.nn.functional.one_hot(sampled, 7).double() - p
    estimate = (reward[:, None] * score).mean(0)
    exact = (1 - beta) * p[label] * (torch.eye(7, dtype=torch.float64)[label] - p)
    assert estimate.tolist() == pytest.approx(exact.tolist(), abs=4 / draws**0.5)

    log_p = p[label].log().reshape(1, 1)
    tokens = Tokens(
        log_prob=log_p,
        mask=torch.ones(1, 1, dtype=torch.bool),
        advantage=torch.zeros(1, 1),
        reward=torch.ones(1, 1),
        correct=torch.ones(1, 1, dtype=torch.bool),
        constants=Constants(otr_beta=beta),
    )
    ours, dft = (coefficient(METHODS[name].s_estimator, tokens).item() for name in ("otr", "dft"))
    assert ours == pytest.approx((1 - beta) * dft, abs=1e-12) and dft == pytest.approx(p[label].item(), abs=1e-12)


def test_superrl_is_hpt_at_gamma_zero_for_zero_one_rewards():
    """Both with GRPO's advantage and the same normalisation, which are SuperRL's own."""
    case = random_case(2, "superrl", "sequence", binary=True)
    composed = {"rollouts": "grpo", "demos": [{"kind": "S"}], "when": "gate", "normalization": "sequence"}
    same(of(case), of(case, method="hpt", compose=composed))


def test_luffy_without_demonstrations_is_dr_grpo_without_clip():
    case = random_case(3, "luffy", clip=OPEN)
    for question in case["questions"]:
        question["demos"] = []
    same(of(case), of(case, method="dr_grpo"))


def test_hpt_soft_with_a_step_table_is_hpt():
    case = random_case(4, "hpt_soft", binary=True)
    step = [[0, 0, 1], *[[1, 0, 0]] * 12]
    same(of(case, gate={"soft": step}), of(case, method="hpt"))


def test_hpt_whose_gate_never_fires_is_dr_grpo_and_always_is_sft():
    case = random_case(5, "hpt")
    same(of(case, gate={"threshold": -1}), of(case, method="dr_grpo", gate={}))
    case["questions"] = [q for q in case["questions"] if q["demos"]]
    same(of(case, gate={"threshold": 1}, normalization="token"), of(case, method="sft", gate={}))


def test_the_four_parts_composed_by_hand_are_the_named_method():
    case = random_case(6, "luffy")
    group = {"mask": "everywhere", "reference": "old", "advantage": "centered", "likelihood": "plain"}
    shaped = {"reference": "one", "advantage": "centered", "likelihood": "shaped"}
    composed = {
        "rollouts": group,
        "demos": [{"kind": "R", "estimator": shaped}],
        "place": "group",
        "when": "always",
        "normalization": "question",
    }
    same(of(case), of(case, method="hpt", compose=composed))


def test_rows_whose_shares_are_zero_leave_the_plan():
    case = ours(random_case(4, "hpt_soft", binary=True, gate={"soft": [[0, 0, 1], [1, 0, 0]]}))
    rows = {(row["uid"], row["kind"]) for row in explain(case)["rows"]}
    assert ("none-solved", "rollout") not in rows and ("all-solved", "demo") not in rows


@pytest.mark.parametrize("mask", ["ppo_clip", "sequence_clip"])
@pytest.mark.parametrize(
    ("advantage", "score", "kept"), [("unit", 0.0, False), ("reward", 1.0, False), ("reward", -1.0, True)]
)
def test_a_clip_goes_by_the_sign_of_the_estimators_own_advantage(mask, advantage, score, kept):
    """On a demonstration the plan's Â is 0: read from there, no clip would ever fire."""
    estimator = estimator_of({"mask": mask, "reference": "old", "advantage": advantage}, "here")
    row = {"mask": torch.ones(1, 2, dtype=torch.bool), "correct": torch.tensor([[True]])}
    far = torch.full((1, 2), -1.0, dtype=torch.float64)  # r = e^0.8 is above 1 + ε, below c
    tokens = Tokens(
        far, advantage=torch.zeros(1, 1), reward=torch.tensor([[score]]), old_log_prob=far - 0.8, **row,
        constants=Constants(clip_c=9.0),
    )  # fmt: skip
    assert (coefficient(estimator, tokens) != 0).all().item() is kept
