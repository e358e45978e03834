"""Every number that the loss sends, recomputed by hand: loops over rows and tokens, plain Python floats."""

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine.batches import Content, announce, contents, jagged, model_output, row_batch, whole
from verl.trainer.ppo.core_algos import kl_penalty

from verl_hpt import parts
from verl_hpt.estimator import Estimator, Method, Term
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import ROW_FIELD, LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.metrics import HISTOGRAMS, SUMS, histogram
from verl_hpt.parts import Constants
from verl_hpt.plan import DEMO, PADDING, ROLLOUT

NAN = float("nan")
CONSTANTS = Constants(clip_low=0.3, clip_high=0.25, clip_c=2.0, shaping=0.2, psft_clip=0.4)
# Clips on rollouts, on the R term and on the S term, each in its own way.
METHOD = Method(
    "clipped_everywhere",
    Estimator(parts.ppo_clip, parts.old),
    (
        Term("S", Estimator(parts.psft_clip, parts.old, parts.unit)),
        Term("R", Estimator(parts.ppo_clip, parts.old, parts.reward, parts.shaped)),
    ),
    when="gate",
)
FIELDS = ("response_mask", "old_log_probs", "ref_log_prob", "rollout_is_weights", ROW_FIELD)


@dataclass
class Row:
    """One row's numbers, and its tokens' by position. prefix: tokens of a demonstration that it begins with."""

    kind: int
    w_rl: float
    w_demo: float
    w_entropy: float = 0.0
    advantage: float = 0.0
    reward: float = 0.0
    prefix: int = 0
    demo_advantage: float = NAN
    mask: list = field(default_factory=list)
    new: list = field(default_factory=list)
    old: list = field(default_factory=list)
    ref: list = field(default_factory=list)
    is_weight: list = field(default_factory=list)
    entropy: list = field(default_factory=list)
    weight: list = field(default_factory=list)
    critic: list = field(default_factory=list)


def rows_of_a_step(seed=0):
    """Rollouts and demonstrations under every pair of weights; what stands off the mask is no number."""
    draw = random.Random(seed)
    rows = [
        Row(ROLLOUT, 0.25, 0.0, 0.5, advantage=1.0, reward=1.0),
        Row(ROLLOUT, 0.125, 0.0, 0.25, advantage=-0.5),
        Row(ROLLOUT, 0.0, 0.375),  # imitates itself (S³FT)
        Row(DEMO, 0.5, 0.25, advantage=9.0, reward=2.0),
        Row(DEMO, 0.25, 0.0, advantage=9.0, reward=-1.0),
        Row(DEMO, 0.0, 0.75, advantage=9.0, reward=1.0),
        Row(DEMO, 0.0, 0.0, advantage=9.0, reward=1.0),  # λ is 0 at this step
    ]
    for row in rows:
        row.mask = [1] + [int(draw.random() > 0.2) for _ in range(draw.randint(8, 14))]
        for mask in row.mask:
            old = draw.uniform(-3.5, -0.2)
            numbers = {
                "old": old,
                "new": min(old + draw.gauss(0, 0.7), -0.01),
                "ref": old + draw.uniform(-0.5, 0.5),
                "entropy": draw.uniform(0.1, 2.0),
                "is_weight": draw.uniform(0.5, 2.0) if row.kind == ROLLOUT else 7.0,
                "weight": 1.0 if row.kind == ROLLOUT else draw.uniform(0.5, 2.0),
            }
            for name, number in numbers.items():
                getattr(row, name).append(number if mask else NAN)
    return rows


ROWS = rows_of_a_step()


