"""Golden numbers of the five normalisations, with their arithmetic. Loss values through the code that trains.

G1: n = 4, L = 16, γ = 0, λ = 1. q1 has rewards 1,0,0,0 and lengths 4,6,8,2, so Â = 0.75, −0.25 ×3 and
Σ −Â·tokens = −(0.75·4 − 0.25·(6+8+2)) = −3 + 4 = 1; q2 fails, its demonstration has 10 tokens at log π = −0.5, so NLL
5; q3 is solved by all, Â = 0.

    official   1/16 = 0.0625                5/10 = 0.5
    paper      1/4 = 0.25                   5/10 = 0.5
    token      1/(20 + 12) = 0.03125        5/10 = 0.5
    question   1/4/16/3 = 0.00520833        5/10/3 = 0.16666667

G2: two demonstrations, 2 tokens at NLL 2 and 8 at NLL 1: Σ = 12 over 10 tokens = 1.2 (official, token); means 2 and 1:
1.5 over two questions (question), 3 summed (paper).
"""

import json

import numpy as np
import pytest

from verl_hpt.normalize import NORMALIZATIONS, weights
from verl_hpt.tools.explain import explain


def rollouts(rewards, lengths):
    return [{"reward": r, "length": n, "log_prob": -1.0} for r, n in zip(rewards, lengths, strict=True)]


G1 = [
    {"uid": "q1", "rollouts": rollouts([1, 0, 0, 0], [4, 6, 8, 2])},
    {"uid": "q2", "rollouts": rollouts([0] * 4, [5] * 4), "demos": [{"length": 10, "log_prob": -0.5}]},
    {"uid": "q3", "rollouts": rollouts([1] * 4, [3] * 4)},
]
G2 = [
    {"uid": "q1", "rollouts": rollouts([0] * 4, [3] * 4), "demos": [{"length": 2, "log_prob": -2.0}]},
    {"uid": "q2", "rollouts": rollouts([0] * 4, [3] * 4), "demos": [{"length": 8, "log_prob": -1.0}]},
]


def loss(questions, normalization, demo_coef=1.0):
    hpt = {"normalization": normalization, "demo_coef": demo_coef, "rl_length_scale": 16}
    return explain(json.loads(json.dumps({"hpt": hpt, "questions": questions})))["loss"]


@pytest.mark.parametrize(
    ("normalization", "rl", "demo"),
    [
        ("official", 0.0625, 0.5),
        ("paper", 0.25, 0.5),
        ("token", 0.03125, 0.5),
        ("question", 0.25 / 16 / 3, 0.5 / 3),
    ],
)
def test_golden_g1(normalization, rl, demo):
    got = loss(G1, normalization)
    assert got == pytest.approx({"rl": rl, "demo": demo, "total": rl + demo}, abs=1e-9)


def test_golden_g1_demo_coefficient_scales_the_sft_term_alone():
    assert loss(G1, "official", 0.3)["total"] == pytest.approx(0.2125, abs=1e-9)


def test_golden_g1_sequence_divides_each_rollout_by_its_own_length():
    """Σ −Â over rows: −(0.75 − 0.25·3) = 0 on q1, since ratio 1 gives each row its Â."""
    assert loss(G1, "sequence") == pytest.approx({"rl": 0.0, "demo": 0.5 / 3, "total": 0.5 / 3}, abs=1e-9)


@pytest.mark.parametrize(
    ("normalization", "total"), [("official", 1.2), ("token", 1.2), ("question", 1.5), ("paper", 3.0)]
)
def test_golden_g2(normalization, total):
    assert loss(G2, normalization)["total"] == pytest.approx(total, abs=1e-9)


def test_strength_of_a_demo_token_against_a_rollout_token_is_as_designed():
    """Q 64, n 8, L 8192, demonstrations of 4200 tokens, rollouts of 1000, half the questions on demonstrations."""
    questions = [
        {
            "uid": str(q),
            "rollouts": rollouts([q % 2, 0, 0, 0, 0, 0, 0, 0], [1000] * 8),
            "demos": [{"length": 4200, "log_prob": -1.0}],
        }
        for q in range(64)
    ]

    def strength(normalization):
        hpt = {"normalization": normalization, "demo_coef": 1.0, "rl_length_scale": 8192}
        rows = explain({"hpt": hpt, "questions": questions})["rows"]
        demo = next(row["weight"]["demo"] for row in rows if row["kind"] == "demo")
        return demo / next(row["weight"]["rl"] for row in rows if row["kind"] == "rollout")

    assert strength("official") == pytest.approx(0.061, abs=0.001)
    assert strength("token") == pytest.approx(1.9, abs=0.01)
    assert strength("question") == pytest.approx(15.6, abs=0.01)


def test_an_unknown_normalisation_is_named_with_the_choices():
    row = np.ones(1)
    with pytest.raises(ValueError, match="unknown normalization 'mean'; one of question, sequence, token, paper"):
        weights("mean", row, row, row, row, length_scale=16, demo_coef=1)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_a_step_without_rows_has_no_weights(name):
    none = np.zeros(0)
    of_rl, of_demos = weights(name, none, none, none, none, length_scale=16, demo_coef=1)
    assert of_rl.shape == of_demos.shape == (0,)


def test_weights_of_every_normalisation_by_hand():
    """Question 3: two rollouts and a demonstration with both terms; 5: two demonstrations; 9: a rollout at half share.

    Tokens 4, 0, 10 | 2, 8 | 5; an empty row's length counts as 1. L 16, λ 0.3; RL tokens 19, demonstrations' 20.
    """
    question, tokens = np.array([3, 3, 3, 5, 5, 9]), np.array([4, 0, 10, 2, 8, 5])
    rl, demo = np.array([1, 1, 1, 0, 0, 0.5]), np.array([0, 0, 0.1, 1, 1, 0])
    third, expected = 1 / 3, {}
    of_rl = np.array([third, third, third, 0, 0, 0.5])  # 1/n_q times the share
    of_demos = 0.3 * np.array([0, 0, 0.1 / 10, 0.5 / 2, 0.5 / 8, 0])  # λ/k_q/|τ| times the share
    by_tokens = 0.3 * np.array([0, 0, 0.1, 1, 1, 0]) / 20
    expected["question"] = of_rl / 3 / 16, of_demos / 3
    expected["sequence"] = of_rl / 3 / np.array([4, 1, 10, 2, 8, 5]), of_demos / 3
    expected["token"] = rl / 19, by_tokens
    expected["paper"] = of_rl, of_demos
    expected["official"] = rl / 16, by_tokens
    for name in NORMALIZATIONS:
        got = weights(name, question, tokens, rl, demo, length_scale=16.0, demo_coef=0.3)
        for ours, by_hand in zip(got, expected[name], strict=True):
            assert ours == pytest.approx(by_hand, rel=1e-12), name


def test_a_step_whose_rows_have_no_token_has_finite_weights():
    one = np.ones(1)
    for name in NORMALIZATIONS:
        got = weights(name, one, np.zeros(1), one, one, length_scale=16.0, demo_coef=1.0)
        assert [x.tolist() for x in got] == [[1 / 16 if name in ("question", "official") else 1.0], [1.0]]
