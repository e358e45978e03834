"""``verl-hpt explain CASE.json``: what a method does to a small batch, on paper, with no model.

The case goes through the same plan, normalisation and estimator code that trains, as one optimizer step in float64.

    {"hpt": {"method": "hpt", "normalization": "official", "rl_length_scale": 16, "gate": {"threshold": 0.0}},
     "questions": [
       {"uid": "q1", "source": "math",
        "rollouts": [{"reward": 1, "length": 4, "log_prob": -1.0, "old_log_prob": -1.0, "entropy": 0.0}],
        "demos": [{"length": 10, "log_prob": -0.5, "reward": 1}]}]}

``hpt`` holds any settings (``rl_length_scale``: the longest row by default); the other keys are those of the classes
below. Modules that the case names in ``hpt.modules`` are imported with ``--import-modules`` only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from verl_hpt import config
from verl_hpt.demos.demonstration import relative
from verl_hpt.errors import UserError, raise_all, read
from verl_hpt.estimator import BESIDE, STARTS, Method, row_terms
from verl_hpt.gate import NEVER_DRAWN, Remembered
from verl_hpt.parts import ON_DEMAND, Constants, Tokens
from verl_hpt.plan import DEMO, Plan, PlanSettings, Question, plan

OF_TOKENS = tuple(name for name in ON_DEMAND if name != "other_log_prob")  # that one has a number a row
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
LogProb, Weight = Annotated[float, Field(le=0)], Annotated[float, Field(ge=0)]
LogProbs, Weights, Numbers = LogProb | list[LogProb], Weight | list[Weight], float | list[float]  # of tokens


class Row(BaseModel):
    """Numbers of a rollout or a demonstration; those of tokens are one for every token, or a list.

    advantage: what a critic would give. other_log_prob: the mean under other models. old_log_prob: by default log_prob.
    """

    model_config = STRICT
    length: int = Field(ge=1)
    log_prob: LogProbs
    old_log_prob: LogProbs | None = None
    ref_log_prob: LogProbs | None = None
    teacher_log_prob: LogProbs | None = None
    entropy: Numbers | None = None
    advantage: Numbers | None = None
    token_weights: None = Field(None, description="a demonstration's alone")
    other_log_prob: float | None = None

    @model_validator(mode="after")
    def _a_number_for_each_token(self):
        wrong = []
        for name in ("log_prob", *OF_TOKENS, "advantage", "token_weights"):
            value = getattr(self, name)
            if isinstance(value, float):
                setattr(self, name, [value] * self.length)
            elif value is not None and len(value) != self.length:
                wrong.append(f"{name}: {len(value)} numbers for a row of {self.length} tokens")
        if self.token_weights and not any(self.token_weights):
            wrong.append(f"token_weights={self.token_weights!r}: one must be above 0")
        if wrong:
            raise ValueError("\n".join(wrong))
        self.old_log_prob = self.old_log_prob or self.log_prob
        return self


class Rollout(Row):
    """truncated: it was cut at the length limit; metric: what ``hpt.gate.metric`` reads.

    prefix: how many of its tokens, the first ones, a demonstration wrote. start: equal where rollouts of the question
    started alike (the same hint); by default, and where it is 0, by prefix.
    """

    reward: float
    prefix: int = Field(0, ge=0)
    start: str | int | None = None
    truncated: bool = False
    metric: float | None = None

    @model_validator(mode="after")
    def _has_tokens_of_its_own(self):
        if self.prefix >= self.length:
            raise ValueError(f"prefix={self.prefix}: must leave a token of the {self.length} to the rollout")
        return self


class Demonstration(Row):
    """reward: by default ``hpt.demo.reward``."""

    reward: float | None = None
    token_weights: Weights | None = None


History = create_model("History", __config__=STRICT, **dict.fromkeys(NEVER_DRAWN, (int, Field(0, ge=0))))


class CaseQuestion(BaseModel):
    """skipped_rollouts: rollouts that were not sampled (early gate, SFT phase). history: what a gate reads of earlier
    draws, 0 by default."""

    model_config = STRICT
    uid: str | int | None = None
    source: str | int = ""
    rollouts: list[Rollout] = []
    demos: list[Demonstration] = []
    skipped_rollouts: int = Field(0, ge=0)
    history: History = History()


class Case(BaseModel):
    """actor: verl's clip range. step: the step that schedules are read at. stream, buffer: demonstrations beside the
    batch's questions, and in an optimizer step of their own."""

    model_config = STRICT
    hpt: Any = None
    questions: list[CaseQuestion] = Field(min_length=1)
    stream: list[Demonstration] = []
    buffer: list[Demonstration] = []
    actor: config.Clips = config.Clips()
    step: int = Field(1, ge=0)


