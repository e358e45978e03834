"""The plan: pure, independent of arrival order, even over optimizer steps and ranks, and losing nothing."""

import numpy as np
import pytest

from verl_hpt import gate
from verl_hpt.gate import Decision, GateSettings
from verl_hpt.methods import METHODS
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, PlanSettings, Question, plan


def question(key, rewards, demos=1, length=5, **kwargs) -> Question:
    rewards = np.asarray(rewards, dtype=float)
    lengths = np.arange(len(rewards)) + length
    return Question(str(key), rewards, lengths, demo_lengths=np.full(demos, 7), demo_rewards=np.ones(demos), **kwargs)


def settings(method="hpt", **kwargs) -> PlanSettings:
    chosen = METHODS[method]
    return PlanSettings(chosen, kwargs.pop("normalization", chosen.normalization), 16.0, **kwargs)


BATCH = [question(i, [float(i % 3 == 0), 0, 0, 0], demos=int(i % 5 != 1)) for i in range(24)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_rollout_and_demonstration_is_in_the_plan_or_dropped_with_a_reason(method):
    result = plan(BATCH, settings(method, questions_per_step=6))
    seen = list(zip(result.question, result.kind, result.index, strict=True))
    lost = [(d.question, d.kind, d.index) for d in result.dropped]
    everything = [(q, ROLLOUT, i) for q, x in enumerate(BATCH) for i in range(len(x.rewards))]
    everything += [(q, DEMO, j) for q, x in enumerate(BATCH) for j in range(len(x.demo_lengths))]
    assert sorted(seen + lost) == sorted(everything)
    assert all(d.why for d in result.dropped)
    assert sorted(row for row in result.layout if row != PADDING) == list(range(len(result)))


def test_the_plan_does_not_depend_on_the_order_of_questions():
    def rows(batch):
        result = plan(batch, settings(questions_per_step=6, ranks=2, seed=3))
        keys = [(batch[q].key, k, i) for q, k, i in zip(result.question, result.kind, result.index, strict=True)]
        return {
            key: (step, w, v) for key, step, w, v in zip(keys, result.step, result.w_rl, result.w_demo, strict=True)
        }

    shuffled = [BATCH[i] for i in np.random.default_rng(0).permutation(len(BATCH))]
    assert rows(BATCH) == rows(shuffled)


def test_another_seed_deals_questions_otherwise():
    steps = [tuple(plan(BATCH, settings(questions_per_step=6, seed=s)).step) for s in range(4)]
    assert len(set(steps)) > 1


def test_a_questions_rows_stand_in_one_optimizer_step():
    result = plan(BATCH, settings("luffy", questions_per_step=6, ranks=2))
    for q in range(len(BATCH)):
        assert len(set(result.step[result.question == q])) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_step_of_every_rank_has_the_same_rows_and_its_own(ranks, multiple):
    result = plan(BATCH, settings(questions_per_step=6, ranks=ranks, rows_multiple=multiple))
    m, rest = divmod(result.rows_per_step, ranks)
    assert rest == 0 and m % multiple == 0 and len(result.layout) == result.steps * result.rows_per_step
    layout = result.layout.reshape(ranks, result.steps, m)
    for step in range(result.steps):
        here = layout[:, step][layout[:, step] != PADDING]
        assert set(result.step[here]) <= {step}
        held = (layout[:, step] != PADDING).sum(axis=1)
        assert held.max() - held.min() <= max(multiple, held.max())


def test_groups_may_have_lost_sessions_and_questions_may_have_one_rollout():
    batch = [question("a", [1, 0]), question("b", [0]), question("c", [1]), question("d", [0, 0, 0, 1])]
    result = plan(batch, settings(questions_per_step=4))
    assert [d.zone for d in result.decisions] == ["rl", "demo", "rl", "rl"]
    of_a = result.w_rl[result.question == 0]
    assert of_a == pytest.approx(1 / (4 * 2 * 16))


def test_a_question_without_a_usable_demonstration_keeps_its_rollouts():
    result = plan([question("a", [0, 0], demos=0)], settings())
    assert result.decisions[0].zone == "rl" and list(result.kind) == [ROLLOUT, ROLLOUT] and not result.dropped


def test_a_method_of_demonstrations_alone_drops_a_question_without_one_and_says_so():
    result = plan([question("a", [0, 1], demos=0), question("b", [0, 0])], settings("sft", questions_per_step=2))
    assert {d.question for d in result.dropped if "no usable one" in d.why} == {0}
    assert list(result.question) == [1] and result.w_demo == pytest.approx(0.1 / 7)


def test_a_batch_with_nothing_to_train_on_still_has_its_optimizer_steps():
    result = plan([question(i, [0.0], demos=0) for i in range(4)], settings("sft", questions_per_step=2, ranks=2))
    assert result.steps == 2 and len(result) == 0 and (result.layout == PADDING).all() and len(result.layout) == 4


def test_each_data_source_has_its_own_gate():
    gates = {"hard": GateSettings(threshold=0.5)}
    batch = [question("a", [1, 0, 0, 0], source="hard"), question("b", [1, 0, 0, 0], source="easy")]
    result = plan(batch, settings(questions_per_step=2, gates=gates))
    assert [d.zone for d in result.decisions] == ["demo", "rl"]


def test_group_members_share_the_advantage_baseline_with_rollouts():
    result = plan([question("a", [0, 0, 0])], settings("luffy"))
    assert result.advantage == pytest.approx([-0.25, -0.25, -0.25, 0.75])
    assert result.w_rl == pytest.approx(1 / (4 * 16))


def test_several_demonstrations_each_get_a_row_and_share_the_questions_weight():
    result = plan([question("a", [0, 0], demos=3)], settings())
    assert list(result.kind) == [DEMO] * 3 and result.w_demo == pytest.approx(0.1 / 3 / 7)


def test_s3ft_trains_on_its_first_correct_rollout_else_on_the_demonstration():
    result = plan([question("a", [0, 1, 1]), question("b", [0, 0])], settings("s3ft", questions_per_step=2))
    assert list(zip(result.question, result.kind, result.index, strict=True)) == [(0, ROLLOUT, 1), (1, DEMO, 0)]


# --- what a question trains on, by value ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rewards", "demos", "expected"),
    [
        ("sft", [1, 0], 1, gate.DEMO),
        ("sft", [1, 0], 0, Decision("none", 0.0, 0.0, 0.0)),
        ("dr_grpo", [0, 0], 0, gate.RL),
        ("luffy", [0, 0], 1, gate.BOTH),
        ("luffy", [0, 0], 0, gate.RL),
        ("hpt", [0, 0], 1, gate.DEMO),
        ("hpt", [1, 0], 1, gate.RL),
        ("s3ft", [0, 1], 1, Decision("own", 0.0, 0.0, 1.0)),
        ("s3ft", [0, 1], 0, Decision("own", 0.0, 0.0, 1.0)),
        ("s3ft", [0, 0], 1, gate.DEMO),
        ("s3ft", [0, 0], 0, Decision("none", 0.0, 0.0, 0.0)),
        ("superrl", [0, 0.5], 1, gate.RL),  # rewarded, though not solved
        ("superrl", [0, 0], 1, gate.DEMO),
        ("superrl", [-1, -0.5], 1, gate.DEMO),
        (
            "hpt_soft",
            [1, 0],
            1,
            Decision("soft", 1.0, 0.25, 0.0),
        ),  # entry 5: half of 7 rounded up, the demonstration's 1
    ],
)
def test_the_decision_of_every_rule(method, rewards, demos, expected):
    assert plan([question("a", rewards, demos)], settings(method)).decisions == [expected]