def sent(rows=ROWS, method=METHOD, fields=FIELDS, dp_size=1, **settings):
    """-> loss, gradients on log-probs and on entropies by row and token, metrics by name."""
    content = {
        (n, row.kind, 0): Content([1, 2, 3], [5] * len(row.mask), row.mask, row.old, row.ref)
        for n, row in enumerate(rows)
    }
    columns = ("kind", "w_rl", "w_demo", "w_entropy", "advantage", "reward", "prefix", "demo_advantage")
    plan = SimpleNamespace(
        question=np.arange(len(rows)),
        index=np.zeros(len(rows), int),
        correct=np.array([row.reward >= 1 for row in rows]),
        **{name: np.array([getattr(row, name) for row in rows]) for name in columns},
    )
    layout = np.array([PADDING, *range(len(rows)), PADDING])
    case = SimpleNamespace(content=content, other={})
    batch = announce(row_batch(case, plan, layout, torch.float64, ref=True), dp_size=dp_size)
    nothing = Row(DEMO, 0.0, 0.0, mask=[0], new=[NAN], entropy=[NAN], is_weight=[NAN], weight=[NAN])
    there = [nothing, *rows, nothing]
    batch["rollout_is_weights"] = jagged([torch.tensor(row.is_weight, dtype=torch.float64) for row in there])
    batch["hpt_token_weights"] = jagged([torch.tensor(row.weight, dtype=torch.float64) for row in there])
    if "advantages" in fields:
        batch["advantages"] = jagged([torch.tensor(row.critic or [NAN], dtype=torch.float64) for row in there])
    of = contents(case, plan, layout)
    leaves = [whole(of, [getattr(row, name) for row in there], torch.float64, NAN) for name in ("new", "entropy")]
    leaves = [x.requires_grad_() for x in leaves]
    spec = LossSpec(method, CONSTANTS, fields, kl_penalty=kl_penalty, kl_type="mse", **settings)
    loss, metrics = hpt_loss(model_output(batch, *leaves), batch, spec=spec)
    loss.backward()
    gradients = []
    for leaf in leaves:
        parts = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).split(
            [len(c.prompt + c.answer) for c in of]
        )
        gradients.append([x[len(c.prompt) - 1 : -1].tolist() for x, c in zip(parts, of, strict=True)][1:-1])
    return loss.item(), gradients, {name: metric.aggregate() for name, metric in metrics.items()}


def tally(sums, kind, value, gradient, new):
    """What every token adds, under its author's kind."""
    sums[f"loss_{kind}"] += value
    sums[f"strength_{kind}"] += abs(gradient)
    sums["strength_all"] += abs(gradient)
    sums[f"tokens_{kind}"] += 1
    sums[f"nll_{kind}"] -= new


def tally_rl(sums, kind, stopped, log_ratio):
    """What a token of the RL sum adds beside."""
    sums[f"clipped_{kind}"] += stopped
    sums[f"rl_tokens_{kind}"] += 1
    sums[f"approx_kl_{kind}"] += log_ratio


def tally_taught(sums, p, coefficient):
    """What a token that a demonstration teaches adds beside."""
    sums[f"demo_p_{bin_of(p, PROBABILITIES)}"] += 1
    sums[f"demo_w_{bin_of(abs(coefficient), WEIGHTS)}"] += 1


def by_hand(rows=ROWS, token_weights=False, is_weights=True, entropy_coeff=0.0, kl_coef=0.0):
    """The same, from the formulas. -> loss, gradients, Counter by name, and which clips fired how often"""
    c, sums, fired = CONSTANTS, Counter(), Counter()
    loss, on_log_prob, on_entropy = 0.0, [], []
    for row in rows:
        kind = "demos" if row.kind == DEMO else "rollouts"
        gradient, of_entropy = [0.0] * len(row.mask), [0.0] * len(row.mask)
        for t in (t for t, mask in enumerate(row.mask) if mask):
            new, old, p = row.new[t], row.old[t], math.exp(row.new[t])
            r = math.exp(new - old)
            advantage = row.reward if row.kind == DEMO else row.advantage  # the R term's is the reward
            up, down = advantage > 0 and r > 1 + c.clip_high, advantage < 0 and r < 1 - c.clip_low
            dual = advantage < 0 and r > c.clip_c
            clipped = up or down or dual
            shown = c.clip_c if dual else 1 + c.clip_high if up else 1 - c.clip_low if down else r
            f, slope = (1 / (p + c.shaping), c.shaping / (p + c.shaping) ** 2) if row.kind == DEMO else (1, 1)
            rl, rl_value = (0.0 if clipped else r * advantage * slope), shown * advantage * f
            stopped = r > 1 + c.psft_clip
            s = 0.0 if stopped else r

            weight = row.weight[t] if token_weights else 1.0
            w_rl, w_demo = row.w_rl * weight, row.w_demo * weight
            if is_weights and row.kind == ROLLOUT:
                w_rl *= row.is_weight[t]
            gradient[t] = -(w_rl * rl + w_demo * s)
            value = -(w_rl * rl_value + w_demo * s * new)
            loss += value
            tally(sums, kind, value, gradient[t], new)
            if row.w_rl:
                tally_rl(sums, kind, clipped, old - new)
                fired.update({(kind, "up"): up, (kind, "down"): down, (kind, "dual"): dual})
            if row.kind == DEMO and row.w_demo:
                sums["clipped_demos"] += stopped
                fired[kind, "stopped"] += stopped
            if row.kind == DEMO and (row.w_rl or row.w_demo):
                tally_taught(sums, p, s if row.w_demo else rl)
            if entropy_coeff:
                sums["entropy_bonus"] += row.w_entropy * row.entropy[t]
                of_entropy[t] = -entropy_coeff * row.w_entropy
            if kl_coef and row.kind == ROLLOUT:
                sums["kl_loss"] += w_rl * 0.5 * (new - row.ref[t]) ** 2
                gradient[t] += kl_coef * w_rl * (new - row.ref[t])
        on_log_prob.append(gradient)
        on_entropy.append(of_entropy)
    loss += kl_coef * sums["kl_loss"] - entropy_coeff * sums["entropy_bonus"]
    return loss, [on_log_prob, on_entropy], sums, fired


