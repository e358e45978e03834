"""The gate, which compares counts: solved ≤ γ·n, with room for what floats do to shares."""

import numpy as np
import pytest
from reference.losses import SOFT

from verl_hpt import gate
from verl_hpt.gate import BOTH, COLLECT, DEMO, KEEP, OFF, RL, Decision, GateSettings, Outcome
from verl_hpt.methods import METHODS
from verl_hpt.plan import PlanSettings, Question, plan


def outcome(solved, n, settings, **known) -> Outcome:
    return Outcome(np.array([1.0] * solved + [0.0] * (n - solved)), settings, **known)


def decide(solved, n, settings) -> Decision:
    return gate.decide("gate", outcome(solved, n, settings))


def decide_soft(solved, n, demo_correct, settings) -> Decision:
    return gate.settle(gate.decide("soft", outcome(solved, n, settings)), 1, demo_correct, True)


@pytest.mark.parametrize("n", range(1, 65))
def test_a_share_means_the_count_that_it_is_a_share_of(n):
    """γ = k/n lets exactly k solved rollouts pass; 15/22·22 is 14.999… in floats."""
    for k in range(n + 1):
        settings = GateSettings(threshold=k / n)
        assert [decide(solved, n, settings) is DEMO for solved in range(n + 1)] == [s <= k for s in range(n + 1)]


def test_negative_threshold_never_fires_and_one_always_does():
    assert all(decide(s, 8, GateSettings(threshold=-1e-6)) is RL for s in range(9))
    assert all(decide(s, 8, GateSettings(threshold=1.0)) is DEMO for s in range(9))


def test_a_count_wins_over_the_share():
    settings = GateSettings(threshold=1.0, count=2)
    assert [decide(s, 8, settings).zone for s in range(5)] == ["demo", "demo", "demo", "rl", "rl"]
    assert decide(0, 8, GateSettings(count=-1)) is RL


def test_off_zone_lies_between_the_two_bounds():
    settings = GateSettings(threshold=0.0, off=0.25)
    assert [decide(s, 8, settings) for s in range(4)] == [DEMO, OFF, OFF, RL]


def test_the_published_soft_table_is_the_one_read_independently():
    assert tuple(SOFT) == gate.SOFT_TABLE


def test_published_soft_table_counts_a_correct_demonstration_as_one_of_eight():
    rows = [decide_soft(s, 7, True, GateSettings()) for s in range(8)]
    assert [(d.on, d.off, d.sft) for d in rows] == [tuple(map(float, r)) for r in gate.SOFT_TABLE[1:]]
    assert decide_soft(0, 8, False, GateSettings()).on == 1  # entry 0: nothing correct at all


def test_a_users_soft_table_goes_by_number_solved_and_scales_to_the_group():
    settings = GateSettings(soft=((0, 0, 1), (0.5, 0, 0.5), (1, 0, 0)))
    assert [decide_soft(s, 2, True, settings).on for s in range(3)] == [0, 0.5, 1]
    assert [decide_soft(s, 8, True, settings).on for s in (0, 4, 8)] == [0, 0.5, 1]


def test_named_soft_functions_go_from_the_demonstration_to_the_rollouts():
    for name in ("linear", "cosine"):
        rows = [decide_soft(s, 4, True, GateSettings(soft=name)) for s in range(5)]
        assert (rows[0].on, rows[0].sft, rows[4].on, rows[4].sft) == (0, 1, 1, 0)
        assert rows[2].on == pytest.approx(0.5) and all(r.on + r.sft == pytest.approx(1) and r.off == 0 for r in rows)
    assert decide_soft(1, 4, True, GateSettings(soft="cosine")).on == pytest.approx(0.1464466)
    assert decide_soft(1, 4, True, GateSettings(soft="linear")).on == 0.25


def test_a_users_gate_is_found_by_name():
    @gate.register_gate
    def at_most_one(solved, n, settings):
        return DEMO if solved <= 1 else RL

    try:
        settings = GateSettings(function="at_most_one")
        assert [decide(s, 4, settings).zone for s in range(3)] == ["demo", "demo", "rl"]
    finally:
        del gate.GATES["at_most_one"]


def test_a_gate_that_takes_the_outcome_gets_rewards_history_and_its_own_arguments(monkeypatch):
    def stubborn(outcome, patience, share=0.5):
        if outcome.history["uses"] >= patience:
            return Decision("rested", share, 0.0, 0.0)
        return DEMO if outcome.rewards.max() < 0.5 and outcome.solved < outcome.n else RL

    monkeypatch.setitem(gate.GATES, "stubborn", stubborn)
    settings = GateSettings(function="stubborn", kwargs={"patience": 3})
    shaped = [Outcome(np.array(r), settings, history={"uses": uses}) for r in ([0.4], [0.6]) for uses in (0, 3)]
    assert [gate.decide("gate", one).zone for one in shaped] == ["demo", "rested", "rl", "rested"]
    with_share = GateSettings(function="stubborn", kwargs={"patience": 0, "share": 0.25})
    assert gate.decide("gate", Outcome(np.zeros(2), with_share, history={"uses": 0})).on == 0.25


