"""Golden numbers of prefixes, hints, streams and buffers, with their arithmetic.

One optimizer step, log π = −1 and r = 1 unless said; the deviation of GRPO is the sample's. Each case goes through
``explain``, through the reference, and through the loss in verl's row format (mask 0 on a prefix), cut into
micro-batches in every way, on 1, 2 and 4 ranks.
"""

import math
from typing import NamedTuple

import pytest
from placed_rows import Update
from reference import placed

from verl_hpt.methods import METHODS
from verl_hpt.places.schedule import Schedule
from verl_hpt.places.starts import Start, Uniform, amounts, draw, prefix_length
from verl_hpt.tools.explain import explain


def rollout(reward, own=4, prefix=0, **numbers) -> dict:
    return {"reward": reward, "length": prefix + own, "prefix": prefix, "log_prob": -1.0} | numbers


def demo(length, nll) -> dict:
    return {"length": length, "log_prob": -nll}


def case(method, rollouts=(), stream=(), buffer=(), **hpt) -> dict:
    made = {"hpt": {"method": method, "rl_length_scale": 8} | hpt, "questions": [{"uid": "q", "rollouts": [*rollouts]}]}
    return made | ({"stream": [*stream]} if stream else {}) | ({"buffer": [*buffer]} if buffer else {})


class Golden(NamedTuple):
    """rl, demo: the loss of what rollouts and demonstrations wrote. gradients: of rows, by kind and index."""

    case: dict
    rl: float
    demo: float
    gradients: dict[tuple[str, str, int], list[float]]


def of_question(*gradients) -> dict:
    return {("q", "rollout", i): gradient for i, gradient in enumerate(gradients)}


PLAIN = [rollout(reward, entropy=0.5) for reward in (1, 0, 0)]
OF_PREFIX = [0.1, 0.9, 0.3, 0.2, 0.8]  # nats; the second is the fifth that learns
LAST = {"own": 3, "prefix": 5, "entropy": [*OF_PREFIX, 2.0, 2.0, 2.0]}
THIRD = 1 / 32 / 3  # w_rl = 1/(Q·n·L) = 1/(1·4·8), times a third
STD = math.sqrt(1 / 3) + 1e-6  # of 1, 0, 0, 1
HALF = 0.5 / (math.sqrt(0.5) + 1e-6)  # Â of 1, 0