def explain(case: Mapping, import_modules: bool = False) -> dict:
    """What the method of the case does to its rows.

    import_modules: import what ``hpt.modules`` of the case names, which runs its code; refused by default.

    Returns:
        rows: in input order, a dict a row that trains: uid, kind, index, zone, advantage (null on SFT rows),
            weight {rl, demo}, coefficient {rl, demo} (a number a token) and gradient, d loss / d log_prob a token;
        dropped: rows that do not train, and why;
        loss: rl sums what rollouts wrote, demo what demonstrations did (a row, or its prefix), whatever the term.

    Raises:
        UserError: every place in the case that is wrong, and the choices.
    """
    settings, problems = config.parse(case.get("hpt") if isinstance(case, Mapping) else None)
    case, of_case = read(Case, case, "case")
    raise_all([*problems, *of_case], "this case cannot be explained:")
    if settings.modules and not import_modules:
        raise UserError(
            f"hpt.modules={settings.modules!r}: explaining this case would import them and so run their code; if you "
            "trust them, add --import-modules"
        )
    method = config.resolve_method(settings)
    raise_all([*_misfits(case, method, settings)], "this case does not fit its settings:")
    clip = {constant: getattr(case.actor, name) for name, constant in config.CLIPS.items()}
    demo_reward = settings.demo.reward if isinstance(settings.demo.reward, float) else math.nan
    questions = [_question(question, i, settings, demo_reward) for i, question in enumerate(case.questions)]
    beside = {
        name: [
            _question(CaseQuestion(uid=f"{name}[{i}]", demos=[row]), i, settings, demo_reward)
            for i, row in enumerate(getattr(case, name))
        ]
        for name in BESIDE
    }
    rows = [[*question.rollouts, *question.demos] for question in case.questions]
    rows += [[row] for name in BESIDE for row in getattr(case, name)]
    result = plan(
        questions,
        PlanSettings(
            method=method,
            normalization=settings.normalization or method.normalization,
            length_scale=settings.rl_length_scale or max(row.length for of_question in rows for row in of_question),
            demo_coef=config.at(config.demo_coef(settings, method), case.step),
            gate=settings.gate.at(case.step),
            gates={source: own.gate.at(case.step) for source, own in settings.per_source.items()},
            truncated=settings.rollouts.truncated,
            collects=settings.buffer.content,
            questions_per_step=len(questions),
        ),
        stream=beside["stream"],
        buffer=[beside["buffer"]] if case.buffer else [],
    )
    entries = [*zip([*questions, *beside["stream"], *beside["buffer"]], rows, strict=True)]
    zones = [decision.zone for decision in result.decisions] + [name for name in BESIDE for _ in beside[name]]
    return _tell(entries, zones, result, method, config.constants(settings, **clip))


def _metric(question: CaseQuestion, settings: config.Settings) -> str | None:
    return settings.per_source.get(str(question.source), settings).gate.metric


