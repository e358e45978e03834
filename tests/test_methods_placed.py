"""Methods whose demonstrations stand elsewhere, against their losses in ``tests/reference/placed.py``."""

import math
from collections import Counter

import pytest
from placed_rows import Update
from reference import losses, placed
from reference.cases import placed_case
from test_methods import ours

from verl_hpt.methods import METHODS
from verl_hpt.normalize import NORMALIZATIONS
from verl_hpt.tools.explain import explain

PLACED = sorted(placed.METHODS)
CLIP = {"low": 0.2, "high": 0.28, "c": 3.0}


def case_of(method: str, seed: int, normalization: str | None = None, **hpt) -> dict:
    return placed_case(seed, method, METHODS[method].place, normalization, clip=CLIP, **hpt)


def explained(case: dict) -> dict:
    """The case in the words of ``verl-hpt explain``, which know ``options`` too."""
    told = ours(case)
    told["hpt"] |= {"options": case["hpt"]["options"]} if "options" in case["hpt"] else {}
    for name in placed.BESIDE:
        for row in told.get(name, []):
            row.pop("advantage", None)
    return told


def compare(case: dict, tolerance: float = 1e-12) -> None:
    expected = placed.gradients(case)
    told = explain(explained(case))
    got = {(row["uid"], row["kind"], row["index"]): row["gradient"] for row in told["rows"]}
    for key, gradient in expected.items():
        mine = got.pop(key, [0.0] * len(gradient))
        assert mine == pytest.approx(gradient, abs=tolerance), key
    assert not got
    assert any(any(gradient) for gradient in expected.values()), "the case exercises nothing"


def test_every_method_has_a_reference():
    assert set(METHODS) == {*losses.METHODS, *placed.METHODS}
    assert not losses.METHODS.keys() & placed.METHODS.keys()


def test_own_normalisations_are_the_papers():
    assert {name: METHODS[name].normalization for name in PLACED} == placed.OWN


def test_what_the_table_says_of_places_is_the_papers():
    places = {
        **dict.fromkeys(["prefix_rft", "uft", "stephint", "g2rpo_a"], "prefix"),
        **dict.fromkeys(["questa", "pope", "guide"], "hint"),
        **dict.fromkeys(["chord_mu", "chord_phi", "amft_style"], "stream"),
        "relift": "buffer",
    }
    assert {name: METHODS[name].place for name in PLACED} == places

    def those(field, value):
        return {name for name in METHODS if getattr(METHODS[name], field) == value}

    assert those("baseline", "group") == {"uft", "stephint", "g2rpo_a", "guide"}
    assert those("rescored", True) == {"guide"} and those("convex", True) == {"chord_mu", "chord_phi", "amft_style"}
    assert {name for name in METHODS if METHODS[name].start is not None} == {
        name for name, place in places.items() if place in ("prefix", "hint")
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", PLACED)
def test_gradient_of_every_method_equals_autograd_through_its_published_loss(method, seed):
    compare(case_of(method, seed))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("method", PLACED)
def test_gradient_holds_under_every_normalisation(method, normalization):
    compare(case_of(method, 7, normalization))


@pytest.mark.parametrize("dropped", [0.0, 0.25, 0.5, 0.99])
def test_gradient_holds_for_every_share_of_a_prefix_that_is_dropped(dropped):
    compare(case_of("prefix_rft", 5, options={"prefix_dropped": dropped}))


@pytest.mark.parametrize("demo_coef", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("method", ["uft", "chord_mu", "chord_phi", "amft_style", "relift"])
def test_gradient_holds_for_every_demo_coef(method, demo_coef):
    compare(case_of(method, 9, demo_coef=demo_coef))


@pytest.mark.parametrize(("ranks", "cuts"), [(1, ()), (1, (1, 2, 9)), (3, (2, 3, 6))])
@pytest.mark.parametrize("method", PLACED)
def test_gradient_of_the_loss_in_verls_row_format_is_the_same(method, ranks, cuts):
    """In float64, but for the rows' own numbers, which travel in float32."""
    case = case_of(method, 11)
    expected, got = placed.gradients(case), Update(case, ranks).cut(*cuts).gradients
    largest = max(abs(x) for gradient in expected.values() for x in gradient)
    for key, gradient in expected.items():
        assert got.pop(key, [0.0] * len(gradient)) == pytest.approx(gradient, abs=1e-6 * largest), key
    assert not got and largest > 0


def test_random_cases_meet_every_branch_of_a_prefix():
    """Tokens that learn and that do not, ratios beyond each bound on either side of Â = 0, shared and lone starts."""
    found = Counter()
    for seed in range(4):
        for question in case_of("prefix_rft", seed)["questions"]:
            rows, starts = question["rollouts"], Counter(map(start, question["rollouts"]))
            plain = [row["reward"] for row in rows if not start(row)]
            baseline = sum(plain) / len(plain) if plain else 0.0
            for row in (row for row in rows if start(row)):
                given = row["prefix"]
                learns = sorted(range(given), key=lambda t: (row["entropy"][t], t))[math.floor(0.8 * given + 1e-6) :]
                found["shared" if starts[start(row)] > 1 else "lone"] += 1
                found["without plain"] += not plain
                found["equal entropies"] += len(set(row["entropy"][:given])) < given
                for t in learns:
                    ratio, a = math.exp(row["log_prob"][t] - row["old_log_prob"][t]), row["reward"] - baseline
                    found["up"] += a > 0 and ratio > 1.28
                    found["down"] += a < 0 and ratio < 0.8
                    found["dual"] += a < 0 and ratio > 3
                    found["inside"] += a != 0 and 0.8 < ratio < 1.28
    assert min(found[name] for name in ("shared", "lone", "without plain", "equal entropies")) >= 3, found
    assert min(found[name] for name in ("up", "down", "dual", "inside")) >= 2, found


def start(row: dict):
    return row.get("start") or row["prefix"]
