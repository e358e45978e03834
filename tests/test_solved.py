"""When a rollout counts as solved: one comparison for gate, history, metrics and ``explain``; what a cut one counts."""

import numpy as np
import pytest
from test_questions import group, reader, scored

from verl_hpt import gate
from verl_hpt.config import load
from verl_hpt.errors import UserError
from verl_hpt.gate import GateSettings
from verl_hpt.host.batch import gate_metric, questions_of, row_sums
from verl_hpt.methods import METHODS
from verl_hpt.metrics import of_rollouts
from verl_hpt.plan import DEMO, ROLLOUT, PlanSettings, Question, plan
from verl_hpt.tools.explain import explain

# Written as decimals, these differ as float32 (verl's scores) and float64 (the settings).
EXACT = [0.1, 0.3, 0.7, 0.9, 0.95, 1.4, 2.3, -0.7]


def settings(method="hpt", **kwargs) -> PlanSettings:
    own = {name: kwargs.pop(name) for name in list(kwargs) if name in GateSettings.__dataclass_fields__}
    chosen = METHODS[method]
    return PlanSettings(chosen, chosen.normalization, 16.0, gate=GateSettings(**own), **kwargs)


def question(rewards, cut=None, **kwargs) -> Question:
    rewards = np.asarray(rewards, dtype=float)
    return Question(
        "q",
        rewards,
        np.full(len(rewards), 5),
        truncated=None if cut is None else np.asarray(cut, dtype=bool),
        demo_lengths=kwargs.pop("demo_lengths", np.array([7])),
        demo_rewards=kwargs.pop("demo_rewards", np.array([np.nan])),
        **kwargs,
    )


def case(rewards, cut=None, hpt=None, demo=None, **more) -> dict:
    cut = [False] * len(rewards) if cut is None else cut
    rollouts = [
        {"reward": reward, "length": 5, "log_prob": -1.0, "entropy": 1.0, "truncated": bool(c)}
        for reward, c in zip(rewards, cut, strict=True)
    ]
    demos = [{"length": 7, "log_prob": -1.0, "entropy": 1.0, "other_log_prob": -1.0, **(demo or {})}]
    return {
        "hpt": {"rl_length_scale": 16.0, **(hpt or {})},
        "questions": [{"uid": "q", "rollouts": rollouts, "demos": demos, **more}],
    }


def trained(rewards, hpt, cut=None) -> tuple[str, set]:
    """Zone and dropped rows of a question whose scores come as verl keeps them: float32, a number a token."""
    tokens = np.zeros((len(rewards), 5), dtype=np.float32)
    tokens[:, -1] = rewards
    rows = scored(row_sums(tokens.reshape(-1), np.arange(0, 5 * len(rewards) + 1, 5)), length=5)
    if cut is not None:
        rows.truncated = np.asarray(cut)
    node = load(hpt)
    method = METHODS[node.method]
    plan_settings = PlanSettings(method, method.normalization, 16.0, gate=node.gate.at(1))
    one = group("ab", rows=range(len(rewards)))
    questions, *_ = questions_of([one], rows, reader(), plan_settings, 1)
    made = plan(questions, plan_settings)
    return made.decisions[0].zone, {(d.kind, d.index) for d in made.dropped if d.kind == ROLLOUT}


@pytest.mark.parametrize("value", EXACT)
def test_a_reward_that_meets_success_exactly_counts_as_solved(value):
    """As float32, verl's score of 0.9 is 0.899999976…; below a float64 of 0.9, so that the question imitated."""
    assert gate.solved(np.array([value], dtype=np.float32), value).all()
    assert gate.solved(np.array([np.float64(np.float32(value))]), value).all()
    assert not gate.solved(np.array([np.nextafter(np.float32(value), np.float32(-9))]), value).any()
    zone, _ = trained([value, value - 1], {"gate": {"success": value}})
    assert zone == "rl"


def test_explain_and_training_decide_the_same_for_every_score_and_threshold():
    draw, seen = np.random.default_rng(0), set()
    for _ in range(400):
        success = draw.choice([*EXACT, *np.round(draw.normal(size=4), 3)])
        near = [float(success), *(float(np.nextafter(np.float32(success), np.float32(s * 9))) for s in (-1, 1))]
        rewards = [float(x) for x in draw.choice([*near, *np.float32(draw.normal(size=3))], size=4)]
        cut = draw.random(4) < 0.3
        method = str(draw.choice(["hpt", "superrl", "s3ft", "hpt_soft"]))
        hpt = {"method": method, "gate": {"success": float(success), "finished": bool(draw.random() < 0.7)}}
        if method == "hpt":
            hpt["gate"]["threshold"] = float(draw.choice([0.0, 0.25, 0.5, 0.75]))
        on_paper = explain(case(rewards, cut, hpt))
        zones = {row["zone"] for row in on_paper["rows"]}
        dropped = {(ROLLOUT, d["index"]) for d in on_paper["dropped"] if d["kind"] == "rollout"}
        assert ({trained(rewards, hpt, cut)[0]}, trained(rewards, hpt, cut)[1]) == (zones, dropped), (rewards, hpt, cut)
        seen |= zones
    assert seen == {"rl", "demo", "own", "soft"}


