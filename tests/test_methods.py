"""Every row of the table against its published loss, written out slowly and independently in ``tests/reference``.

Methods whose demonstrations stand elsewhere than beside the rollouts or in their group: test_methods_placed.py.
"""

import copy

import pytest
from reference.cases import random_case
from reference.losses import gradients

from verl_hpt import parts
from verl_hpt.estimator import Estimator, Method, Term
from verl_hpt.methods import METHODS, register_method
from verl_hpt.normalize import NORMALIZATIONS
from verl_hpt.tools.explain import explain

# The reference's names for what the settings call otherwise.
REFERENCE_OPTIONS = {"reinforce": {"baseline": "group"}, "asft": {"kl_cap": 100.0}}


def case_of(method: str, seed: int, *args, **hpt) -> dict:
    """A random case without the questions that two readings of the method treat differently, each named here."""
    hpt.setdefault("clip", {"low": 0.2, "high": 0.28, "c": 3.0})
    # The reference counts a rejected demonstration as solved in the soft table; the published code does not.
    case = random_case(
        seed,
        method,
        *args,
        rejected_demos=method != "hpt_soft",
        options=REFERENCE_OPTIONS.get(method, {}),
        **hpt,
    )
    # REINFORCE with its group's mean as baseline learns nothing from a group of one; ours keeps the reward, as verl.
    # Q counts the questions that train: a method of demonstrations alone leaves out those without one.
    left_out = {"reinforce": ("alone-right", "alone-wrong"), "poft": ("no-demo",)}.get(method, ())
    case["questions"] = [question for question in case["questions"] if question["uid"] not in left_out]
    return case


def ours(case: dict) -> dict:
    """The same case in the words of ``verl-hpt explain``."""
    case = copy.deepcopy(case)
    clip = case["hpt"].pop("clip", {})
    case["hpt"].pop("options", None)
    case["actor"] = {f"clip_ratio_{name}": value for name, value in clip.items()}
    for question in case["questions"]:
        for row in question["rollouts"] + question["demos"]:
            if "model_log_prob" in row:
                row["other_log_prob"] = row.pop("model_log_prob")
    return case


def our_gradients(case: dict) -> dict:
    return {(row["uid"], row["kind"], row["index"]): row["gradient"] for row in explain(ours(case))["rows"]}


def compare(case: dict, tolerance: float = 1e-10) -> None:
    expected, got = gradients(case), our_gradients(case)
    worst = 0.0
    for key, gradient in expected.items():
        mine = got.pop(key, [0.0] * len(gradient))
        worst = max(worst, *(abs(a - b) for a, b in zip(gradient, mine, strict=True)))
        assert worst <= tolerance, f"{key}: expected {gradient}, got {mine}"
    assert not got
    assert any(any(gradient) for gradient in expected.values()), "the case exercises nothing"


BESIDE = [name for name in sorted(METHODS) if METHODS[name].place in ("separate", "group")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", BESIDE)
def test_gradient_of_every_method_equals_autograd_through_its_published_loss(method, seed):
    clip = {"low": 3e-4, "high": 4e-4, "c": 3.0} if method == "gspo" else {"low": 0.2, "high": 0.28, "c": 3.0}
    compare(case_of(method, seed, clip=clip))


WHOLE = [name for name in BESIDE if METHODS[name].rollouts is not None]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("method", WHOLE)
def test_gradient_holds_under_every_normalisation(method, normalization):
    compare(case_of(method, 7, normalization))


@pytest.mark.parametrize("threshold", [-1, 0.25, 0.5, 1.0])
def test_gradient_holds_for_every_gate(threshold):
    compare(case_of("hpt", 3, gate={"threshold": threshold}))


def test_gradient_holds_in_the_off_zone():
    compare(case_of("hpt", 3, gate={"threshold": 0.0, "off": 0.5}))


S = Term("S", Estimator(advantage=parts.unit))
R = Term("R", Estimator(advantage=parts.centered))


@pytest.mark.parametrize(
    ("rollouts", "rest", "says"),
    [
        (Estimator(), {"demos": (S, S), "when": "always"}, r"at most one S and one R term .* got \['S', 'S'\]"),
        (Estimator(), {"when": "gate"}, "terms on demonstrations and when='gate' contradict each other"),
        (Estimator(), {"demos": (S,)}, "terms on demonstrations and when='never' contradict each other"),
        (None, {"demos": (S,), "when": "gate"}, "nothing for rollouts: demonstrations must stand always"),
        (Estimator(), {"demos": (R,), "when": "always"}, "no group to take centered over; its R term needs another"),
        (Estimator(), {"demos": (R,), "when": "gate", "place": "group"}, "a member of the group stands always"),
        (None, {"demos": (R,), "when": "always", "place": "group"}, "a member of the group stands always, beside"),
    ],
)
def test_a_method_that_contradicts_itself_is_refused(rollouts, rest, says):
    with pytest.raises(ValueError, match=f"method 'mine'.*{says}"):
        Method("mine", rollouts, **rest)


def test_a_methods_name_is_taken_once_but_the_same_method_may_come_again():
    assert register_method(METHODS["hpt"]) is METHODS["hpt"]
    with pytest.raises(ValueError, match="method 'hpt' is already registered: choose another name"):
        register_method(Method("hpt", Estimator()))


def test_a_parts_kind_is_one_of_four_and_its_name_is_taken_once():
    with pytest.raises(ValueError, match="one of mask, reference, advantage, likelihood, got 'masks'"):
        parts.part("masks")

    def one(tokens):
        return tokens.ones()

    with pytest.raises(ValueError, match=r"reference 'one' is already registered by verl_hpt\.parts: choose another"):
        parts.part("reference")(one)
    assert parts.PARTS["reference"]["one"] is parts.one
