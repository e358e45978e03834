"""The plan with prefixes, hints, streams and buffers: who is asked, which rows there are, what each weighs, where."""

from collections import Counter

import numpy as np
import pytest

from verl_hpt.gate import GateSettings
from verl_hpt.methods import METHODS
from verl_hpt.metrics import of_plan
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, PlanSettings, Question, decide, outcome_of, plan


def question(key, rewards, prefixes=None, starts=None, demos=0, own=4, **kwargs) -> Question:
    return Question(
        str(key),
        np.array(rewards, dtype=float),
        np.full(len(rewards), own),
        prefixes=None if prefixes is None else np.array(prefixes),
        starts=None if starts is None else np.array(starts),
        demo_lengths=np.full(demos, 7),
        demo_rewards=np.ones(demos),
        **kwargs,
    )


def beside(*lengths) -> list[Question]:
    """Demonstrations beside the questions, of so many tokens."""
    none = np.zeros(0)
    return [
        Question(f"beside/{n}/{i}", none, none.astype(int), demo_lengths=np.array([n]), demo_rewards=np.ones(1))
        for i, n in enumerate(lengths)
    ]


def settings(method, **kwargs) -> PlanSettings:
    chosen = METHODS[method]
    defaults = {"demo_coef": 0.3, "questions_per_step": 99}
    return PlanSettings(chosen, kwargs.pop("normalization", chosen.normalization), 16.0, **defaults | kwargs)


STARTED = question("a", [0, 0, 1, 1], prefixes=[0, 0, 3, 3])


# --- who is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"prefixes": [0, 0, 3, 5]}, {"starts": [0, 0, 1, 2]}])
def test_the_gate_counts_rollouts_that_started_from_nothing(how):
    asked = question("a", [0, 0, 1, 1], demos=1, **how)
    known = outcome_of(asked, settings("hpt"))
    assert (known.n, known.solved) == (2, 0) and decide(asked, settings("hpt")).zone == "demo"
    assert decide(question("a", [0, 0, 1, 1], demos=1), settings("hpt")).zone == "rl"


def test_the_gate_reads_metric_and_length_limit_of_the_same_rollouts():
    metric, cut = np.array([1.0, 1.0, 0.0, 0.0]), np.array([False, True, False, False])
    asked = question("a", [0, 0, 0, 0], starts=[0, 0, 1, 1], metric=metric, truncated=cut)
    known = outcome_of(asked, settings("hpt"))
    assert known.correct.tolist() == [True, False] and known.rewards.tolist() == [0, 0]
    assert plan([asked], settings("pope")).solved[0].tolist() == [True, False, False, False], "of all rollouts"


@pytest.mark.parametrize(
    ("rewards", "starts", "demos", "threshold", "zone"),
    [
        ([0, 0, 0], None, 1, 0.0, "collect"),
        ([0, 0, 0], None, 0, 0.0, "rl"),  # it has none to collect
        ([1, 0, 0], None, 1, 0.0, "rl"),
        ([1, 0, 0], None, 1, 0.5, "collect"),
        ([0, 0, 0], None, 1, -1.0, "rl"),
        ([], None, 1, 0.0, "rl"),  # a question without rollouts tells the gate nothing
    ],
)
def test_what_a_buffer_collects_is_what_the_gate_sends_to_demonstrations_and_its_rollouts_train(
    rewards, starts, demos, threshold, zone
):
    made = plan(
        [question("a", rewards, starts=starts, demos=demos)], settings("relift", gate=GateSettings(threshold=threshold))
    )
    assert made.decisions[0].zone == zone and (made.kind == ROLLOUT).all() and len(made) == len(rewards)
    assert {d.why for d in made.dropped} == (
        {"it waits in the buffer" if zone == "collect" else "the question trains on its rollouts"} if demos else set()
    )


@pytest.mark.parametrize(
    ("rewards", "zone"), [([1, 0], "keep"), ([1, 1], "rl"), ([0, 0], "rl"), ([1], "keep"), ([0], "rl"), ([], "rl")]
)
def test_a_buffer_of_successes_keeps_a_solved_rollout_of_what_is_partly_solved(rewards, zone):
    made = plan([question("a", rewards, demos=1)], settings("relift", collects="successes"))
    assert made.decisions[0].zone == zone and (made.kind == ROLLOUT).all() and len(made) == len(rewards)


@pytest.mark.parametrize("method", ["chord_mu", "chord_phi", "amft_style"])
def test_beside_a_stream_every_question_trains_on_its_rollouts(method):
    made = plan([question("a", [0, 0], demos=1)], settings(method, gate=GateSettings(threshold=1.0)))
    assert made.decisions[0].zone == "rl" and made.kind.tolist() == [ROLLOUT, ROLLOUT]