PROBABILITIES = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9,
                 0.95, 1]  # fmt: skip
# From a thousandth to a hundred by the fourth root of ten, a narrow bin around plain imitation's 1, two wide ones.
WEIGHTS = [0, 1e-3, 1.778279e-3, 3.162278e-3, 5.623413e-3, 1e-2, 1.778279e-2, 3.162278e-2, 5.623413e-2, 0.1, 0.1778279,
           0.3162278, 0.5623413, 0.999, 1.001, 1.778279, 3.162278, 5.623413, 10, 17.78279, 31.62278, 56.23413, 100,
           1000, 10000, math.inf]  # fmt: skip


def bin_of(x, edges):
    """Number of the bin that x lies in; an edge belongs to the bin below it."""
    return next(i for i in range(len(edges) - 1) if x <= edges[i + 1])


def test_edges_of_the_histograms():
    assert pytest.approx(PROBABILITIES) == HISTOGRAMS["demo_p"]
    assert pytest.approx(WEIGHTS, rel=1e-6) == HISTOGRAMS["demo_w"]
    assert [name for name in SUMS if name.startswith("demo_p_")] == [f"demo_p_{i}" for i in range(20)]
    assert [name for name in SUMS if name.startswith("demo_w_")] == [f"demo_w_{i}" for i in range(25)]