def _misfits(case: Case, method: Method, settings: config.Settings) -> Iterator[str]:
    """What a case lacks for its method and settings, or has too much; of a number that rows lack, the first place."""
    questions = case.questions
    for name in BESIDE:
        if getattr(case, name) and method.place != name:
            yield f"case.{name}: method {method.name!r} has none (its demonstrations' place is {method.place!r})"
    for i, question in enumerate(questions):
        for j, row in enumerate(question.rollouts):
            for key, place in (("prefix", ("prefix",)), ("start", STARTS)):
                if getattr(row, key) and method.place not in place:
                    yield (
                        f"case.questions[{i}].rollouts[{j}].{key}={getattr(row, key)!r}: method {method.name!r} does "
                        f"not start rollouts so (its demonstrations' place is {method.place!r})"
                    )
    estimators = {"rollouts": [method.rollouts], "demos": [method.r_estimator, method.s_estimator]}
    needs = {kind: {name for e in found if e is not None for name in e.needs} for kind, found in estimators.items()}
    needs["rollouts"] |= {"advantage"} if method.uses_critic else set()
    needs["rollouts"] |= needs["demos"] if method.place == "prefix" else set()
    uids, missing = [question.uid if question.uid is None else str(question.uid) for question in questions], {}
    for i, question in enumerate(questions):
        if not question.rollouts and not question.demos:
            yield f"case.questions[{i}]: has neither rollouts nor demos"
        if uids[i] is not None and uids[i] in uids[:i]:
            yield f"case.questions[{i}].uid={question.uid!r}: an earlier question has it too"
        metric = _metric(question, settings)
        wanted = {(kind, name): f"method {method.name!r} needs it" for kind, names in needs.items() for name in names}
        wanted |= {} if metric is None else {("rollouts", "metric"): f"hpt.gate.metric={metric!r} reads it"}
        for (kind, name), why in sorted(wanted.items()):
            for j, row in enumerate(getattr(question, kind)):
                if getattr(row, name) is None:
                    missing.setdefault((kind, name), f"case.questions[{i}].{kind}[{j}].{name}: missing; {why}")
    yield from missing.values()


def _question(question: CaseQuestion, place: int, settings: config.Settings, demo_reward: float) -> Question:
    """The question as the plan takes it; demo_reward: what a demonstration without a reward counts as."""
    rollouts, demos, metric = question.rollouts, question.demos, _metric(question, settings)
    labels = [f"start {row.start}" if row.start else row.prefix for row in rollouts]
    numbers = {label: number for number, label in enumerate(dict.fromkeys([0, *labels]))}
    return Question(
        key=f"questions[{place}]" if question.uid is None else str(question.uid),
        rewards=np.array([row.reward for row in rollouts], dtype=np.float64),
        lengths=np.array([row.length - row.prefix for row in rollouts], dtype=int),
        prefixes=np.array([row.prefix for row in rollouts], dtype=int),
        starts=np.array([numbers[label] for label in labels], dtype=int),
        demo_lengths=np.array([row.length for row in demos], dtype=int),
        demo_rewards=np.array([demo_reward if row.reward is None else row.reward for row in demos], dtype=np.float64),
        metric=None if metric is None else np.array([row.metric for row in rollouts], dtype=np.float64),
        truncated=np.array([row.truncated for row in rollouts], dtype=bool),
        skipped_rollouts=question.skipped_rollouts,
        source=str(question.source),
        history=Remembered(question.history),
    )


def _tell(
    entries: list[tuple[Question, list[Row]]], zones: list[str], result: Plan, method: Method, constants: Constants
) -> dict:
    def name(number: int, kind: int, index: int) -> dict:
        kind = "demo" if kind == DEMO else "rollout"
        return {"uid": entries[number][0].key, "kind": kind, "index": int(index)}

    rows, loss = [], {"rl": 0.0, "demo": 0.0}
    for i in range(len(result)):
        question, of_question = entries[result.question[i]]
        is_demo = bool(result.kind[i] == DEMO)
        row = of_question[result.index[i] + is_demo * len(question.rewards)]
        tokens = _tokens(row, result, i, method, constants)
        terms = row_terms(method, tokens, torch.tensor([[is_demo]]))
        w_rl, w_demo = float(result.w_rl[i]), float(result.w_demo[i])
        rl, demo = terms.rl * (w_rl != 0), terms.demo * (w_demo != 0)
        weights = relative(row.token_weights, np.ones(row.length)) if row.token_weights else 1.0
        of_tokens = torch.tensor(weights, dtype=torch.float64) * tokens.mask  # multiplies the row's weights on each
        value = -(of_tokens * (w_rl * terms.rl_value * (w_rl != 0) + w_demo * terms.demo_value))
        by_demo = tokens.mask if is_demo else torch.zeros_like(tokens.mask) if tokens.prefix is None else tokens.prefix
        loss["demo"] += float(value[by_demo].sum())
        loss["rl"] += float(value[~by_demo].sum())
        rl, demo = rl * tokens.mask, demo * tokens.mask
        estimator = method.r_estimator if is_demo else method.rollouts
        rows.append(
            {
                **name(result.question[i], result.kind[i], result.index[i]),
                "zone": zones[result.question[i]],
                "advantage": _plain(estimator.advantage(tokens)) if w_rl else None,
                "weight": {"rl": w_rl, "demo": w_demo},
                "coefficient": {"rl": rl[0].tolist(), "demo": demo[0].tolist()},
                "gradient": (-(of_tokens * (w_rl * rl + w_demo * demo)))[0].tolist(),
            }
        )
    dropped = [{**name(d.question, d.kind, d.index), "why": d.why} for d in result.dropped]
    return {"rows": rows, "dropped": dropped, "loss": {**loss, "total": loss["rl"] + loss["demo"]}}