@pytest.mark.parametrize("method", ["prefix_rft", "uft", "stephint", "g2rpo_a", "questa", "pope", "guide"])
def test_a_demonstration_that_rollouts_start_from_is_no_row_of_its_own(method):
    prefix = {"prefixes" if METHODS[method].place == "prefix" else "starts": [0, 3]}
    batch = [question("a", [1, 0], demos=2, **prefix), question("b", [1, 0], demos=1)]
    bare = [question("a", [1, 0], **prefix), question("b", [1, 0])]
    made, alone = plan(batch, settings(method)), plan(bare, settings(method))
    assert (made.kind == ROLLOUT).all() and made.w_rl.tolist() == alone.w_rl.tolist()
    assert made.w_demo.tolist() == alone.w_demo.tolist()
    assert [d.why for d in made.dropped] == ["rollouts start from it, it is no row of its own"] * 3


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_with_a_prefix_by_value():
    made = plan([STARTED], settings("prefix_rft"))
    assert made.prefix.tolist() == [0, 0, 3, 3] and made.tokens.tolist() == [4, 4, 7, 7]
    assert made.advantage.tolist() == [0, 0, 0, 0], "each start is a group of its own"
    assert made.demo_advantage.tolist() == [0, 0, 0.5, 0.5]
    made = plan([STARTED], settings("uft"))
    assert made.prefix.tolist() == [0, 0, 3, 3] and made.tokens.tolist() == [4] * 4
    assert made.demo_tokens[2:].tolist() == [3, 3] and (made.w_demo > 0).tolist() == [False, False, True, True]
    assert made.advantage == pytest.approx(np.array([-1, -1, 1, 1]) * 0.5 / (1 / 3**0.5 + 1e-6))
    assert np.isnan(made.demo_advantage).all()
    made = plan([STARTED], settings("stephint"))
    assert made.prefix.tolist() == [0] * 4 and made.tokens.tolist() == [4] * 4, "its prefix is frozen"


def test_a_cut_rollout_that_is_masked_is_out_of_the_sums_but_not_out_of_the_advantage():
    cut = question("a", [1, 0, 1, 0], prefixes=[0, 0, 3, 3], truncated=np.array([False, False, True, False]))
    made = plan([cut], settings("prefix_rft", truncated="mask", normalization="token"))
    assert made.index.tolist() == [0, 1, 3] and [d.why for d in made.dropped] == ["it was cut at the length limit"]
    # It counts as 0: the mean of its start is 0, that of the plain ones 1/2, and k stays 2.
    assert made.advantage.tolist() == [0.5, -0.5, 0.0] and made.demo_advantage.tolist() == [0, 0, -0.25]
    assert made.w_rl == pytest.approx([1 / (4 + 4 + 7)] * 3)


def test_advantages_of_prefixes_are_made_of_what_all_are_made_of():
    """Returns where they differ from scores, and cut rollouts as failures where the settings say so."""
    rest = {"prefixes": [0, 0, 3, 5], "returns": np.array([0.5, 0.0, 0.75, 0.25])}
    for method, expected in (("prefix_rft", [0, 0, 0.5, 0.0]), ("g2rpo_a", [0.125, -0.375, 0.375, -0.125])):
        made = plan([question("a", [1, 0, 1, 1], **rest)], settings(method))
        scale = 1.0 if method == "prefix_rft" else np.std(rest["returns"], ddof=1) + 1e-6
        assert made.demo_advantage == pytest.approx(np.array(expected) / scale), method
    cut = question("a", [1, 0, 1, 1], prefixes=[0, 0, 3, 5], truncated=np.array([True, False, True, False]))
    made = plan([cut], settings("prefix_rft", truncated="unsolved"))
    assert made.demo_advantage.tolist() == [0, 0, 0, 1] and made.advantage.tolist() == [0, 0, 0, 1]


def test_draws_of_one_question_are_told_apart_by_how_their_rollouts_started():
    draws = [question("a", [1, 0], prefixes=own) for own in ([0, 3], [2, 0], [0, 0], [0, 5])]
    batch = [*draws, question("b", [1, 0])]

    def steps(order):
        made = plan([batch[i] for i in order], settings("prefix_rft", questions_per_step=2, seed=4))
        of_question = dict(zip(made.question, made.step, strict=True))
        return {order[place]: step for place, step in of_question.items()}

    assert steps([0, 1, 2, 3, 4]) == steps([4, 3, 2, 1, 0]) == steps([2, 4, 0, 3, 1])


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["question", "sequence", "token", "paper", "official"])
def test_what_stands_beside_is_a_pool_of_its_own(normalization):
    """Neither dilutes the other: the questions weigh as alone, the stream and the buffer as alone."""
    batch = [question(i, [1, 0, 0]) for i in range(4)]
    for method, place in (("chord_mu", "stream"), ("relift", "buffer")):
        chosen = settings(method, normalization=normalization)
        given = {"stream": beside(2, 8)} if place == "stream" else {"buffer": [beside(2, 8)]}
        alone, made = plan(batch, chosen), plan(batch, chosen, **given)
        assert made.w_rl[:12].tolist() == alone.w_rl.tolist() and made.w_rl[12:].tolist() == [0, 0]
        assert made.w_entropy[:12].tolist() == alone.w_entropy.tolist() and not made.w_demo[:12].any()
        by_question = {"question": [1 / 2 / 2, 1 / 2 / 8], "paper": [1 / 2, 1 / 8]}
        by_question["sequence"] = by_question["question"]
        expected = by_question.get(normalization, [1 / 10, 1 / 10])
        assert made.w_demo[12:] == pytest.approx([0.3 * x for x in expected]), method


