"""Parts and terms of rows that begin with a demonstration, by value."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from verl_hpt import parts
from verl_hpt.estimator import Estimator, Method, Term, row_terms
from verl_hpt.methods import METHODS
from verl_hpt.parts import ON_DEMAND, Constants, Tokens
from verl_hpt.places.starts import Start

ROLLOUT = torch.tensor([[False]])


def tokens(log_prob, prefix=0, dtype=torch.float64, **columns) -> Tokens:
    """One row; columns: a number for every token, or a list."""
    new = torch.tensor([log_prob], dtype=dtype)
    given = {"advantage": 1.0, "reward": 1.0, "old_log_prob": log_prob} | columns
    of_tokens = {name: torch.as_tensor(value, dtype=dtype).expand(1, len(log_prob)) for name, value in given.items()}
    return Tokens(
        new,
        torch.ones_like(new, dtype=torch.bool),
        correct=torch.tensor([[True]]),
        prefix=torch.arange(len(log_prob))[None] < prefix,
        **of_tokens,
    )


# --- uncertain_clip ---------------------------------------------------------------------------------------------------


def kept(prefix, entropy, dropped=0.8, **columns) -> list[int]:
    row = tokens([-1.0] * len(entropy), prefix, entropy=entropy, **columns)
    row.constants = Constants(prefix_dropped=dropped)
    return parts.uncertain_clip(row)[0][0].int().tolist()


def test_of_a_prefix_the_most_uncertain_tokens_learn():
    assert kept(5, [0.1, 0.9, 0.3, 0.2, 0.8, 0.0, 9.0]) == [0, 1, 0, 0, 0, 1, 1]
    assert kept(5, [0.1, 0.9, 0.3, 0.2, 0.8], 0.5) == [0, 1, 1, 0, 1]
    assert kept(5, [0.1, 0.9, 0.3, 0.2, 0.8], 0.0) == [1] * 5 and kept(0, [0.1, 0.2]) == [1, 1]
    assert kept(1, [0.0, 1.0]) == [1, 1], "⌊0.8·1⌋ = 0"


def test_what_is_dropped_shows_nothing_in_the_loss():
    _, bound = parts.uncertain_clip(tokens([-1.0] * 6, 5, entropy=[0.1, 0.9, 0.3, 0.2, 0.8, 0.0]))
    assert bound[0].tolist() == [0, 1, 0, 0, 0, 1]


def test_of_equal_entropies_the_earlier_token_is_dropped():
    assert kept(5, [0.5] * 7) == [0, 0, 0, 0, 1, 1, 1] and kept(2, [0.0, 0.0]) == [0, 1]
    assert kept(4, [0.7, 0.5, 0.7, 0.5], 0.75) == [0, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropped", [0.8, 0.9, 0.7, 0.29, 1 / 3])
def test_the_number_that_is_dropped_is_exact_for_long_prefixes(dtype, dropped):
    for length in (*range(1, 40), 100, 1000, 4095, 8190, 16380):
        row = tokens([-1.0] * (length + 1), length, dtype, entropy=0.5)
        row.constants = Constants(prefix_dropped=dropped)
        learns = int(parts.uncertain_clip(row)[0].sum()) - 1
        assert length - learns == math.floor(dropped * length + 1e-6), length


def test_ppos_clip_holds_on_what_is_left_and_on_own_tokens():
    old = [-1.0, -1.0, -1.0 - math.log(1.3), -1.0, -1.0 - math.log(1.3)]
    assert kept(3, [0.1, 0.2, 0.3, 0.0, 0.0], 0.4, old_log_prob=old) == [0, 1, 0, 1, 0]
    assert kept(3, [0.1, 0.2, 0.3, 0.0, 0.0], 0.4, old_log_prob=old, advantage=-1.0) == [0, 1, 1, 1, 1]


def test_without_prefixes_it_is_ppos_clip():
    row = dataclasses.replace(tokens([-1.0, -2.0], entropy=0.5, old_log_prob=[-1.5, -1.5]), prefix=None)
    for ours, theirs in zip(parts.uncertain_clip(row), parts.ppo_clip(row), strict=True):
        assert ours.tolist() == theirs.tolist()


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "starts", "expected"),
    [
        ([1, 0, 0, 1], [0, 0, 0, 5], [0, 0, 0, 2 / 3]),
        ([1, 0, 1, 0], [0, 0, 2, 2], [0, 0, 0.25, -0.25]),
        ([1, 0, 1, 0, 1], [0, 0, 2, 2, 3], [0, 0, 0.25, -0.25, 0.5]),
        ([1, 0.5], [4, 4], [0.5, 0.25]),  # the mean of none is 0
        ([1, 0.5], [4, 3], [1, 0.5]),
        ([1, 0], [0, 0], [0, 0]),
        ([], [], []),
    ],
)
def test_the_advantage_against_plain_rollouts(rewards, starts, expected):
    given = np.array(rewards, dtype=float)
    assert parts.over_plain(given, np.array(starts)).tolist() == pytest.approx(expected)
    assert given.tolist() == rewards, "what was given is left as it was"


def test_doubt_over_the_reference_one_weighs_p_times_one_minus_p():
    estimator = METHODS["chord_phi"].s_estimator
    method = Method("mine", METHODS["grpo"].rollouts, (Term("S", estimator),), place="stream", when="always")
    row = dataclasses.replace(tokens([math.log(p) for p in (0.5, 0.1, 1.0)]), prefix=None)
    terms = row_terms(method, row, torch.tensor([[True]]))
    assert terms.demo[0].tolist() == pytest.approx([0.25, 0.09, 0.0])
    assert terms.demo_value[0].tolist() == pytest.approx([0.25 * math.log(0.5), 0.09 * math.log(0.1), 0.0])


# --- terms ------------------------------------------------------------------------------------------------------------


def prefix_method(rollouts, *demos) -> Method:
    return Method("mine", rollouts, demos, place="prefix", when="always" if demos else "never")


def test_each_terms_tokens_of_a_row():
    """r = 1 and Â = 1: an R term's coefficient is p over the reference one, an S term's 1, a rollout's 1."""
    r, s = Term("R", Estimator(reference=parts.one, advantage=parts.unit)), Term("S", Estimator(advantage=parts.unit))
    p = [0.5, 0.25, 0.5, 0.125]
    row, whole = tokens([math.log(x) for x in p], 2), tokens([math.log(x) for x in p], 0)
    grpo = METHODS["grpo"].rollouts

    def terms(*demos, of=row, is_demo=ROLLOUT):
        made = row_terms(prefix_method(grpo, *demos), of, is_demo)
        return [x[0].tolist() for x in (made.rl, made.demo, made.keep)]

    ones = [1.0] * 4
    assert terms(r) == [pytest.approx([0.5, 0.25, 1, 1]), [0] * 4, ones]
    assert terms(s) == [[0, 0, 1, 1], [1, 1, 0, 0], ones]
    assert terms(s, r) == [pytest.approx([0.5, 0.25, 1, 1]), [1, 1, 0, 0], ones]
    assert terms() == [[0, 0, 1, 1], [0] * 4, ones], "frozen"
    assert terms(s, r, of=whole) == [ones, ones, ones], "a row without a prefix imitates as a whole, if it does"
    assert terms(r, of=whole, is_demo=~ROLLOUT) == [pytest.approx(p), [0] * 4, ones]