def _tokens(row: Row, result: Plan, i: int, method: Method, constants: Constants) -> Tokens:
    # What only the other kind of row needs, and has, is not given: computed on both, used on that one.
    columns = {name: getattr(row, name) for name in OF_TOKENS}
    columns = {name: values and [values] for name, values in columns.items() if values or name not in method.needs}
    advantage = [row.advantage] if method.uses_critic and row.advantage else np.nan_to_num(result.advantage[i])
    given = torch.arange(row.length)[None] < getattr(row, "prefix", 0)  # by a demonstration
    if method.place == "prefix" and result.prefix[i]:
        advantage = torch.where(given, float(np.nan_to_num(result.demo_advantage[i])), torch.as_tensor(advantage))
    tokens = on_paper(
        [row.log_prob],
        advantage=advantage,
        reward=result.reward[i],
        correct=result.correct[i],
        other_log_prob=row.other_log_prob or 0.0,
        constants=constants,
        **columns,
    )
    if method.place != "prefix":
        return tokens
    learns = given & bool(result.prefix[i])
    return replace(tokens, mask=tokens.mask & (learns | ~given), prefix=learns)


def on_paper(log_prob, *, advantage, reward, correct, constants: Constants | None = None, **columns) -> Tokens:
    """Rows that no model made, float64, every token their author's.

    log_prob: (rows, response_len). advantage, reward and columns: one number, or numbers of a shape that goes with
    log_prob's; correct: a bool. A column of ``ON_DEMAND`` that is not among them is log π_θ; None: there is none.
    """
    log_prob = torch.as_tensor(log_prob, dtype=torch.float64)

    def column(value) -> torch.Tensor:
        numbers = torch.as_tensor(value, dtype=log_prob.dtype)
        return numbers if numbers.ndim else numbers.expand(len(log_prob), 1)

    columns = {"advantage": advantage, "reward": reward, **dict.fromkeys(ON_DEMAND, log_prob), **columns}
    return Tokens(
        log_prob=log_prob,
        mask=torch.ones_like(log_prob, dtype=torch.bool),
        correct=torch.full((len(log_prob), 1), bool(correct)),
        constants=constants or Constants(),
        **{name: None if value is None else column(value) for name, value in columns.items()},
    )


def _plain(advantage: torch.Tensor) -> float | list[float]:
    """One number where it is the same on every token."""
    values = advantage.reshape(-1).tolist()
    return values[0] if len(set(values)) == 1 else values


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="verl-hpt explain", description=__doc__.split("\n\n")[0])
    parser.add_argument("case", help="CASE.json, or - for standard input")
    parser.add_argument(
        "--import-modules", action="store_true", help="import the modules that the case names in hpt.modules: runs them"
    )
    options = parser.parse_args(argv)
    try:
        text = Path("/dev/stdin" if options.case == "-" else options.case).read_text(encoding="utf-8")
        case = json.loads(text)
    except OSError as error:
        raise UserError(f"{options.case}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{options.case}: is not JSON ({error})") from error
    print(json.dumps(explain(case, options.import_modules), indent=2))
    return 0