def test_a_rollout_that_was_cut_does_not_count_as_solved_unless_the_gate_says_so():
    both = question([1, 1, 0, 0], cut=[True, True, False, False])
    assert plan([both], settings()).decisions[0].zone == "demo"
    assert plan([both], settings(finished=False)).decisions[0].zone == "rl"
    one = question([1, 1, 0, 0], cut=[True, False, False, False])
    made = plan([one], settings())
    assert made.decisions[0].zone == "rl" and made.solved[0].tolist() == [False, True, False, False]
    assert made.correct.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("method", "cut_zone", "zone"), [("superrl", "demo", "rl"), ("s3ft", "demo", "own")])
def test_every_rule_that_asks_for_a_success_leaves_cut_rollouts_out(method, cut_zone, zone):
    only = question([1, 0], cut=[True, False])
    assert plan([only], settings(method)).decisions[0].zone == cut_zone
    assert plan([only], settings(method, finished=False)).decisions[0].zone == zone


def advantages(rewards, cut, truncated, **kwargs) -> dict[int, float]:
    """Rollout -> Â of those that stay."""
    made = plan([question(rewards, cut, **kwargs)], settings("dr_grpo", finished=False, truncated=truncated))
    return {int(i): float(a) for i, a in zip(made.index, made.advantage, strict=True)}


def test_cut_rollouts_are_kept_counted_as_failures_or_dropped_after_the_advantages():
    rewards, cut = [1, 1, 1, 1], [True, False, False, False]
    assert advantages(rewards, cut, "keep") == {0: 0, 1: 0, 2: 0, 3: 0}
    assert advantages(rewards, cut, "unsolved") == {0: -0.75, 1: 0.25, 2: 0.25, 3: 0.25}
    # Dropped first, the three that finished would have Â = 0.
    assert advantages(rewards, cut, "mask") == {1: 0.25, 2: 0.25, 3: 0.25}


def test_a_cut_rollout_counts_as_the_lowest_of_its_group_where_failures_are_below_zero():
    assert advantages([1, -1], [True, False], "unsolved") == {0: 0, 1: 0}
    assert advantages([1, 0.5], [True, False], "unsolved") == {0: -0.25, 1: 0.25}
    assert advantages([1, 1], [True, False], "unsolved", returns=np.array([0.5, 0.9])) == {0: -0.45, 1: 0.45}


def test_masked_rollouts_weigh_nothing_and_are_named():
    made = plan([question([1, 0, 0, 0], cut=[False, True, False, True])], settings(truncated="mask"))
    lost = {(d.kind, d.index): d.why for d in made.dropped}
    assert lost[(ROLLOUT, 1)] == lost[(ROLLOUT, 3)] == "it was cut at the length limit"
    assert made.index.tolist() == [0, 2] and made.w_rl.tolist() == [1 / 2 / 16] * 2


@pytest.mark.parametrize("truncated", ["unsolved", "mask"])
def test_what_counts_as_unsolved_is_unsolved_for_the_gate_too(truncated):
    made = plan([question([1, 0], cut=[True, False])], settings(finished=False, truncated=truncated))
    assert made.decisions[0].zone == "demo" and not made.solved[0].any()


def test_explain_takes_truncated_rollouts_and_what_becomes_of_them():
    told = explain(case([1, 1, 0, 0], [True, False, False, False], {"rollouts": {"truncated": "mask"}}))
    assert [row["index"] for row in told["rows"]] == [1, 2, 3]
    assert [row["advantage"] for row in told["rows"]] == [0.75, -0.25, -0.25]
    assert {"uid": "q", "kind": "rollout", "index": 0, "why": "it was cut at the length limit"} in told["dropped"]
    with pytest.raises(UserError, match=r"rollouts\[0\].truncated=1: must be true or false"):
        explain({"questions": [{"rollouts": [{"reward": 0, "length": 1, "log_prob": -1, "truncated": 1}]}]})
    with pytest.raises(UserError, match=r"demos\[0\].truncated: unknown key"):
        explain(case([0], demo={"truncated": True}))


# --- the metric in place of the score ---------------------------------------------------------------------------------


def test_the_gate_reads_the_metric_and_the_advantages_the_score():
    shaped = question([0.4, -0.6, 0.4, -0.6], metric=np.array([1.0, 0, 0, 0]))
    made = plan([shaped], settings())
    assert made.decisions[0].zone == "rl" and made.solved[0].tolist() == [True, False, False, False]
    assert made.advantage == pytest.approx([0.5, -0.5, 0.5, -0.5]) and made.reward.tolist() == [0.4, -0.6, 0.4, -0.6]
    assert plan([question([1, 1], metric=np.zeros(2))], settings()).decisions[0].zone == "demo"


