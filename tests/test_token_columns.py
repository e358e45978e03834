"""What a dataset's columns say of each demonstration, from the row to the loss: weights, teacher, likelihood."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine.batches import announce, contents, model_output, random_case, row_batch, whole
from omegaconf import OmegaConf
from test_questions import Letters, group, scored
from verl_config import compose

from verl_hpt import config
from verl_hpt.demos.demonstration import plain, relative
from verl_hpt.demos.read import packed, unpacked
from verl_hpt.errors import UserError
from verl_hpt.gate import GateSettings
from verl_hpt.host import refusals
from verl_hpt.host.batch import Reader, questions_of
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.host.rows import columns_of_tokens
from verl_hpt.host.run import Run
from verl_hpt.loss import ROW_FIELD, TEACHER, WEIGHTS, LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.plan import DEMO, PADDING, PlanSettings, plan
from verl_hpt.tools.explain import explain

GROUPS = [([1, 0, 0], 2), ([0, 0, 0], 2), ([0, 0, 0], 1), ([1, 1, 0], 1)]
OFF_POLICY = {"compose": {"demos": [{"kind": "R", "estimator": {"reference": "teacher", "advantage": "reward"}}]}}
OWN = {"rollouts": None, "when": "own", "normalization": "token"}
COLUMNS = ("token_weights", "teacher_log_prob")


class Step:
    """One optimizer step whose demonstrations have weights and a teacher's log-probs on each token."""

    def __init__(self, method, seed=0, normalization="question", told=COLUMNS):
        draw = np.random.default_rng(seed)
        self.method, self.case = method, random_case(seed, GROUPS)
        settings = PlanSettings(method, normalization, 24.0, 1.0, GateSettings(), questions_per_step=9, rows_multiple=7)
        self.plan = plan(self.case.questions, settings)
        self.layout = self.plan.layout
        self.rows = contents(self.case, self.plan, self.layout)
        self.batch = row_batch(self.case, self.plan, self.layout, torch.float64)
        self.is_demo = np.append(self.plan.kind, -1)[self.layout] == DEMO
        self.columns = [
            {
                "token_weights": relative(draw.uniform(0.1, 3, len(row.answer)), row.mask),
                "teacher_log_prob": -draw.uniform(0.1, 9, len(row.answer)),
            }
            if demo
            else None
            for row, demo in zip(self.rows, self.is_demo, strict=True)
        ]
        self.fields = ("response_mask", "old_log_probs", ROW_FIELD)
        self.told = told
        new = [[x + y for x, y in zip(r.old, draw.normal(0, 1, len(r.old)), strict=True)] for r in self.rows]
        self.new = [np.minimum(row, -0.01) for row in new]

    def with_weights(self, weights) -> list[dict | None]:
        """The columns with other weights on demonstrations."""
        return [c and {"token_weights": weights(row)} for c, row in zip(self.columns, self.rows, strict=True)]

    def gradients(self, columns=None, told=None) -> tuple[float, list[np.ndarray]]:
        """Loss, and its gradient on the log-probs of each row's answer."""
        told = self.told if told is None else told
        lengths = [len(row.answer) for row in self.rows]
        marks = columns_of_tokens(told, lengths, self.columns if columns is None else columns)
        batch = self.batch.clone()
        for name, column in marks.items():
            batch[name] = column
        spec = LossSpec(self.method, fields=(*self.fields, *marks))
        leaf = whole(self.rows, self.new, torch.float64).requires_grad_()
        loss, _ = hpt_loss(model_output(batch, leaf), announce(batch), spec=spec)
        loss.backward()
        rows = model_output(batch, leaf.grad)["log_probs"].unbind()
        return loss.item(), [g[len(r.prompt) - 1 : -1].numpy() for g, r in zip(rows, self.rows, strict=True)]


@pytest.mark.parametrize("method", ["hpt", "hpt_mix_on", "luffy", "dft"])
@pytest.mark.parametrize("seed", range(3))
def test_weights_multiply_the_gradient_of_demonstrations_alone(method, seed):
    step = Step(METHODS[method], seed)
    _, bare = step.gradients(told=())
    loss, weighted = step.gradients(told=("token_weights",))
    assert step.is_demo.any() and math.isfinite(loss)
    for before, after, columns, row in zip(bare, weighted, step.columns, step.rows, strict=True):
        factor = np.ones(len(before)) if columns is None else columns["token_weights"]
        assert after == pytest.approx(before * factor * np.array(row.mask), rel=1e-6, abs=1e-12)


def test_equal_weights_change_nothing_and_weights_have_a_mean_of_one():
    assert relative([3.0, 3.0, 3.0], [1, 1, 0]).tolist() == [1, 1, 0]
    assert relative([1.0, 3.0, 9.0, 0.0], [1, 1, 0, 1]).tolist() == [0.75, 2.25, 0, 0]
    step = Step(METHODS["hpt"])
    same = step.with_weights(lambda row: relative(np.full(len(row.mask), 7.0), row.mask))
    assert step.gradients(same, ("token_weights",))[0] == pytest.approx(step.gradients(told=())[0], rel=1e-6)