def test_means_of_a_rollout_are_over_its_own_tokens_and_those_of_a_demonstration_over_the_prefix():
    """Else GSPO's ratio, SRFT's H̄ and POFT's m would take in both."""
    entropy, new, old = [2.0, 4.0, 0.5, 1.5], [-1.0, -1.0, -2.0, -1.0], [-3.0, -3.0, -2.1, -1.1]
    row = tokens(new, 2, entropy=entropy, old_log_prob=old, other_log_prob=-0.5)
    gspo = METHODS["gspo"].rollouts
    calm, preference = (Term("S", Estimator(advantage=one)) for one in (parts.calm, parts.preference))
    terms = row_terms(prefix_method(gspo, calm), row, ROLLOUT)
    assert terms.demo[0].tolist() == pytest.approx([0.5 * math.exp(-3)] * 2 + [0, 0])
    assert terms.rl[0].tolist() == pytest.approx([0, 0] + [math.exp(0.1)] * 2)
    terms = row_terms(prefix_method(Estimator(advantage=parts.excited), preference), row, ROLLOUT)
    assert terms.rl[0].tolist() == pytest.approx([0, 0] + [0.1 * math.exp(1.0)] * 2)
    sigma = 1 / (1 + math.exp(-(-0.5 - (-1.0))))
    assert terms.demo[0].tolist() == pytest.approx([sigma] * 2 + [0, 0])


