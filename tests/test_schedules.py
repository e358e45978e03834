"""Numbers that change over steps: shapes, warm-up, and what one command trains before and after a step."""

import pytest

from verl_hpt.config import Schedule, at, demo_coef, load, resolve_method
from verl_hpt.errors import UserError
from verl_hpt.places.schedule import Steered


def test_linear_goes_from_start_to_end_and_stays():
    assert [Schedule(1.0, 0.0, 4).at(s) for s in (0, 1, 2, 4, 9)] == [1, 0.75, 0.5, 0, 0]


def test_cosine_is_flat_at_both_ends_and_half_in_the_middle():
    values = [Schedule(0.9, 0.1, 10, "cosine").at(s) for s in (0, 1, 5, 9, 10, 11)]
    assert values == pytest.approx([0.9, 0.9 - 0.8 * 0.0244717, 0.5, 0.1 + 0.8 * 0.0244717, 0.1, 0.1], abs=1e-6)


def test_step_is_start_up_to_and_with_its_step_and_end_after_it():
    assert [Schedule(1.0, 0.0, 3, "step").at(s) for s in (1, 2, 3, 4, 5)] == [1, 1, 1, 0, 0]


def test_warm_up_rises_from_nothing_to_start_and_the_shape_begins_after_it():
    assert [Schedule(1.0, 0.0, 2, warmup=4).at(s) for s in range(8)] == [0, 0.25, 0.5, 0.75, 1, 0.5, 0, 0]
    assert [Schedule(0.8, 0.2, 1, "step", 2).at(s) for s in range(5)] == [0, 0.4, 0.8, 0.8, 0.2]


def test_a_plain_number_is_the_same_at_every_step():
    assert at(0.3, 7) == 0.3 and at(None, 7) is None and at(Schedule(1.0, 0.0, 2), 1) == 0.5


def test_a_steered_number_follows_the_entropy_between_its_bounds():
    """x ← clip(x + rate·(target − H)): it rises where the policy's entropy lies below the target."""
    steered = Steered(0.5, 0.3, 0.1, 0.2, 0.8)
    assert steered.after(0.5, 0.1) == pytest.approx(0.52) and steered.after(0.5, 1.3) == pytest.approx(0.4)
    assert steered.after(0.5, 0.3) == 0.5
    assert steered.after(0.5, 9.0) == 0.2 and steered.after(0.79, 0.0) == 0.8 and steered.after(0.2, 0.3) == 0.2
    value = 0.5
    for entropy in (0.0, 0.0, 2.3):
        value = steered.after(value, entropy)
    assert value == pytest.approx(0.36) and at(steered, 99) == 0.5, "where it starts, at any step"
    assert (Steered(0.5, 0.3).rate, Steered(0.5, 0.3).low, Steered(0.5, 0.3).high) == (0.01, 0.05, 0.95)


def test_a_steered_numbers_bounds_hold_a_settings():
    for low, high in ((0.0, 1.0), (0.2, 0.8)):
        steered = Steered(0.5, 0.3, low=low, high=high)
        assert steered >= low and steered <= high and not steered >= low + 0.1 and not steered <= high - 0.1
    schedule = Schedule(0.2, 0.8, 4)
    assert schedule >= 0.2 and schedule <= 0.8 and not schedule >= 0.3 and not schedule <= 0.7
    assert Schedule(0.8, 0.2, 4) >= 0.2 and Schedule(0.8, 0.2, 4) <= 0.8


def test_a_coefficient_that_is_not_set_is_the_methods():
    def of(method, **hpt):
        settings = load({"method": method, **hpt})
        return demo_coef(settings, resolve_method(settings))

    assert (of("hpt"), of("uft"), of("relift"), of("chord_phi")) == (0.1, 0.001, 1.0, 0.1)
    assert of("chord_mu") == Schedule(0.9, 0.05, 200, "cosine") and of("amft_style") == Steered(0.5, 0.3)
    assert of("amft_style", demo_coef=0.2) == 0.2 and of("uft", demo_coef=0) == 0
    assert of("hpt", demo_coef={"start": 0.1, "target": 2}) == Steered(0.1, 2.0)


def test_schedules_come_from_the_config_for_the_coefficient_and_the_gate():
    settings = load(
        {
            "demo_coef": {"start": 0.9, "end": 0.05, "steps": 200, "shape": "cosine", "warmup": 10},
            "gate": {"threshold": {"start": 1.0, "end": 0.0, "steps": 20, "shape": "step"}},
        }
    )
    assert settings.demo_coef == Schedule(0.9, 0.05, 200, "cosine", 10)
    assert [settings.gate.at(s).threshold for s in (20, 21)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"demo_coef": {"start": 0.1, "end": -0.1, "steps": 5}}, r"hpt\.demo_coef=.*: must be .*, at least 0: λ"),
        (
            {"demo_coef": {"start": 0.1, "end": 0.2, "steps": 0}},
            r"demo_coef\.steps=0: must be a whole number at least 1",
        ),
        ({"demo_coef": {"start": 0.1, "end": 0.2}}, r"hpt\.demo_coef: needs steps"),
        (
            {"demo_coef": {"start": 0.1, "end": 0.2, "steps": 5, "warmup": -1}},
            r"hpt\.demo_coef\.warmup=-1: must be a whole number at least 0",
        ),
        (
            {"demo_coef": {"start": 0.96, "target": 1}},
            r"start=0\.96: must lie between low \(0\.05\) and high \(0\.95\)",
        ),
        (
            {"demo_coef": {"start": 0.04, "target": 1}},
            r"start=0\.04: must lie between low \(0\.05\) and high \(0\.95\)",
        ),
        (
            {"demo_coef": {"start": 0.5, "target": -1}},
            r"hpt\.demo_coef\.target=-1: must be a number at least 0: entropy",
        ),
        ({"demo_coef": {"start": 0.5, "target": 1, "rate": 0}}, r"hpt\.demo_coef\.rate=0: must be a number above 0"),
        ({"demo_coef": {"start": 0.5, "target": 1, "low": -1}}, r"hpt\.demo_coef\.low=-1: must be a number at least 0"),
        ({"demo_coef": {"start": 0.5, "targets": 1}}, r"hpt\.demo_coef: needs target"),
        (
            {"gate": {"threshold": {"start": 0.1, "end": 0.2, "steps": 5, "shape": "sudden"}}},
            r"hpt\.gate\.threshold\.shape='sudden': must be one of linear, cosine, step",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(node, message):
    with pytest.raises(UserError, match=message):
        load(node)
