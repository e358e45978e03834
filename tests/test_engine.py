"""The same optimizer step, however it is cut: golden numbers, verl's real FSDP2 engine, and equal steps on every rank.

Verl's engine runs once on one rank and once on two (gloo, a tiny model in float32), all settings and cuts of
``engine/settings.py`` in one process group each; the tests below read what the ranks wrote.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from engine.batches import Case, Content, announce, contents, model_output, row_batch, whole
from engine.run import distance, results_of
from engine.settings import CUTS, SETTINGS, STARTED

from verl_hpt.gate import GateSettings
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, PlanSettings, Question, plan

RANKS = (1, 2)
TOLERANCE = 1e-5

# --- golden numbers over every split --------------------------------------------------------------------------------


def golden_case(questions: list[tuple[list[int], list[int], list[tuple[int, float]]]]) -> tuple[Case, dict]:
    """Questions as (rewards, lengths, [(tokens, log π) of each demonstration]); rollouts at ratio 1 and log π = −1.

    Returns the case, and log π of each row by (question, kind, index).
    """
    found, content, log_prob = [], {}, {}
    for number, (rewards, lengths, demos) in enumerate(questions):
        rows = [(ROLLOUT, i, length, -1.0) for i, length in enumerate(lengths)]
        rows += [(DEMO, i, length, x) for i, (length, x) in enumerate(demos)]
        for kind, index, length, x in rows:
            content[number, kind, index] = Content([1, 2], [3] * length, [1] * length, [-1.0] * length, [-1.0] * length)
            log_prob[number, kind, index] = x
        found.append(
            Question(
                f"q{number}",
                np.array(rewards, dtype=float),
                np.array(lengths),
                demo_lengths=np.array([length for length, _ in demos], dtype=int),
                demo_rewards=np.ones(len(demos)),
            )
        )
    return Case(found, content), log_prob


G1 = golden_case(
    [([1, 0, 0, 0], [4, 6, 8, 2], []), ([0, 0, 0, 0], [5, 5, 5, 5], [(10, -0.5)]), ([1, 1, 1, 1], [3, 3, 3, 3], [])]
)
G2 = golden_case([([0, 0], [3, 3], [(2, -2.0)]), ([0, 0], [3, 3], [(8, -1.0)])])

# Design section 4: G1 has Σ −Â·tokens = 1, L = 16 and a demonstration of NLL 5 over 10 tokens; G2 has NLL 4/2 and 8/8.
GOLDEN = [
    (G1, "official", 1.0, 1 / 16, 5 / 10),
    (G1, "official", 0.3, 1 / 16, 0.15),
    (G1, "paper", 1.0, 1 / 4, 0.5),
    (G1, "token", 1.0, 1 / 32, 0.5),
    (G1, "question", 1.0, 1 / 4 / 16 / 3, 0.5 / 3),
    (G2, "official", 1.0, 0.0, 12 / 10),
    (G2, "token", 1.0, 0.0, 12 / 10),
    (G2, "question", 1.0, 0.0, (2.0 + 1.0) / 2),
    (G2, "paper", 1.0, 0.0, 2.0 + 1.0),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("golden", "normalization", "demo_coef", "rl", "demo"), GOLDEN)
def test_golden_numbers_over_every_split_into_micro_batches_and_ranks(
    golden, normalization, demo_coef, rl, demo, ranks
):
    """Every way to cut each rank's rows in order; a rank's loss is the sum over its micro-batches, the step's the mean
    over ranks, as verl's engine and FSDP have it."""
    (case, log_prob), method = golden, METHODS["hpt"]
    result = plan(
        case.questions,
        PlanSettings(method, normalization, 16.0, demo_coef, GateSettings(0.0), questions_per_step=8, ranks=ranks),
    )
    chunks = result.layout.reshape(ranks, -1)

    @functools.cache
    def micro_batch(rank: int, start: int, end: int) -> np.ndarray:
        layout = chunks[rank][start:end]
        rows = contents(case, result, layout)
        numbers = [
            [-0.3] if row == PADDING else [log_prob[result.question[row], result.kind[row], result.index[row]]]
            for row in layout
        ]
        batch = announce(row_batch(case, result, layout, torch.float64), dp_size=ranks)
        answers = [x * len(row.answer) for x, row in zip(numbers, rows, strict=True)]
        leaf = whole(rows, answers, torch.float64).requires_grad_()
        loss, metrics = hpt_loss(model_output(batch, leaf), batch, spec=LossSpec(method))
        return np.array([loss.item(), metrics["hpt/loss_rollouts"].aggregate(), metrics["hpt/loss_demos"].aggregate()])

    m = chunks.shape[1]
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, m), k) for k in range(m)):
        edges = [0, *cuts, m]
        total = sum(micro_batch(r, a, b) for r in range(ranks) for a, b in itertools.pairwise(edges)) / ranks
        assert total == pytest.approx([rl + demo, rl, demo], abs=1e-6), f"cut at {cuts}"


# --- verl's engine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> dict[int, dict]:
    """What verl's engine did on one rank and on two. {ranks: {(setting, cut): steps and metrics}}"""
    return results_of(tmp_path_factory.mktemp("engine"), {ranks: (ranks, "padded") for ranks in RANKS})


TRAINS = [name for name in SETTINGS if name != "no active token"]


