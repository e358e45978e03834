"""Each part by value on two tokens, and where its ratios stop."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from verl_hpt import parts
from verl_hpt.errors import read
from verl_hpt.estimator import Estimator, Method, Term, evaluate, row_terms
from verl_hpt.gate import RL, GateSettings
from verl_hpt.loss import LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.parts import PARTS, Constants, Tokens
from verl_hpt.plan import Dropped, PlanSettings, Question

C = Constants(clip_low=0.2, clip_high=0.3, clip_c=4.0, shaping=0.25, entropy_weight=0.5, positive_weight=0.1, kl=0.5,
              max_ratio=8.0, otr_beta=0.25, psft_clip=0.5, trust=0.25, uniform=0.5)  # fmt: skip


def tokens(p=(0.5, 0.1), **given) -> Tokens:
    """One row of two tokens with the given probabilities; further columns as numbers in log space."""
    row = {"advantage": [[2.0]], "reward": [[3.0]], "constants": C} | given
    as_tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in row.items() if k not in ("constants", "correct")}
    correct = torch.tensor([[given.get("correct", True)]])
    mask = as_tensors.pop("mask", torch.ones(1, 2)).bool()
    return Tokens(
        torch.tensor([p], dtype=torch.float64).log(), mask, correct=correct, constants=row["constants"], **as_tensors
    )


def logs(*p) -> list[list[float]]:
    return [[math.log(x) for x in p]]


def values(x) -> list[float]:
    return x.expand(1, 2).flatten().tolist()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("current", {}, logs(0.5, 0.1)),
        ("old", {"old_log_prob": logs(0.4, 0.2)}, logs(0.4, 0.2)),
        ("one", {}, [[0.0, 0.0]]),
        ("teacher", {"teacher_log_prob": logs(0.25, 0.001)}, logs(0.25, 0.1 / 8)),  # 100 is capped at 8
        ("clipped_old", {"old_log_prob": logs(0.25, 0.2)}, logs(0.5 / 1.3, 0.1 / 0.8)),  # ratios 2 and 1/2
        ("clipped_old", {"old_log_prob": logs(0.5, 0.1)}, logs(0.5, 0.1)),
        ("sequence_old", {"old_log_prob": logs(0.25, 0.05)}, logs(0.25, 0.05)),  # both ratios 2
        ("sequence_old", {"old_log_prob": logs(0.125, 0.1)}, logs(0.25, 0.05)),  # √(4·1)
        ("trust_region", {}, logs(0.5, 0.25)),
        ("mixture", {"old_log_prob": logs(0.4, 0.2)}, logs((0.75 * 0.4 + 0.125), (0.75 * 0.2 + 0.125))),
    ],
)
def test_references_by_hand(name, given, expected):
    assert values(PARTS["reference"][name](tokens(**given))) == pytest.approx(expected[0], rel=1e-12)


H = [[1.0, 3.0]]  # nats; mean 2


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        *((name, {}, [2, 2]) for name in ("centered", "standardized", "against_others", "gae")),
        ("unit", {}, [1, 1]),
        ("reward", {}, [3, 3]),
        ("calm", {"entropy": H}, [0.5 * math.exp(-2)] * 2),
        ("excited", {"entropy": H}, [0.1 * math.exp(2)] * 2),
        ("excited", {"entropy": H, "correct": False}, [-1, -1]),
        ("excited_tokens", {"entropy": H}, [0.5 * math.e, 0.5 * math.exp(3)]),
        ("centered_excited", {"entropy": H}, [0.2 * math.e, 0.2 * math.exp(3)]),
        ("centered_excited", {"entropy": H, "advantage": [[-2.0]]}, [-2, -2]),
        ("centered_excited", {"entropy": H, "advantage": [[0.0]]}, [0, 0]),
        # m = log √0.05 over both tokens; σ(log a − log b) = a/(a + b)
        ("preference", {"other_log_prob": [[math.log(0.2)]]}, [0.2 / (0.2 + 0.05**0.5)] * 2),
        # Off the mask nothing counts: the mean is the first token's.
        ("preference", {"other_log_prob": [[math.log(0.2)]], "mask": [[1.0, 0.0]]}, [0.2 / 0.7] * 2),
        ("calm", {"entropy": H, "mask": [[1.0, 0.0]]}, [0.5 / math.e] * 2),
        ("calm", {"entropy": H, "mask": [[0.0, 0.0]]}, [0.5, 0.5]),
    ],
)
def test_advantages_by_hand(name, given, expected):
    assert values(PARTS["advantage"][name](tokens(**given))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "given", "over_p", "slope"),
    [
        ("plain", {}, [1, 1], [1, 1]),
        ("shaped", {}, [1 / 0.75, 1 / 0.35], [0.25 / 0.75**2, 0.25 / 0.35**2]),
        ("exploring", {}, [0.5**0.5, 0.9**0.5], [0.5**0.5, 0.9**0.5]),
        ("exploring", {"p": (1.0 + 1e-9, 0.1)}, [0, 0.9**0.5], [0, 0.9**0.5]),  # rounding above 1
        ("expected_match", {}, [0.75, 0.75], [0.75, 0.75]),
        # p + λ(ratio − 1): ratios 1/2, and 9 capped at 8
        ("anchored", {"ref_log_prob": logs(0.25, 0.9)}, [0.5 - 0.25, 0.1 + 3.5], [0.5 - 0.25, 0.1 + 3.5]),
    ],
)
def test_likelihoods_by_hand(name, given, over_p, slope):
    got = PARTS["likelihood"][name](tokens(**given))
    assert [values(x) for x in got] == [pytest.approx(over_p, rel=1e-9), pytest.approx(slope, rel=1e-9)]


UP, DOWN = [[2.0]], [[-2.0]]


@pytest.mark.parametrize(
    ("name", "given", "keep", "bound"),
    [
        ("everywhere", {}, [1, 1], None),
        # Ratios 2 and 1/2 against 0.8 … 1.3, and 4 with Â < 0.
        ("ppo_clip", {"old_log_prob": logs(0.25, 0.2), "advantage": UP}, [0, 1], [1.3, 0.8]),
        ("ppo_clip", {"old_log_prob": logs(0.25, 0.2), "advantage": DOWN}, [1, 0], [1.3, 0.8]),
        ("ppo_clip", {"old_log_prob": logs(0.1, 0.1), "advantage": DOWN}, [0, 1], [4.0, 1.0]),  # 5 and 1
        ("ppo_clip", {"old_log_prob": logs(0.1, 0.1), "advantage": [[0.0]]}, [1, 1], [1.3, 1.0]),
        ("psft_clip", {"old_log_prob": logs(0.25, 0.2)}, [0, 1], [1.5, 0.5]),
        # Ratios 2 and 1/2 have the geometric mean 1; 2 and 2, 2; 1/2 and 1/2, 1/2. No dual clip at 5.
        ("sequence_clip", {"old_log_prob": logs(0.25, 0.2), "advantage": UP}, [1, 1], [1, 1]),
        ("sequence_clip", {"old_log_prob": logs(0.25, 0.05), "advantage": UP}, [0, 0], [1.3, 1.3]),
        ("sequence_clip", {"old_log_prob": logs(0.25, 0.05), "advantage": DOWN}, [1, 1], [1.3, 1.3]),
        ("sequence_clip", {"old_log_prob": logs(0.1, 0.02), "advantage": DOWN}, [1, 1], [1.3, 1.3]),
        ("sequence_clip", {"old_log_prob": logs(1.0, 0.2), "advantage": DOWN}, [0, 0], [0.8, 0.8]),
        ("sequence_clip", {"old_log_prob": logs(1.0, 0.2), "advantage": UP}, [1, 1], [0.8, 0.8]),
        ("correct_only", {}, [1, 1], None),
        ("correct_only", {"correct": False}, [0, 0], None),
    ],
)
def test_masks_by_hand(name, given, keep, bound):
    got, limit = PARTS["mask"][name](tokens(**given))
    assert values(got) == keep
    assert limit is None if bound is None else values(limit) == pytest.approx(bound, rel=1e-12)


def test_ratios_stop_where_verls_do():
    """verl clamps a token's log-ratio at ±20 and a sequence's at 10, from above alone."""
    far = [[math.log(0.5) - 30, math.log(0.1) + 30]]
    assert values(tokens(old_log_prob=far).log_ratio()) == [20, -20]
    assert values(tokens(old_log_prob=far).ratio()) == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-12)
    near = [[math.log(0.5) - 19.5, math.log(0.1) + 19.5]]
    assert values(tokens(old_log_prob=near).log_ratio()) == pytest.approx([19.5, -19.5])
    for shift, ratio in ((30, 10), (9.5, 9.5), (-30, -30)):
        moved = tokens(old_log_prob=[[math.log(0.5) - shift, math.log(0.1) - shift]])
        reference = parts.sequence_old(moved)
        assert values(moved.log_prob - reference) == pytest.approx([ratio, ratio])


def test_what_a_clipped_token_shows_and_what_it_learns():
    """Kept: ratio · Â, with the ratio as coefficient; stopped: bound · Â, coefficient 0; a mask without a bound: 0."""
    row = tokens(old_log_prob=logs(0.25, 0.2))
    clipped = [values(x) for x in evaluate(METHODS["dr_grpo"].rollouts, row)]
    assert clipped == [pytest.approx(x, rel=1e-12) for x in ([0, 1], [2.6, 1], [0, 1])]
    shaped = Estimator(parts.ppo_clip, parts.old, parts.reward, parts.shaped)
    expected = [0, 1.5 * 0.25 / 0.35**2], [1.3 * 3 / 0.75, 1.5 / 0.35], [0, 1]
    assert [values(x) for x in evaluate(shaped, row)] == [pytest.approx(x, rel=1e-12) for x in expected]
    wrong = evaluate(METHODS["raft"].rollouts, tokens(correct=False))
    assert [values(x) for x in wrong] == [[0, 0]] * 3


def test_advantages_over_a_group_by_hand():
    rewards = np.array([1.0, 0.0, 0.0, 3.0])
    std = (np.sum((rewards - 1) ** 2) / 3) ** 0.5
    assert parts.center(rewards).tolist() == [0, -1, -1, 2]
    assert parts.standardize(rewards) == pytest.approx(np.array([0, -1, -1, 2]) / (std + 1e-6), rel=1e-12)
    assert parts.leave_one_out(rewards) == pytest.approx([0, -4 / 3, -4 / 3, 3 - 1 / 3], rel=1e-12)
    lone = np.array([2.0])
    for function, expected in ((parts.center, 2), (parts.standardize, 2 / (1 + 1e-6)), (parts.leave_one_out, 2)):
        got = function(lone)
        assert got.tolist() == pytest.approx([expected], rel=1e-12) and got is not lone
    assert parts.standardize(np.array([1.0, 1.0])).tolist() == [0, 0]


def test_constants_by_value_are_the_papers():
    assert dataclasses.asdict(Constants()) == {
        "clip_low": 0.2, "clip_high": 0.2, "clip_c": 3.0, "shaping": 0.1, "entropy_weight": 0.5, "positive_weight": 0.1,
        "kl": 0.1, "max_ratio": 100.0, "otr_beta": 0.0, "psft_clip": 0.28, "trust": 0.1, "prefix_dropped": 0.8,
        "uniform": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("clip_low", [0, 5], [-1e-9]),
        ("clip_high", [0, 5], [-1e-9]),
        ("clip_c", [1 + 1e-9, 9], [1, 0]),
        ("shaping", [1e-9, 2], [0, -1]),
        ("entropy_weight", [0, 2], [-1e-9]),
        ("positive_weight", [0, 2], [-1e-9]),
        ("kl", [0, 2], [-1e-9]),
        ("max_ratio", [1e-9, 200], [0, -1]),
        ("otr_beta", [-1, 0, 1 - 1e-9], [1, 2]),
        ("psft_clip", [0, 2], [-1e-9]),
        ("trust", [1e-9, 1], [0, -1, 1 + 1e-9]),
        ("prefix_dropped", [0, 1 - 1e-9], [-1e-9, 1]),
        ("uniform", [1e-9, 1], [0, -1, 1 + 1e-9]),
    ],
)
def test_ranges_of_the_constants(name, good, bad):
    assert all(read(Constants, {name: value}, "a")[1] == [] for value in good)
    assert all(read(Constants, {name: value}, "a")[1][0].startswith(f"a.{name}={value!r}: must be") for value in bad)


NEEDS = {
    "old_log_prob": {"ppo_clip", "uncertain_clip", "sequence_clip", "psft_clip", "old", "clipped_old", "sequence_old",
                     "mixture"},
    "ref_log_prob": {"anchored"},
    "entropy": {"calm", "excited", "excited_tokens", "centered_excited", "uncertain_clip"},
    "other_log_prob": {"preference"},
    "teacher_log_prob": {"teacher"},
}  # fmt: skip


def test_what_each_part_needs():
    """What is not asked for is not computed, and its part would fail at the first step."""
    own = [part for kind in PARTS.values() for part in kind.values() if part.__module__ == parts.__name__]
    assert len(own) == 6 + 8 + 13 + 5
    for part in own:
        assert part.needs == {column for column, names in NEEDS.items() if part.part_name in names}, part.part_name
        assert PARTS[part.kind][part.part_name] is part
    over_group = {p.part_name: p.over_group for p in own if p.over_group is not None}
    assert over_group == {
        "centered": parts.center,
        "standardized": parts.standardize,
        "against_others": parts.leave_one_out,
        "centered_excited": parts.center,
    }
    over_starts = {p.part_name: p.over_starts for p in own if p.over_starts is not None}
    assert over_starts == {"against_plain": parts.over_plain}


OF_DEMOS = {
    "srft": {"entropy"},
    "srft_hpt": {"entropy"},
    "srft_code": {"entropy"},
    "asft": {"ref_log_prob"},
    "psft": {"old_log_prob"},
    "rl_plus": {"old_log_prob"},
    "poft": {"other_log_prob"},
    "prefix_rft": {"old_log_prob", "entropy"},
    "g2rpo_a": {"old_log_prob"},
}
CLIPPED = {"ppo", "grpo", "dr_grpo", "cispo", "gspo", "hpt", "hpt_off_on", "hpt_mix_on", "hpt_soft", "luffy",
           "srft_code", "trsft", "superrl", "rl_plus", "prefix_rft", "uft", "stephint", "g2rpo_a", "questa", "pope",
           "guide", "chord_mu", "chord_phi", "amft_style", "relift"}  # fmt: skip


def test_what_each_method_needs_in_all_and_on_its_demonstrations():
    """Columns that demonstrations need take a forward pass of their own."""
    for name, method in METHODS.items():
        of_demos = OF_DEMOS.get(name, set())
        assert method.needs_of_demos == of_demos, name
        assert method.needs == of_demos | ({"old_log_prob"} if name in CLIPPED else set()), name
        assert method.uses_critic is (name == "ppo")
    off = Method("off", Estimator(), (Term("S", Estimator(advantage=parts.unit)),), when="gate",
                 off_zone=Term("R", Estimator(reference=parts.mixture, advantage=parts.reward)))  # fmt: skip
    assert off.needs_of_demos == off.needs == {"old_log_prob"} and off.r_estimator is off.off_zone.estimator


@pytest.mark.parametrize(
    "value",
    [Constants(), RL, GateSettings(), Estimator(), METHODS["hpt"], METHODS["hpt"].demos[0], LossSpec(METHODS["hpt"]),
     PlanSettings(METHODS["hpt"], "question", 1.0), Dropped(0, 0, 0, ""), Question("a", np.ones(1), np.ones(1))],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_all_questions_share_cannot_be_changed(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, getattr(value, name))


def test_a_token_without_an_advantage_is_stopped_by_no_clip():
    """Whatever its ratio: it learns nothing either way, and counts as no clipped token."""
    for name in ("ppo_clip", "sequence_clip"):
        for old in (logs(0.05, 0.01), logs(0.99, 0.99)):  # ratios of 10, and far below 1
            keep, _ = PARTS["mask"][name](tokens(advantage=[[0.0]], old_log_prob=old))
            assert values(keep) == [1.0, 1.0], (name, old)


def test_a_ratio_that_meets_its_bound_exactly_learns():
    bounds = dataclasses.replace(C, clip_high=1.0, clip_low=0.5, clip_c=2.0)
    for old, advantage in ((logs(0.25, 0.05), 1.0), (logs(1.0, 0.2), -1.0)):  # ratios 2 and 1/2
        for name in ("ppo_clip", "sequence_clip"):
            keep, _ = PARTS["mask"][name](tokens(advantage=[[advantage]], old_log_prob=old, constants=bounds))
            assert values(keep) == [1.0, 1.0], (name, advantage)


def test_without_an_s_term_nothing_stands_under_its_weight():
    terms = row_terms(METHODS["grpo"], tokens(old_log_prob=logs(0.5, 0.1)), torch.tensor([[False]]))
    assert not terms.demo.any() and not terms.demo_value.any()