def test_weighted_nll_is_the_mean_under_the_weights():
    """(λ/Q) Σ_q (1/k) Σ_j Σ_t w·NLL / Σ_t w, written out."""
    step = Step(METHODS["hpt"], seed=4)
    loss, _ = step.gradients(told=("token_weights",))
    loss_rl, _ = step.gradients(step.with_weights(lambda row: np.zeros(len(row.mask))), ("token_weights",))
    expected, questions = 0.0, len(np.unique(step.plan.question))
    for place in np.flatnonzero(step.is_demo):
        weights = step.columns[place]["token_weights"]
        k = len(step.case.questions[step.plan.question[step.layout[place]]].demo_lengths)
        expected += -(weights * step.new[place]).sum() / weights.sum() / k / questions
    assert loss - loss_rl == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_teacher_is_the_reference_and_its_ratio_is_capped(seed):
    method = config.resolve_method(config.load(OFF_POLICY))
    step = Step(method, seed, told=("teacher_log_prob",))
    _, gradients = step.gradients()
    capped = 0
    for place in np.flatnonzero(step.is_demo):
        row, at = step.rows[place], step.layout[place]
        ratio = np.exp(step.new[place] - step.columns[place]["teacher_log_prob"])
        capped += (ratio > 100).sum()
        expected = -step.plan.w_rl[at] * np.minimum(ratio, 100) * step.plan.reward[at] * np.array(row.mask)
        assert gradients[place] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert seed != 0 or capped, "the cap is met"


@pytest.mark.parametrize("hpt", [{"method": "hpt"}, OFF_POLICY], ids=["weights", "weights and teacher"])
def test_explain_tells_what_the_loss_does(hpt):
    told = COLUMNS if hpt is OFF_POLICY else COLUMNS[:1]
    settings = {**hpt, "normalization": "question", "rl_length_scale": 24.0, "demo_coef": 1.0}
    step = Step(config.resolve_method(config.load(settings)), seed=5, told=told)
    _, gradients = step.gradients()
    at = {
        (step.plan.question[row], step.plan.kind[row], step.plan.index[row]): place
        for place, row in enumerate(step.layout)
        if row != PADDING
    }
    case = {"hpt": settings, "questions": []}
    for number, question in enumerate(step.case.questions):
        sides = [[], []]
        for kind, rewards in ((0, question.rewards), (1, question.demo_rewards)):
            for index, reward in enumerate(rewards):
                length = int((question.lengths, question.demo_lengths)[kind][index])
                row = {"length": length, "reward": float(reward), "log_prob": -1.0}
                if (place := at.get((number, kind, index))) is not None:
                    here = np.array(step.rows[place].mask, dtype=bool)
                    row["log_prob"] = step.new[place][here].tolist()
                    row["old_log_prob"] = np.array(step.rows[place].old)[here].tolist()
                    if kind == DEMO:
                        row |= {name: step.columns[place][name][here].tolist() for name in told}
                elif kind == DEMO:
                    row["teacher_log_prob"] = -1.0
                sides[kind].append(row)
        case["questions"].append({"uid": str(number), "rollouts": sides[0], "demos": sides[1]})
    rows = explain(case)["rows"]
    assert {row["kind"] for row in rows} == {"rollout", "demo"}
    for row in rows:
        place = at[int(row["uid"]), int(row["kind"] == "demo"), row["index"]]
        here = np.array(step.rows[place].mask, dtype=bool)
        assert gradients[place][here] == pytest.approx(row["gradient"], rel=1e-5, abs=1e-9)


def test_the_loss_names_a_field_that_it_was_promised():
    step = Step(METHODS["hpt"])
    spec = LossSpec(METHODS["hpt"], fields=(*step.fields, WEIGHTS, TEACHER))
    output = model_output(step.batch, whole(step.rows, step.new, torch.float64))
    with pytest.raises(KeyError, match=rf"{WEIGHTS}, {TEACHER}"):
        hpt_loss(output, announce(step.batch), spec=spec)


# --- from the row to the plan -----------------------------------------------------------------------------------------


def ask(groups, likelihoods=None, **demo):
    plan_settings = PlanSettings(METHODS["hpt"], "question", 8.0)
    zeros, reader = np.zeros(2), Reader(Letters(), 0, config.Demo(**demo), max_length=8)
    return questions_of(groups, scored(zeros), reader, plan_settings, 1, None, likelihoods)[:3]


def test_columns_come_with_the_demonstration_and_weights_are_relative():
    asked = [group(["ab", "c"], w=[[1.0, 3.0, 0.0], None], t=[[-1.0, -2.0, -3.0], [-1.0, -1.0]], s=["x", "y"])]
    _, read, counts = ask(asked, per_question=2, token_weights="w", teacher_log_prob="t", source="s")
    first, second = (demo.values for demo in read[0])
    assert first["token_weights"].tolist() == [0.75, 2.25, 0.0] and "token_weights" not in second
    assert first["teacher_log_prob"].tolist() == [-1.0, -2.0, -3.0] and (first["source"], second["source"]) == (
        "x",
        "y",
    )
    assert counts == {"demo_source/x": 1, "demo_source/y": 1}