@pytest.mark.parametrize("normalization", ["question", "sequence", "token", "paper", "official"])
def test_a_convex_methods_rollouts_weigh_one_minus_mu_and_so_does_their_entropy_bonus(normalization):
    batch = [question(i, [1, 0, 0], own=5) for i in range(4)]
    convex, alone = (plan(batch, settings(name, normalization=normalization)) for name in ("chord_mu", "grpo"))
    assert convex.w_rl == pytest.approx(0.7 * alone.w_rl) and convex.w_entropy == pytest.approx(0.7 * alone.w_entropy)


@pytest.mark.parametrize("method", ["prefix_rft", "uft", "g2rpo_a", "stephint"])
def test_the_official_entropy_bonus_is_a_mean_over_own_tokens(method):
    """The bonus is taken on them alone."""
    made = plan([STARTED, question("b", [1], own=8)], settings(method, normalization="official"))
    assert made.w_entropy == pytest.approx([1 / (4 * 4 + 8)] * 5)


def test_sums_of_tokens_are_of_an_optimizer_step():
    """Two questions a step: RL tokens own and prefixes, demonstrations' tokens of the prefixes of the same step."""
    batch = [question(i, [1, 0], prefixes=[0, 2 + i]) for i in range(4)]
    made = plan(batch, settings("uft", questions_per_step=2, demo_coef=1.0))
    for step in range(2):
        of_step = made.step == step
        imitated = [2 + q for q in np.unique(made.question[of_step])]
        assert made.w_rl[of_step] == pytest.approx([1 / 16] * 4)
        assert sorted(made.w_demo[of_step]) == pytest.approx([0, 0, *[1 / sum(imitated)] * 2])


# --- optimizer steps and ranks ----------------------------------------------------------------------------------------


def test_a_stream_is_dealt_over_the_steps_of_the_questions_and_a_buffer_stands_after_them():
    batch = [question(i, [1, 0]) for i in range(4)]
    made = plan(batch, settings("chord_mu", questions_per_step=2, ranks=2), stream=beside(*range(1, 6)))
    assert made.steps == 2 and Counter(made.step[made.kind == DEMO]) in ({0: 3, 1: 2}, {0: 2, 1: 3})
    assert made.question[made.kind == DEMO].tolist() == [4, 5, 6, 7, 8], "they are numbered on"
    made = plan(batch, settings("relift", questions_per_step=2, ranks=2), buffer=[beside(1, 2, 3)])
    assert made.steps == 3 and made.step[made.kind == DEMO].tolist() == [2, 2, 2]  # B1: Q = 4, 2 a step, one extra
    assert made.step[made.kind == ROLLOUT].max() == 1 and len(made.decisions) == len(made.solved) == 4
    two = plan(batch, settings("relift", questions_per_step=2), buffer=[beside(1, 2), beside(3)])
    assert two.steps == 4 and two.step[two.kind == DEMO].tolist() == [2, 2, 3]
    for each in (made, two):
        assert sorted(row for row in each.layout if row != PADDING) == list(range(len(each)))


def test_a_streams_order_is_the_seeds_and_not_that_of_arrival():
    stream = beside(*range(1, 9))

    def steps(order, seed):
        chosen = settings("chord_mu", questions_per_step=1, seed=seed)
        made = plan([question(i, [1, 0]) for i in range(2)], chosen, stream=[stream[i] for i in order])
        of_rows = zip(made.question[made.kind == DEMO], made.step[made.kind == DEMO], strict=True)
        return {order[q - 2]: step for q, step in of_rows}

    assert steps(range(8), 1) == steps([7, 3, 1, 0, 2, 6, 5, 4], 1)
    assert len({tuple(sorted(steps(range(8), seed).items())) for seed in range(6)}) > 1


def test_a_buffer_without_questions_and_a_step_without_either_are_laid_out():
    made = plan([], settings("relift", ranks=2), buffer=[beside(2, 8, 5)])
    assert (made.steps, len(made)) == (2, 3) and made.step.tolist() == [1, 1, 1]
    assert made.layout.reshape(2, 2, 2)[:, 0].tolist() == [[PADDING, PADDING]] * 2
    assert plan([], settings("chord_mu"), stream=()).steps == 1