GOLDEN = {
    # Plain Â 2/3, −1/3, −1/3; the prefix (1 − 1/3)/1 on one token of five, the continuation 1, alone in its start.
    "P1": Golden(
        case("prefix_rft", [*PLAIN, rollout(1, **LAST)]),
        -3 / 32,
        -2 * THIRD,
        of_question([-2 * THIRD] * 4, [THIRD] * 4, [THIRD] * 4, [0, -2 * THIRD, 0, 0, 0, *[-1 / 32] * 3]),
    ),
    # The same with reward 0: the prefix (0 − 1/3), the continuation 0.
    "P2": Golden(
        case("prefix_rft", [*PLAIN, rollout(0, **LAST)]),
        0.0,
        THIRD,
        of_question([-2 * THIRD] * 4, [THIRD] * 4, [THIRD] * 4, [0, THIRD, 0, 0, 0, 0, 0, 0]),
    ),
    # Two share a prefix, k = 2: continuations ±1/2, prefix ±(1/2)/2 on its second token. 20 tokens, w_rl = 0.05.
    "P4": Golden(
        case(
            "prefix_rft",
            [rollout(reward, prefix=prefix, entropy=0.5) for prefix in (0, 2) for reward in (1, 0)],
            normalization="token",
        ),
        0.0,
        0.0,
        of_question([-0.025] * 4, [0.025] * 4, [0, -0.0125, *[-0.025] * 4], [0, 0.0125, *[0.025] * 4]),
    ),
    # All begin with 2 tokens of the hint: Â ±0.866, w_rl = 1/12 own tokens; w_demo = 0.001/8 tokens of hints.
    "U1": Golden(
        case("uft", [rollout(reward, own=3, prefix=2) for reward in (1, 0, 0, 1)]),
        0.0,
        0.001,
        of_question(*([-0.001 / 8] * 2 + [sign * -0.5 / STD / 12] * 3 for sign in (1, -1, -1, 1))),
    ),
    # μ = 0.3. Rollouts: 0.7/8 tokens; the stream: 0.3/10 tokens, NLL 2·2 + 8·1 = 12.
    "S1": Golden(
        case("chord_mu", [rollout(1), rollout(0)], [demo(2, 2.0), demo(8, 1.0)], demo_coef=0.3),
        0.0,
        0.36,
        of_question([-0.7 / 8 * HALF] * 4, [0.7 / 8 * HALF] * 4)
        | {("stream[0]", "demo", 0): [-0.03] * 2, ("stream[1]", "demo", 0): [-0.03] * 8},
    ),
    # φ = p(1 − p) on the stream, under stop-gradient; its value is −φ·log π.
    "S2": Golden(
        case("chord_phi", [rollout(1), rollout(0)], [demo(2, 2.0), demo(8, 1.0)], demo_coef=0.3),
        0.0,
        0.03 * (4 * 0.11701964 + 8 * 0.23254416),
        of_question([-0.7 / 8 * HALF] * 4, [0.7 / 8 * HALF] * 4)
        | {("stream[0]", "demo", 0): [-0.03 * 0.11701964] * 2, ("stream[1]", "demo", 0): [-0.03 * 0.23254416] * 8},
    ),
    # λ = 1, an optimizer step of their own: (4 + 8)/10 tokens; by question the mean of the means 2 and 1.
    "B2": Golden(
        case("relift", [rollout(0), rollout(0)], buffer=[demo(2, 2.0), demo(8, 1.0)]),
        0.0,
        1.2,
        {("buffer[0]", "demo", 0): [-0.1] * 2, ("buffer[1]", "demo", 0): [-0.1] * 8},
    ),
    "B2, token": Golden(
        case("relift", [rollout(0), rollout(0)], buffer=[demo(2, 2.0), demo(8, 1.0)], normalization="token"),
        0.0,
        1.2,
        {("buffer[0]", "demo", 0): [-0.1] * 2, ("buffer[1]", "demo", 0): [-0.1] * 8},
    ),
    "B2, question": Golden(
        case("relift", [rollout(0), rollout(0)], buffer=[demo(2, 2.0), demo(8, 1.0)], normalization="question"),
        0.0,
        1.5,
        {("buffer[0]", "demo", 0): [-1 / 2 / 2] * 2, ("buffer[1]", "demo", 0): [-1 / 8 / 2] * 8},
    ),
    # Hinted rows on the plain prompt, log π −2, old −1: r = e⁻¹. Â 1.499997 learns with r, −0.499999 is clipped below
    # and shows 0.8·Â. w_rl = 1/(4·2); two tokens a row.
    "H1": Golden(
        case(
            "guide",
            [rollout(0, 2), rollout(0, 2)]
            + [rollout(reward, 2, log_prob=-2.0, old_log_prob=-1.0, start="hint") for reward in (1, 0)],
        ),
        (2 * 0.499999 - math.exp(-1) * 1.499997 + 0.8 * 0.499999) * 2 / 8,
        0.0,
        of_question([0.06249988] * 2, [0.06249988] * 2, [-0.06897726] * 2, [0.0] * 2),
    ),
}  # fmt: skip


def check(golden: Golden, loss, gradients) -> None:
    """loss: of all, of what rollouts and of what demonstrations wrote."""
    assert loss == pytest.approx([golden.rl + golden.demo, golden.rl, golden.demo], abs=1e-7)
    for key, gradient in golden.gradients.items():
        assert gradients[key] == pytest.approx(gradient, abs=2e-8), key


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_on_paper(name):
    told = explain(GOLDEN[name].case)
    gradients = {(row["uid"], row["kind"], row["index"]): row["gradient"] for row in told["rows"]}
    check(GOLDEN[name], [told["loss"][part] for part in ("total", "rl", "demo")], gradients)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_of_the_reference(name):
    gradients = placed.gradients(GOLDEN[name].case)
    for key, gradient in GOLDEN[name].gradients.items():
        assert gradients[key] == pytest.approx(gradient, abs=2e-8), key


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_over_every_split_into_micro_batches_and_ranks(name, ranks):
    update = Update(GOLDEN[name].case, ranks)
    assert update.plan.steps == (2 if name.startswith("B2") else 1)
    for outcome in update.every_cut():
        check(GOLDEN[name], outcome.loss, outcome.gradients)


# --- as they stand in the note ----------------------------------------------------------------------------------------


def told(name: str) -> dict:
    return explain(GOLDEN[name].case)


def test_p1_as_written():
    of = told("P1")
    assert of["loss"]["total"] == pytest.approx(-0.11458333, abs=1e-8)
    last = of["rows"][3]
    assert last["weight"] == {"rl": 0.03125, "demo": 0.0}
    assert last["coefficient"]["rl"] == pytest.approx([0, 2 / 3, 0, 0, 0, 1, 1, 1])
    assert last["gradient"] == pytest.approx([0, -0.02083333, 0, 0, 0, *[-0.03125] * 3], abs=1e-8)
    assert [row["advantage"] for row in of["rows"][:3]] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert last["advantage"] == pytest.approx([2 / 3] * 5 + [1] * 3)