def test_explain_reads_the_metric_of_each_rollout_and_asks_for_it():
    hpt = {"gate": {"metric": "acc"}}
    told = case([0.2, 0.2], hpt=hpt)
    with pytest.raises(UserError, match=r"rollouts\[0\].metric: missing; hpt.gate.metric='acc' reads it"):
        explain(told)
    for row, acc in zip(told["questions"][0]["rollouts"], (1, 0), strict=True):
        row["metric"] = acc
    assert {row["zone"] for row in explain(told)["rows"]} == {"rl"}


@pytest.mark.parametrize(("value", "number"), [(1, 1.0), (True, 1.0), (False, 0.0), (np.float32(0.5), 0.5)])
def test_a_gate_metric_is_a_number(value, number):
    assert gate_metric(group("ab"), "acc", {"acc": value, "score": 0.0}) == number


@pytest.mark.parametrize("value", ["yes", float("nan"), [1.0]])
def test_a_gate_metric_that_is_no_number_is_refused(value):
    with pytest.raises(UserError, match=r"question key .*hpt.gate.metric='acc' is .*; it must be a number"):
        gate_metric(group("ab"), "acc", {"acc": value})


def test_a_missing_gate_metric_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"hpt.gate.metric='correct' is not in .* extra info; it has acc, score"):
        gate_metric(group("ab"), "correct", {"score": 1.0, "acc": 1.0})
    with pytest.raises(UserError, match="it has nothing"):
        gate_metric(group("ab"), "correct", {})


# --- rollouts that we did not have sampled ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hpt", "grpo", "rloo", "reinforce"])
@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_a_lone_rollout_whose_siblings_were_not_sampled_has_no_advantage(method, reward):
    """Its raw reward as Â weighed nine times what one of eight does, and with a negative one it unlearned."""
    lone = question([reward], skipped_rollouts=7, demo_lengths=np.zeros(0, int), demo_rewards=np.zeros(0))
    assert plan([lone], settings(method)).advantage.tolist() == [0]
    alone_by_the_users_choice = question([reward], demo_lengths=np.zeros(0, int), demo_rewards=np.zeros(0))
    assert plan([alone_by_the_users_choice], settings(method)).advantage == pytest.approx([reward], rel=1e-5)


def test_a_lone_rollout_in_a_group_with_a_demonstration_keeps_its_advantage():
    made = plan([question([0.0], skipped_rollouts=3)], settings("luffy"))
    assert made.advantage.tolist() == [-0.5, 0.5]


def test_two_rollouts_that_were_sampled_keep_theirs():
    assert plan([question([1.0, 0.0], skipped_rollouts=6)], settings("dr_grpo")).advantage.tolist() == [0.5, -0.5]


def test_explain_knows_of_skipped_rollouts():
    told = explain(case([1.0], skipped_rollouts=3))
    assert [row["advantage"] for row in told["rows"]] == [0.0]
    with pytest.raises(UserError, match=r"questions\[0\].skipped_rollouts=-1: must be a whole number"):
        explain(case([1.0], skipped_rollouts=-1))


# --- what a demonstration counts as ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["luffy", "srft_hpt", "rl_plus"])
def test_no_method_pushes_away_from_a_demonstration_for_want_of_a_setting(method):
    """success 0.5 with rewards of 1: as 0.5, the demonstration was the worst of its group."""
    made = plan([question([1, 1, 1, 0])], settings(method, success=0.5))
    assert made.reward[made.kind == DEMO] == 1.0 and made.advantage[made.kind == DEMO] > 0
    low = plan([question([0, 0, 0, 0])], settings(method, success=0.5))
    assert low.reward[low.kind == DEMO] == 0.5
    given = plan([question([1, 1, 1, 0], demo_rewards=np.array([0.25]))], settings(method, success=0.5))
    assert given.reward[given.kind == DEMO] == 0.25


def test_a_demonstration_that_stands_alone_counts_as_a_success_of_its_source():
    sources = {"easy": GateSettings(success=0.25)}
    made = plan([question([1.0], source="easy")], settings("hpt_off_on", threshold=1.0, gates=sources))
    assert made.decisions[0].zone == "rl"
    made = plan([question([0.0], source="easy")], settings("hpt_off_on", gates=sources))
    assert made.reward.tolist() == [0.25] and made.correct.tolist() == [True]


def test_explain_and_training_count_a_demonstration_alike():
    told = explain(case([1, 1, 1, 0], hpt={"method": "luffy", "gate": {"success": 0.5}}))
    assert [row["advantage"] for row in told["rows"]] == pytest.approx([0.2, 0.2, 0.2, -0.8, 0.2])


# --- what people see of it -------------------------------------------------------------------------------------------


def test_shares_of_cut_rollouts_are_of_all_and_of_those_that_reach_success():
    batch = [question([1, 1, 0, 0], cut=[True, False, True, False]), question([1, 0], cut=[True, False])]
    assert of_rollouts(batch, settings()) == {
        "hpt/response_length": 5.0,
        "hpt/truncated_share": 3 / 6,
        "hpt/truncated_success_share": 2 / 3,
    }
    assert of_rollouts([question([0, 0])], settings())["hpt/truncated_success_share"] == 0
    assert of_rollouts([question([])], settings()) == {}