@pytest.mark.parametrize("method", ["prefix_rft", "uft", "g2rpo_a"])
def test_ranks_are_loaded_by_all_tokens_of_a_row(method):
    """Rows of 4 own tokens and prefixes of 30, 20, 10, 0: two ranks get 34 + 4 and 24 + 14."""
    made = plan([question("a", [1, 0, 0, 1], prefixes=[30, 20, 10, 0])], settings(method, ranks=2))
    assert [sorted(made.prefix[rank]) for rank in made.layout.reshape(2, -1)] == [[0, 30], [10, 20]]


# --- metrics of the plan ----------------------------------------------------------------------------------------------


def metrics(batch, method="prefix_rft", **kwargs) -> dict[str, float]:
    chosen = settings(method, **kwargs)
    return of_plan(plan(batch, chosen), batch, chosen, Counter())


def test_rates_are_of_rollouts_that_started_from_nothing():
    batch = [
        question("a", [0, 0, 1, 1], prefixes=[0, 0, 3, 5], source="x"),
        question("b", [1, 0, 0], prefixes=[0, 0, 2], source="y"),
        question("c", [1, 1], prefixes=[4, 4], source="y"),  # nothing is known of it
    ]
    told = metrics(batch)
    assert told["hpt/solve_rate"] == told["hpt/rl_solve_rate"] == 1 / 4
    assert told["hpt/all_fail_share"] == 1 / 2, "of the questions with a plain rollout"
    assert told["hpt/source/x/solve_rate"] == 0 and told["hpt/source/y/solve_rate"] == 1 / 2
    assert told["hpt/start/share"] == 5 / 9 and told["hpt/start/tokens"] == 3 + 5 + 2 + 4 + 4
    assert told["hpt/start/solve_rate"] == 4 / 5 and told["hpt/start/cut"] == 0
    assert told["hpt/zone/both"] == 1.0 and told["hpt/demo_share"] == told["hpt/taught_share"] == 0


def test_started_rollouts_that_were_cut_are_a_share_of_the_started_and_count_as_unsolved():
    cut = np.array([True, False, True, False, False])
    told = metrics([question("a", [1, 1, 1, 1, 0], prefixes=[0, 0, 3, 5, 5], truncated=cut)])
    assert (told["hpt/start/cut"], told["hpt/start/solve_rate"], told["hpt/solve_rate"]) == (1 / 3, 1 / 3, 1 / 2)


def test_hints_are_started_without_tokens_of_a_prefix():
    told = metrics([question("a", [0, 1, 1], starts=[0, 7, 7])], "guide")
    assert (told["hpt/start/share"], told["hpt/start/tokens"], told["hpt/start/solve_rate"]) == (2 / 3, 0, 1)
    assert told["hpt/solve_rate"] == 0


def test_a_step_in_which_all_or_none_started_says_what_it_can():
    told = metrics([question("a", [0, 1], prefixes=[2, 2])], "uft")
    assert not {"hpt/solve_rate", "hpt/rl_solve_rate"} & told.keys(), "nothing is known of plain rollouts"
    assert told["hpt/start/share"] == 1 and told["hpt/all_fail_share"] == 0
    told = metrics([question("a", [0, 1])], "uft")
    assert told["hpt/solve_rate"] == 0.5 and told["hpt/start/share"] == told["hpt/start/tokens"] == 0
    assert not {"hpt/start/solve_rate", "hpt/start/cut"} & told.keys()
    assert not any(name.startswith("hpt/start") for name in metrics([question("a", [0, 1])], "grpo"))


def test_the_strength_of_a_demonstrations_token_is_that_of_a_prefixs_or_the_streams():
    """uft: λ/prefix tokens over 1/own tokens; chord: μ/stream tokens over (1 − μ)/own tokens."""
    assert metrics([STARTED], "uft")["hpt/demo_to_rl_weight"] == pytest.approx((0.3 / 6) / (1 / 16))
    uneven = question("a", [0, 0, 1, 1], prefixes=[0, 0, 1, 4])  # λ/2 a row, so λ over 5 tokens
    told = metrics([uneven], "uft", normalization="sequence")
    assert told["hpt/demo_to_rl_weight"] == pytest.approx((0.3 / 5) / (1 / 4 / 4))
    chosen, batch = settings("chord_mu"), [question("a", [1, 0])]
    told = of_plan(plan(batch, chosen, stream=beside(2, 8)), batch, chosen, Counter())
    assert told["hpt/demo_to_rl_weight"] == pytest.approx((0.3 / 10) / (0.7 / 8))
    assert told["hpt/rows/demos"] == 2 and told["hpt/taught_share"] == 0