def test_what_says_where_tokens_stand_is_no_column_on_demand():
    assert not {"prefix", "averaged", "constants"} & set(ON_DEMAND) and "entropy" in ON_DEMAND


# --- methods that contradict themselves -------------------------------------------------------------------------------

GRPO = METHODS["grpo"].rollouts
S, R = Term("S", Estimator(advantage=parts.unit)), Term("R", Estimator(advantage=parts.unit))
AGAINST = Term("R", Estimator(parts.ppo_clip, parts.old, parts.against_plain))
BESIDE = r"it takes one S term, when='always' for a stream and when='gate' for a buffer"
WHEREVER = r"a prefix learns wherever it stands \(when='always'\), and its R term has scale 1"


@pytest.mark.parametrize(
    ("rollouts", "rest", "says"),
    [
        (None, {"demos": (S,), "when": "always", "place": "prefix"}, "has nothing for those"),
        (None, {"demos": (S,), "when": "always", "place": "stream"}, "stand with rollouts, and it has nothing for"),
        (GRPO, {"demos": (AGAINST,), "when": "always"}, "against_plain is the advantage of a prefix's R term alone"),
        (GRPO, {"demos": (Term("S", AGAINST.estimator),), "when": "always", "place": "prefix"},
         "against_plain is the advantage of a prefix's R term alone"),
        (AGAINST.estimator, {"demos": (S,), "when": "always", "place": "prefix"}, "of a prefix's R term alone"),
        (AGAINST.estimator, {"place": "hint"}, "against_plain is the advantage of a prefix's R term alone"),
        (GRPO, {"demos": (S,), "when": "gate", "place": "prefix"}, WHEREVER),
        (GRPO, {"demos": (Term("R", Estimator(), 0.5),), "when": "always", "place": "prefix"}, WHEREVER),
        (GRPO, {"demos": (S,), "when": "always", "place": "hint"}, "no token of a hint learns"),
        (GRPO, {"place": "stream"}, BESIDE),
        (GRPO, {"demos": (S,), "when": "gate", "place": "stream"}, BESIDE),
        (GRPO, {"demos": (S,), "when": "always", "place": "buffer"}, BESIDE),
        (GRPO, {"demos": (S, R), "when": "always", "place": "stream"}, BESIDE),
        (GRPO, {"demos": (R,), "when": "gate", "place": "buffer"}, BESIDE),
        (GRPO, {"place": "prefix", "rescored": True}, "only hints are rescored, and only a stream's weights"),
        (GRPO, {"place": "hint", "convex": True}, "only hints are rescored, and only a stream's weights are convex"),
        (GRPO, {"demos": (S,), "when": "gate", "place": "buffer", "start": Start(0.5)}, "place 'prefix' or 'hint'"),
        (GRPO, {"start": Start(0.5)}, "start says how rollouts start from demonstrations"),
    ],
)  # fmt: skip
def test_a_method_whose_place_contradicts_it_is_refused(rollouts, rest, says):
    with pytest.raises(ValueError, match=rf"method 'mine' \(place='{rest.get('place', 'separate')}'\): .*{says}"):
        Method("mine", rollouts, **rest)


def test_methods_of_every_place_can_be_made():
    for place, rest in (
        ("prefix", {"demos": (S, R), "when": "always", "start": Start(0.5), "baseline": "group"}),
        ("prefix", {}),
        ("hint", {"rescored": True, "start": Start(0.5)}),
        ("stream", {"demos": (Term("S", S.estimator, 0.5),), "when": "always", "convex": True}),
        ("buffer", {"demos": (S,), "when": "gate"}),
    ):
        assert Method("mine", GRPO, place=place, **rest).place == place


def test_which_methods_read_their_questions_demonstrations():
    assert {name for name in METHODS if METHODS[name].place != "separate" and not METHODS[name].reads_demos} == {
        "chord_mu", "chord_phi", "amft_style"
    }  # fmt: skip
    assert not METHODS["grpo"].reads_demos and METHODS["stephint"].reads_demos and METHODS["hpt"].reads_demos