def test_a_gate_of_three_arguments_gets_its_own_arguments_too(monkeypatch):
    monkeypatch.setitem(gate.GATES, "at_most", lambda solved, n, settings, most=0: DEMO if solved <= most else RL)
    zones = [decide(s, 4, GateSettings(function="at_most", kwargs={"most": 2})).zone for s in range(4)]
    assert zones == ["demo", "demo", "demo", "rl"]


def test_a_gate_may_take_its_three_arguments_by_position_alone(monkeypatch):
    def by_position(solved, n, settings, /):
        return DEMO if solved == 0 else RL

    monkeypatch.setitem(gate.GATES, "by_position", by_position)
    assert [decide(s, 4, GateSettings(function="by_position")).zone for s in range(2)] == ["demo", "rl"]


def test_a_gate_of_the_users_can_stand_for_the_soft_table_with_its_own_arguments(monkeypatch):
    monkeypatch.setitem(gate.GATES, "power", lambda outcome, to: gate.Decision("soft", 1.0, 0.0, 0.5**to))
    assert decide_soft(0, 4, True, GateSettings(soft="power", kwargs={"to": 3})).sft == 0.125


def planned(question, **settings):
    return plan([question], PlanSettings(METHODS["hpt"], "question", 8.0, gate=GateSettings(**settings)))


def test_the_gate_is_asked_once_a_question_and_step(monkeypatch):
    asked = []
    monkeypatch.setitem(gate.GATES, "counted", lambda outcome: asked.append(outcome) or DEMO)
    question = Question("a", np.zeros(2), np.ones(2, int), demo_lengths=np.ones(1, int), demo_rewards=np.ones(1),
                        history={"uses": 7})  # fmt: skip
    assert planned(question, function="counted").decisions == [DEMO]
    assert [one.history for one in asked] == [{"uses": 7}]


def test_a_share_of_the_rollouts_stands_where_the_gate_asks_for_no_demonstration(monkeypatch):
    """It became the whole of them for want of a demonstration that the decision does not use."""
    monkeypatch.setitem(gate.GATES, "half", lambda outcome: Decision("half", 0.5, 0.0, 0.0))
    assert planned(Question("a", np.array([1.0, 0.0]), np.ones(2, int)), function="half").decisions[0].on == 0.5


@pytest.mark.parametrize(
    ("decision", "trains_rollouts", "settled"),
    [
        (DEMO, True, RL),
        (DEMO, False, gate.NOTHING),
        (gate.BOTH, True, RL),
        (OFF, True, RL),
        (RL, True, RL),
        (gate.OWN, False, gate.OWN),
        (Decision("soft", 0.25, 0.0, 0.0), True, Decision("soft", 0.25, 0.0, 0.0)),
        (Decision("soft", 0.25, 0.0, 0.5), True, RL),
    ],
)
def test_what_becomes_of_a_decision_without_a_usable_demonstration(decision, trains_rollouts, settled):
    assert gate.settle(decision, 0, False, trains_rollouts) == settled
    assert gate.settle(decision, 1, True, trains_rollouts) == decision


def test_of_a_question_that_was_never_drawn_every_number_is_zero():
    assert len(gate.NEVER_DRAWN) == 8 and set(gate.NEVER_DRAWN.values()) == {0}


@pytest.mark.parametrize(("solved", "n", "on"), [(0, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0), (1, 2, 0.5)])
def test_shares_of_small_groups(solved, n, on):
    for name in ("linear", "cosine"):
        decision = gate.decide("soft", outcome(solved, n, GateSettings(soft=name)))
        assert (decision.on, decision.sft) == pytest.approx((on, 1 - on)), name


def test_a_number_that_is_not_remembered_is_named_with_those_that_are():
    with pytest.raises(KeyError, match=r"history has no 'taught'; it has solved, rollouts, drawn, failures, uses, "):
        Outcome(np.zeros(1), GateSettings()).history["taught"]


def test_a_gates_name_is_taken_once():
    def linear(solved, n, settings):
        return RL

    with pytest.raises(ValueError, match="gate 'linear' is already registered: choose another name"):
        gate.register_gate(linear)
    assert gate.GATES["linear"] is gate.linear


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        (GateSettings(), False),
        (GateSettings(threshold=0.99), False),
        (GateSettings(threshold=1.0), True),
        (GateSettings(threshold=2.0), True),
        (GateSettings(count=3), False),
        (GateSettings(count=4), True),
        (GateSettings(threshold=1.0, count=3), False),  # the count wins
        (GateSettings(threshold=-1.0), False),
        (GateSettings(threshold=0.0, off=1.0), False),  # the off zone is no imitation
    ],
)
def test_every_question_is_on_its_demonstration_where_four_of_four_solved_still_is(settings, every):
    assert gate.always_demo(settings, 4) is every
    assert all(decide(solved, 4, settings) == DEMO for solved in range(5)) is every