def test_a_row_without_demonstrations_or_values_says_so_and_nothing_of_columns():
    _, read, counts = ask([group(None, w=[], s="x")], token_weights="w", source="s")
    assert read == [[]] and counts == {"unusable": 1, "unusable/null": 1}
    _, read, counts = ask([group(["a", "b"], w=[None, None], s=None)], token_weights="w", source="s", per_question=2)
    assert len(read[0]) == 2 and not counts


def test_rounding_and_huge_weights_do_no_harm():
    given = {"w": [1e308, 1e308, 1e308], "t": [-1.0, 1e-7, -0.5]}
    _, read, _ = ask([group("ab", **given)], token_weights="w", teacher_log_prob="t")
    values = read[0][0].values
    assert values["token_weights"].tolist() == [1, 1, 1] and values["teacher_log_prob"].tolist() == [-1.0, 0.0, -0.5]


@pytest.mark.parametrize("need, rows", [("old_log_prob", 6), ("ref_log_prob", 12)])
def test_rows_of_a_pass_divide_by_the_micro_batches_of_the_model_that_runs_it(need, rows):
    sizes = {"rollout": (False, 3), "ref": (False, 4)}
    parts = {k: {"log_prob_use_dynamic_bsz": d, "log_prob_micro_batch_size_per_gpu": n} for k, (d, n) in sizes.items()}
    run = SimpleNamespace(verl_config=OmegaConf.create({"actor_rollout_ref": {"actor": {}, **parts}}))
    assert Run.log_prob_multiple(run, 1 if need == "ref_log_prob" else 2, need) == rows


@pytest.mark.parametrize(
    "columns",
    [{"w": [1.0, 1.0]}, {"w": [1.0, 1.0, -1.0]}, {"t": None}, {"t": [-1.0, -1.0, 0.5]}, {"w": [[1.0] * 3, [1.0] * 3]}],
    ids=str,
)
def test_a_column_that_does_not_fit_makes_the_demonstration_unusable_and_is_counted(columns):
    given = {"w": [1.0, 1.0, 1.0], "t": [-1.0, -1.0, -1.0]} | columns
    _, read, counts = ask([group("ab", **given)], token_weights="w", teacher_log_prob="t")
    assert read == [[]] and counts["unusable/bad_column"] == 1


SAY, TOOL = {"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}


@pytest.mark.parametrize(
    "cell",
    [None, "text", ["a", "b"], [SAY], [[SAY], [SAY]], [[SAY], [SAY, TOOL, SAY]], [[1.0, 2.0], [1.0]], [[1.0], None]],
    ids=str,
)
def test_every_cell_goes_through_verls_agent_loop_and_comes_back(cell):
    """verl's own collate, then what its agent loop does with each column of a row."""
    from verl.utils.dataset.rl_dataset import collate_fn

    batch = packed([{"target": cell, "index": i} for i in range(2)], collate=collate_fn)
    value = batch["target"][1]
    for _ in range(2):
        value = np.array([value] * 3)[1]
    assert unpacked(plain(value)) == cell


def test_a_model_is_asked_once_and_only_about_questions_with_a_choice():
    asked = []

    def likelihoods(pairs):
        asked.append([(g.key, demo.index) for g, demo in pairs])
        return [-3.0, -1.0, -2.0]

    choice, single = group(["a", "b", "c"]), group("d")
    _, read, _ = ask([choice, single], likelihoods, select="likelihood", likelihood_of="policy")
    assert asked == [[("key", 0), ("key", 1), ("key", 2)]]
    assert [demo.index for demo in read[0]] == [1] and len(read[1]) == 1
    ask([single], likelihoods, select="likelihood", likelihood_of="policy")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (OFF_POLICY, r"name their column in hpt\.demo\.teacher_log_prob"),
        ({"demo": {"teacher_log_prob": "t"}}, r"nothing in method hpt reads it"),
        (
            {"compose": {"rollouts": {"reference": "teacher"}, "when": "never"}},
            "takes the teacher as reference on rollouts",
        ),
        ({"demo": {"select": "likelihood", "likelihood_of": "reference"}}, "needs verl's reference model"),
        ({"demo": {"likelihood_of": "policy"}}, "likelihood_of=policy has no effect: set hpt.demo.select=likelihood"),
        ({"demo": {"log_likelihood": "x"}}, "log_likelihood is set, but select=first"),
        ({"demo": {"other_log_prob": "x"}}, "other_log_prob is set, but nothing in method hpt reads it"),
        (
            {"compose": {**OWN, "demos": [{"kind": "S", "estimator": {"reference": "teacher", "advantage": "unit"}}]}},
            r"own rollouts too \(when: own\), and these have no teacher_log_prob",
        ),
        (
            {"compose": {**OWN, "demos": [{"kind": "S", "estimator": {"advantage": "preference"}}]}},
            r"own rollouts too \(when: own\), and these have no other_log_prob",
        ),
    ],
)
def test_settings_that_have_nothing_to_work_on_are_refused(node, message):
    with pytest.raises(UserError, match=message):
        refusals.settle(compose(), node, has_reference=False, has_critic=False)