# --- the entropy bonus ----------------------------------------------------------------------------------------------


STEP = [question("a", [1, 0]), question("b", [0, 0, 0]), question("c", [1, 1, 0], demos=0)]  # lengths 5, 6, …


@pytest.mark.parametrize("normalization", ["question", "sequence", "token", "paper"])
@pytest.mark.parametrize("method", ["hpt", "luffy", "hpt_soft"])
def test_the_entropy_bonus_weighs_rollouts_as_their_own_terms_and_demonstrations_by_nothing(method, normalization):
    made = plan(STEP, settings(method, normalization=normalization, questions_per_step=9))
    rollouts = made.kind == ROLLOUT
    assert (made.w_rl[rollouts] > 0).all() and (made.kind == DEMO).any()
    assert made.w_entropy[rollouts].tolist() == made.w_rl[rollouts].tolist()
    assert made.w_entropy[~rollouts].tolist() == [0] * (~rollouts).sum()


def test_the_official_entropy_bonus_is_a_mean_over_the_rollouts_tokens():
    made = plan(STEP, settings("luffy", normalization="official", questions_per_step=9))
    rollouts = made.kind == ROLLOUT
    assert made.w_entropy[rollouts] == pytest.approx([1 / (5 + 6 + 5 + 6 + 7 + 5 + 6 + 7)] * 8)
    assert made.w_entropy[~rollouts].tolist() == [0, 0]
    gated = plan(STEP, settings("hpt", normalization="official", questions_per_step=9))
    assert gated.w_entropy[gated.kind == ROLLOUT] == pytest.approx([1 / (5 + 6 + 5 + 6 + 7)] * 5)