@pytest.mark.parametrize("name", TRAINS)
def test_gradient_does_not_depend_on_micro_batches_or_ranks(engine, name):
    reference = engine[1][name, "1 fixed"]["steps"]
    compared = 0
    for ranks, cut in itertools.product(RANKS, CUTS):
        steps = engine[ranks][name, cut]["steps"]
        assert len(steps) == len(reference)
        for step, expected in zip(steps, reference, strict=True):
            assert expected["gradient"].norm() > 1e-3
            assert distance(step["gradient"], expected["gradient"]) <= TOLERANCE, f"{ranks} ranks, {cut}"
            compared += 1
    assert compared == len(RANKS) * len(CUTS) * len(reference)


@pytest.mark.parametrize("name", TRAINS)
def test_metrics_do_not_depend_on_micro_batches_or_ranks(engine, name):
    reference = engine[1][name, "1 fixed"]["metrics"]
    sent = [key for key in reference if key.startswith("hpt/")]
    assert "hpt/loss_demos" in sent
    for ranks, cut in itertools.product(RANKS, CUTS):
        metrics = engine[ranks][name, cut]["metrics"]
        for key in [*sent, "loss"]:
            assert metrics[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-5), f"{key}, {ranks} ranks, {cut}"


def test_cuts_are_what_their_names_say(engine):
    """Micro-batches of each cut, and some of them without an active token."""
    for ranks, (name, cut) in itertools.product(RANKS, CUTS.items()):
        active = engine[ranks]["hpt", name]["steps"][0]["active"]
        counts = {len(of_rank) for of_rank in active}
        assert len(counts) == 1, "all ranks have the same number of micro-batches"
        wanted = cut.count
        assert counts == {wanted} if not cut.dynamic else abs(counts.pop() - wanted) <= max(1, wanted // 2)
    assert 0 in engine[1]["hpt", "8 fixed"]["steps"][0]["active"][0]
    assert 0 in engine[2]["hpt", "8 fixed"]["steps"][0]["active"][1]


def test_rank_without_an_active_token_keeps_the_gradient(engine):
    """One demonstration on two ranks."""
    step = engine[2]["one demonstration", "1 fixed"]["steps"][0]
    assert sorted(sum(of_rank) for of_rank in step["active"])[0] == 0
    assert distance(step["gradient"], engine[1]["one demonstration", "1 fixed"]["steps"][0]["gradient"]) <= TOLERANCE


@pytest.mark.parametrize("ranks", RANKS)
def test_step_without_any_active_token_has_a_gradient_of_zeros(engine, ranks):
    for cut in CUTS:
        (step,) = engine[ranks]["no active token", cut]["steps"]
        assert step["gradient"].numel() > 0 and step["gradient"].abs().max() == 0


@pytest.mark.parametrize("ranks", RANKS)
def test_steps_of_only_one_kind(engine, ranks):
    def sums(name):
        return {
            key: value for key, value in engine[ranks][name, "2 fixed"]["metrics"].items() if key.startswith("hpt/")
        }

    only_demos, only_rollouts = sums("demonstrations only"), sums("rollouts only")
    assert only_demos["hpt/rl_tokens_rollouts"] == [0] and only_demos["hpt/tokens_demos"][0] > 0
    assert only_rollouts["hpt/tokens_demos"] == [0] and only_rollouts["hpt/rl_tokens_rollouts"][0] > 0


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["uft", "prefix_rft, entropy bonus and KL loss"])
def test_tokens_of_prefixes_are_the_demonstrations(engine, ranks, name):
    """verl's mask leaves them out; the loss takes them in."""
    metrics = engine[ranks][name, "2 fixed"]["metrics"]
    given = sum(sum(prefixes) for _, _, *of_question in STARTED for prefixes in of_question)
    assert metrics["hpt/tokens_demos"] == [given] and metrics["hpt/strength_demos"][0] > 0


# --- equal steps on every rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions_per_step", [32, 64, 50])
def test_any_number_of_questions_on_rl_gives_equal_steps_on_every_rank(questions_per_step):
    """R of 128 questions on RL, 8 ranks: verl's cut (a contiguous chunk a rank, in order) finds the plan's steps."""
    draw = np.random.default_rng(0)
    settings = PlanSettings(
        METHODS["hpt"], "question", 64.0, questions_per_step=questions_per_step, ranks=8, rows_multiple=2
    )
    steps = -(-128 // questions_per_step)
    for on_rl in range(129):
        n = 4
        questions = [
            Question(
                f"q{i}",
                np.array([1.0, *[0.0] * (n - 1)] if i < on_rl else [0.0] * n),
                draw.integers(1, 60, n),
                demo_lengths=draw.integers(1, 60, 1),
                demo_rewards=np.ones(1),
            )
            for i in range(128)
        ]
        result = plan(questions, settings)
        assert result.steps == steps and len(result.layout) == steps * result.rows_per_step
        assert result.rows_per_step % (8 * 2) == 0
        of_ranks = result.layout.reshape(8, steps, result.rows_per_step // 8)  # a rank's chunk, cut in order
        seen = [of_ranks[:, s][of_ranks[:, s] != PADDING] for s in range(steps)]
        assert sorted(np.concatenate(seen)) == list(range(len(result))), "every row once"
        asked = [set(result.question[rows]) for rows in seen]
        taught = [set(result.question[rows[result.kind[rows] == DEMO]]) for rows in seen]
        assert sum(map(len, asked)) == 128, "a question stands whole in one step"
        for of_steps in (asked, taught):
            counts = [len(x) for x in of_steps]
            assert max(counts) - min(counts) <= 1
        assert sum(map(len, taught)) == 128 - on_rl