@pytest.mark.parametrize("edges", HISTOGRAMS.values(), ids=list(HISTOGRAMS))
def test_a_number_falls_into_the_bin_whose_upper_edge_it_does_not_exceed(edges):
    """Whatever lies on the lowest edge or beyond the highest is counted too."""
    numbers = [x + d for x in edges if math.isfinite(x) for d in (-1e-5, 0.0, 1e-5) if 0 <= x + d <= edges[-1]]
    expected = np.bincount([bin_of(x, edges) for x in numbers], minlength=len(edges) - 1)

    def counts(numbers, dtype=torch.float32):
        x = torch.tensor(numbers, dtype=dtype)
        return histogram(x, edges, torch.ones_like(x)).tolist()

    assert counts(numbers, torch.float64) == expected.tolist()
    assert counts([0.0]) == [1] + [0] * (len(edges) - 2)
    assert counts([1e9]) == [0] * (len(edges) - 2) + [1]
    assert counts([]) == [0] * (len(edges) - 1)
    weighted = histogram(torch.tensor([[0.0, 1e9], [0.0, 0.0]]), edges, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert weighted.tolist() == [2] + [0] * (len(edges) - 3) + [1]


def test_the_batch_meets_every_branch():
    *_, sums, fired = by_hand()
    assert min(fired[kind, side] for kind in ("rollouts", "demos") for side in ("up", "down", "dual")) > 0
    assert fired["demos", "stopped"] > 0
    assert sum(name.startswith("demo_p_") for name in sums) > 5 < sum(name.startswith("demo_w_") for name in sums)
    assert any(mask == 0 for row in ROWS for mask in row.mask)


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("is_weights", [True, False])
@pytest.mark.parametrize("token_weights", [True, False])
@pytest.mark.parametrize(
    "extra", [{}, {"entropy_coeff": 0.25}, {"kl_coef": 0.5}, {"entropy_coeff": 0.25, "kl_coef": 0.5}]
)
def test_loss_gradient_and_every_sum_by_hand(dp_size, is_weights, token_weights, extra):
    fields = tuple(x for x in FIELDS if is_weights or x != "rollout_is_weights")
    fields = (*fields, "hpt_token_weights") if token_weights else fields
    loss, gradients, metrics = sent(fields=fields, dp_size=dp_size, **extra)
    expected_loss, expected_gradients, sums, _ = by_hand(token_weights=token_weights, is_weights=is_weights, **extra)
    names = [
        *SUMS,
        *(["entropy_bonus"] if "entropy_coeff" in extra else []),
        *(["kl_loss"] if "kl_coef" in extra else []),
    ]
    assert list(metrics) == [f"hpt/{name}" for name in names]
    assert loss == pytest.approx(dp_size * expected_loss, rel=1e-6)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        for row, by_token in zip(ours, expected, strict=True):
            assert row == pytest.approx([dp_size * x for x in by_token], rel=1e-6, abs=1e-12)
    assert metrics == pytest.approx({f"hpt/{name}": dp_size * sums[name] for name in names}, rel=1e-6, abs=1e-12)


def test_without_an_s_term_only_the_r_term_clips_demonstrations():
    """No estimator stands under w_demo: its coefficient of 0 on every token is no mask."""
    rows = [row for row in ROWS if not row.w_demo]
    method = Method("r_alone", METHOD.rollouts, (METHOD.term("R"),), when="gate")
    *_, metrics = sent(rows, method)
    *_, sums, fired = by_hand(rows)
    assert metrics["hpt/clipped_demos"] == sums["clipped_demos"] == fired["demos", "down"] + fired["demos", "dual"] > 0


def test_a_batch_of_rollouts_alone_sends_every_sum():
    """Every micro-batch sends the same names, so that verl can add them up over ranks."""
    rows = ROWS[:2]
    _, _, metrics = sent(rows)
    *_, sums, _ = by_hand(rows)
    assert metrics == pytest.approx({f"hpt/{name}": float(sums[name]) for name in SUMS}, rel=1e-6)
    assert not any(value for name, value in metrics.items() if "demo" in name), "and none of a demonstration"


# --- what is missing ------------------------------------------------------------------------------------------------


PRESENT = {"response_mask": 1, "input_ids": 1}
OUTPUT = {"log_probs": torch.nested.as_nested_tensor([torch.zeros(4)], layout=torch.jagged)}


def refusal(monkeypatch, output, **settings) -> str:
    monkeypatch.setattr("verl_hpt.host.loss_fn.no_padding_2_padding", lambda values, data: values)
    with pytest.raises(KeyError) as error:
        hpt_loss(output, PRESENT, spec=LossSpec(**settings))
    return error.value.args[0]


@pytest.mark.parametrize(
    ("entropy", "settings", "named"),
    [
        (None, {}, "old_log_probs, hpt_row"),  # no entropy, and none wanted
        (OUTPUT["log_probs"], {"entropy_coeff": 0.1}, "old_log_probs, hpt_row"),  # wanted and there
        (None, {"entropy_coeff": 0.1}, "old_log_probs, hpt_row, entropy"),
        (None, {"method": METHODS["srft"]}, "old_log_probs, hpt_row, entropy"),
        (None, {"entropy_coeff": 0.1, "fields": ("response_mask",)}, "entropy"),
        (None, {"entropy_coeff": -0.1, "fields": ("response_mask",)}, "entropy"),
    ],
)
def test_exactly_what_is_missing_is_named(monkeypatch, entropy, settings, named):
    output = OUTPUT if entropy is None else OUTPUT | {"entropy": entropy}
    assert refusal(monkeypatch, output, **({"method": METHOD} | settings)) == (
        f"the actor update lacks the field(s) {named}; it has input_ids, response_mask"
    )