def test_a_users_gate_is_never_taken_to_put_every_question_on_its_demonstration():
    assert gate.always_demo(GateSettings(threshold=1.0, function="linear"), 4) is False


def test_what_a_question_trains_on_by_value():
    shares = {d.zone: (d.on, d.off, d.sft) for d in (RL, DEMO, OFF, gate.BOTH)}
    assert shares == {"rl": (1, 0, 0), "demo": (0, 1, 1), "off": (0, 1, 0), "both": (1, 1, 1)}


@pytest.mark.parametrize("demo_correct", [True, False])
@pytest.mark.parametrize("soft", [None, ((0, 0, 1), (1, 0, 0)), ((0, 0, 1), (0.5, 0, 0.5), (1, 0, 0))])
@pytest.mark.parametrize("n", [0, 1, 3, 7, 8, 16])
def test_all_solved_is_the_last_entry_of_every_soft_table(n, soft, demo_correct):
    """No number solved of a group reads beyond the table."""
    table = soft or gate.SOFT_TABLE
    rows = [decide_soft(s, n, demo_correct, GateSettings(soft=soft)) for s in range(n + 1)]
    first = table[1 if soft is None and demo_correct else 0]
    assert (rows[0].on, rows[0].off, rows[0].sft) == tuple(first)
    if n:
        assert (rows[-1].on, rows[-1].off, rows[-1].sft) == tuple(table[-1])


# --- demonstrations elsewhere than beside the question's rollouts -----------------------------------------------------


def placed(place: str, solved: int, n: int, settings: GateSettings, when="gate", **known) -> Decision:
    return gate.decide(when, outcome(solved, n, settings), place=place, **known)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_with_a_stream_every_question_trains_on_its_rollouts_whatever_they_score(n):
    for solved in range(n + 1):
        assert placed("stream", solved, n, GateSettings(threshold=1.0), "always") is RL


@pytest.mark.parametrize("n", range(1, 9))
def test_a_buffer_collects_where_the_gate_would_imitate_and_its_rollouts_train_all_the_same(n):
    for settings in (GateSettings(), GateSettings(threshold=0.5), GateSettings(count=2), GateSettings(off=0.75)):
        for solved in range(n + 1):
            alone = decide(solved, n, settings)
            assert placed("buffer", solved, n, settings) is (RL if alone is RL else COLLECT)
    assert (COLLECT.on, COLLECT.off, COLLECT.sft) == (1, 0, 0) and COLLECT.asks_for_demo


def test_a_gate_of_ones_own_sends_to_the_buffer_what_it_takes_from_the_rollouts(monkeypatch):
    found = {0: DEMO, 1: BOTH, 2: OFF, 3: RL}
    monkeypatch.setitem(gate.GATES, "mine", lambda outcome: found[outcome.solved])
    zones = [placed("buffer", solved, 3, GateSettings(function="mine")).zone for solved in range(4)]
    assert zones == ["collect", "rl", "collect", "rl"]


def test_a_question_without_a_rollout_from_nothing_tells_the_buffer_nothing():
    for collects in ("demonstrations", "successes"):
        assert placed("buffer", 0, 0, GateSettings(threshold=1.0), collects=collects) is RL


@pytest.mark.parametrize(("n", "kept"), [(1, [1]), (2, [1]), (3, [1, 2]), (4, [1, 2, 3]), (8, [1, 2, 3, 4, 5, 6, 7])])
def test_a_buffer_of_successes_keeps_those_of_partly_solved_questions_and_a_lone_one(n, kept):
    """A question with one rollout, solved, is kept: nothing says that others would be. No gate has a part in it."""
    for settings in (GateSettings(), GateSettings(threshold=1.0), GateSettings(count=-1)):
        found = [placed("buffer", solved, n, settings, collects="successes") for solved in range(n + 1)]
        assert found == [KEEP if solved in kept else RL for solved in range(n + 1)]
    assert (KEEP.on, KEEP.off, KEEP.sft) == (1, 0, 0) and not KEEP.asks_for_demo


def test_a_success_counts_by_the_gates_score_and_not_where_it_was_cut():
    settings = GateSettings(success=0.5)
    rewards, cut = np.array([0.4, 0.5, 0.9]), np.array([False, True, False])
    assert gate.decide("gate", Outcome(rewards, settings, cut=cut), place="buffer", collects="successes") is KEEP
    rewards[2] = 0.49
    assert gate.decide("gate", Outcome(rewards, settings, cut=cut), place="buffer", collects="successes") is RL
    assert gate.decide("gate", Outcome(rewards, settings), place="buffer", collects="successes") is KEEP


def test_without_a_usable_demonstration_nothing_is_collected():
    assert gate.settle(COLLECT, 0, False, True) is RL and gate.settle(COLLECT, 1, False, True) is COLLECT
    assert gate.settle(KEEP, 0, False, True) is KEEP