def test_p2_as_written():
    of = told("P2")
    assert of["loss"]["total"] == pytest.approx(0.01041667, abs=1e-8)
    assert of["rows"][3]["coefficient"]["rl"] == pytest.approx([0, -1 / 3, 0, 0, 0, 0, 0, 0])


def test_p4_as_written():
    rows = told("P4")["rows"]
    assert [row["weight"]["rl"] for row in rows] == pytest.approx([0.05] * 4)
    assert rows[2]["gradient"] == pytest.approx([0, -0.0125, *[-0.025] * 4], abs=1e-12)
    assert rows[2]["coefficient"]["rl"] == pytest.approx([0, 0.25, *[0.5] * 4])
    assert rows[3]["coefficient"]["rl"] == pytest.approx([0, -0.25, *[-0.5] * 4])


def test_u1_as_written():
    of = told("U1")
    assert of["loss"]["total"] == pytest.approx(0.001, abs=1e-12)
    first = of["rows"][0]
    assert first["weight"] == pytest.approx({"rl": 1 / 12, "demo": 0.000125})
    assert first["gradient"] == pytest.approx([-0.000125] * 2 + [-0.07216866] * 3, abs=1e-8)
    assert first["coefficient"]["rl"][2:] == pytest.approx([0.86602390] * 3, abs=1e-8)


def test_s1_as_written():
    of = told("S1")
    assert of["loss"] == pytest.approx({"rl": 0.0, "demo": 0.36, "total": 0.36}, abs=1e-12)
    assert of["rows"][0]["weight"]["rl"] == pytest.approx(0.0875) and of["rows"][2]["weight"]["demo"] == 0.03
    assert of["rows"][0]["advantage"] == pytest.approx(0.70710578, abs=1e-8)
    assert of["rows"][0]["gradient"] == pytest.approx([-0.06187176] * 4, abs=1e-8)


def test_h1_as_written():
    rows = told("H1")["rows"]
    assert [row["advantage"] for row in rows] == pytest.approx([-0.499999, -0.499999, 1.499997, -0.499999], abs=1e-8)
    of_first = [row["coefficient"]["rl"][0] for row in rows]
    assert of_first == pytest.approx([-0.499999, -0.499999, 0.55181806, 0.0], abs=1e-8)
    assert {row["weight"]["rl"] for row in rows} == {0.125}


def test_s2_the_weights_of_two_probabilities_as_written():
    rows = told("S2")["rows"]
    assert rows[2]["coefficient"]["demo"] == pytest.approx([0.11701964] * 2, abs=1e-8)
    assert rows[3]["coefficient"]["demo"] == pytest.approx([0.23254416] * 8, abs=1e-8)


# --- schedules and draws ----------------------------------------------------------------------------------------------


def test_s2_the_published_schedules_of_mu():
    mu = METHODS["chord_mu"].demo_coef
    assert [mu.at(step) for step in (0, 50, 100, 200)] == pytest.approx([0.9, 0.77552038, 0.475, 0.05], abs=1e-8)
    warmed = Schedule(0.5, 0.02, 400, "cosine", warmup=200)
    assert [warmed.at(step) for step in (100, 200, 400, 600)] == pytest.approx([0.25, 0.5, 0.26, 0.02], abs=1e-12)
    assert METHODS["chord_phi"].demo_coef == 0.1


def test_u2_the_published_schedule_of_uft():
    start = METHODS["uft"].start
    expected = [0.95, 0.81819805, 0.5, 0.05]
    assert [start.share.p.at(step) for step in (0, 75, 150, 300)] == pytest.approx(expected, abs=1e-8)
    keys = [str(i) for i in range(200)]
    assert any(any(amounts(start, 4, seed=0, key=key, step=300)) for key in keys)
    assert not any(any(amounts(start, 4, seed=0, key=key, step=301)) for key in keys)


def test_d1_a_draw_by_value():
    u = draw(0, "12345", 7, 3)
    assert u == pytest.approx(0.14138886, abs=1e-8)
    start = Start(Uniform(0.475, 0.95), rollouts="all")
    assert amounts(start, 4, seed=0, key="12345", step=7)[3] == pytest.approx(0.54215971, abs=1e-8)
    low = METHODS["prefix_rft"].start.share.low
    assert (low.at(0), low.at(150), low.at(300)) == (0.95, pytest.approx(0.475), pytest.approx(0.0))


@pytest.mark.parametrize(
    ("share", "limit", "tokens"), [(0.6, 99, 6), (0.95, 99, 9), (1.0, 99, 9), (0.05, 99, 0), (1.0, 8, 7), (0.95, 8, 7)]
)
def test_d2_tokens_of_a_share_of_ten(share, limit, tokens):
    assert prefix_length(share, Start(share, min_length=1), 10, limit) == tokens