def test_the_official_entropy_bonus_goes_by_optimizer_step_and_by_share():
    """Each step has the mean over its own tokens; a share of the rollouts is a share of their bonus."""
    made = plan(STEP[:2], settings("luffy", normalization="official", questions_per_step=1))
    for q, tokens in ((0, 5 + 6), (1, 5 + 6 + 7)):
        here = (made.question == q) & (made.kind == ROLLOUT)
        assert made.w_entropy[here] == pytest.approx([1 / tokens] * here.sum())
    halves = GateSettings(soft=((0.5, 0, 0.5),) * 2)
    made = plan(STEP[:1], settings("hpt_soft", normalization="official", gate=halves))
    assert made.w_entropy.tolist() == pytest.approx([0.5 / 11, 0.5 / 11, 0])


def test_own_rollouts_that_are_imitated_have_no_entropy_bonus():
    made = plan([question("a", [0, 1])], settings("s3ft"))
    assert (made.w_rl.tolist(), made.w_entropy.tolist()) == ([0], [0]) and made.w_demo == pytest.approx([0.1 / 6])


# --- steps without a row --------------------------------------------------------------------------------------------


def test_a_batch_without_a_question_is_a_step_of_padding():
    made = plan([], settings(ranks=2, rows_multiple=3, questions_per_step=4))
    assert (made.steps, made.rows_per_step, made.layout.tolist(), len(made)) == (1, 6, [PADDING] * 6, 0)
    assert made.decisions == made.solved == made.dropped == []


def test_rows_are_dealt_by_load_to_the_rank_with_the_fewest_tokens():
    """Demonstrations of 40, 30, 20 and 10 tokens on two ranks: 40 and 10, 30 and 20."""
    batch = [Question(str(n), np.zeros(1), np.ones(1, int), demo_lengths=np.array([n]), demo_rewards=np.ones(1))
             for n in (10, 20, 30, 40)]  # fmt: skip
    made = plan(batch, settings("sft", questions_per_step=4, ranks=2))
    assert (made.steps, made.rows_per_step) == (1, 4)
    assert [made.tokens[row] for row in made.layout] == [40, 10, 30, 20]


# --- why a row is left out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rewards", "demos", "gated", "why"),
    [
        ("hpt", [0, 0], 1, {}, "the question trains on its demonstration"),
        ("hpt_off_on", [1, 0], 1, {"off": 0.5}, "the question trains off-policy on its demonstration"),
        ("s3ft", [0, 1], 1, {}, "the question trains on its first correct rollout"),
        ("s3ft", [0, 0], 0, {}, "the method trains on demonstrations only, and the question has no usable one"),
        ("hpt_soft", [0, 0], 1, {"soft": ((0, 0, 1), (1, 0, 0))}, "its coefficient is 0"),
    ],
)
def test_a_rollout_that_is_left_out_says_why(method, rewards, demos, gated, why):
    made = plan([question("a", rewards, demos)], settings(method, gate=GateSettings(**gated)))
    assert {d.why for d in made.dropped if d.kind == ROLLOUT} == {why}


@pytest.mark.parametrize(
    ("method", "rewards", "gated", "why"),
    [
        ("hpt", [1, 0], {}, "the question trains on its rollouts"),
        ("s3ft", [0, 1], {}, "the question trains on its own correct rollout"),
        ("hpt_soft", [1, 1], {"soft": ((0, 0, 1), (1, 0, 0))}, "its coefficient is 0"),
    ],
)
def test_a_demonstration_that_is_left_out_says_why(method, rewards, gated, why):
    made = plan([question("a", rewards)], settings(method, gate=GateSettings(**gated)))
    assert [(d.question, d.index, d.why) for d in made.dropped if d.kind == DEMO] == [(0, 0, why)]


# --- what is dealt, and what is the default -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_imitating_and_reinforcing_questions_are_each_spread_evenly_over_the_steps(seed):
    batch = [question(i, [float(i % 2), 0]) for i in range(16)]
    made = plan(batch, settings(questions_per_step=4, seed=seed))
    step_of = {made.question[row]: made.step[row] for row in range(len(made))}
    for solved in (0, 1):
        of_kind = [step_of[q] for q in range(16) if q % 2 == solved]
        assert np.bincount(of_kind, minlength=4).tolist() == [2, 2, 2, 2], solved


def test_every_question_has_its_decision():
    with pytest.raises(ValueError, match="zip"):
        plan([question("a", [0]), question("b", [1])], settings(), [gate.RL])


def test_a_question_has_no_demonstration_and_a_plan_one_rank_where_nothing_says_otherwise():
    bare = Question("a", np.array([1.0]), np.array([2]))
    assert (len(bare.demo_lengths), len(bare.demo_rewards)) == (0, 0)
    made = plan([bare], settings(questions_per_step=1))
    assert (made.steps, made.rows_per_step, made.layout.tolist()) == (1, 1, [0])


def test_rollouts_without_a_token_have_no_entropy_bonus_and_harm_no_other():
    empty = Question("a", np.array([0.0, 1.0]), np.zeros(2, int))
    made = plan([empty], settings("dr_grpo", normalization="official"))
    assert made.w_entropy.tolist() == [1.0, 1.0] and np.isfinite(made.w_rl).all()
