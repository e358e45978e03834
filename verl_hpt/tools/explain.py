"""``verl-hpt explain CASE.json``: what a method does to a small batch, on paper, with no model.

The case goes through the same plan, normalisation and estimator code that trains, as one optimizer step in float64.

    {"hpt": {"method": "hpt", "normalization": "official", "rl_length_scale": 16, "gate": {"threshold": 0.0}},
     "questions": [
       {"uid": "q1", "source": "math",
        "rollouts": [{"reward": 1, "length": 4, "log_prob": -1.0, "old_log_prob": -1.0, "entropy": 0.0}],
        "demos": [{"length": 10, "log_prob": -0.5, "reward": 1}]}]}

Every key of ``hpt`` is optional (``rl_length_scale``: the longest row); ``actor`` may hold clip_ratio_low,
clip_ratio_high and clip_ratio_c. log_prob, old_log_prob, ref_log_prob, teacher_log_prob, entropy, advantage (what a
critic would give) and token_weights (of demonstrations) are a number for every token or a list; old_log_prob is
log_prob by default. other_log_prob is one number a demonstration. A rollout may say ``truncated`` (true: it was cut at
the length limit) and ``metric`` (what ``hpt.gate.metric`` reads), a question ``skipped_rollouts`` (rollouts that were
not sampled: early gate, SFT phase); ``step`` of the case (default 1) is the step that schedules are read at.
Modules that the case names in ``hpt.modules`` are imported with ``--import-modules`` only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from verl_hpt import config
from verl_hpt.demos.demonstration import relative
from verl_hpt.errors import UserError
from verl_hpt.estimator import Method, row_terms
from verl_hpt.parts import ON_DEMAND, RANGES, Constants, Tokens
from verl_hpt.plan import DEMO, Plan, PlanSettings, Question, plan

OF_TOKENS = tuple(name for name in ON_DEMAND if name != "other_log_prob")  # that one has a number a row
TOKEN_KEYS = ("log_prob", *OF_TOKENS, "advantage", "token_weights")
ROW_KEYS = {"length", "reward", "other_log_prob", *TOKEN_KEYS}
ROLLOUT_KEYS = ROW_KEYS | {"truncated", "metric"}
QUESTION_KEYS = {"uid", "source", "rollouts", "demos", "skipped_rollouts"}
ACTOR_KEYS = {"clip_ratio_low": "clip_low", "clip_ratio_high": "clip_high", "clip_ratio_c": "clip_c"}


def explain(case: Mapping, import_modules: bool = False) -> dict:
    """What the method of the case does to its rows.

    import_modules: import what ``hpt.modules`` of the case names, which runs its code; refused by default.

    Returns:
        rows: in input order, a dict a row that trains: uid, kind, index, zone, advantage (null on SFT rows),
            weight {rl, demo}, coefficient {rl, demo} (a number a token) and gradient, d loss / d log_prob a token;
        dropped: rows that do not train, and why;
        loss: rl sums rollout rows, demo sums demonstration rows, whatever the term.

    Raises:
        UserError: names the place in the case and the choices.
    """
    case = _mapping(case, "case", {"hpt", "questions", "actor", "step"})
    settings = config.load(case.get("hpt"))
    if settings.modules and not import_modules:
        raise UserError(
            f"hpt.modules={settings.modules!r}: explaining this case would import them and so run their code; if you "
            "trust them, add --import-modules"
        )
    method = config.resolve_method(settings)
    actor = _mapping(case.get("actor", {}), "actor", set(ACTOR_KEYS))
    clip = {name: _number(actor[key], f"actor.{key}") for key, name in ACTOR_KEYS.items() if key in actor}
    for name, value in clip.items():
        ok, what = RANGES[name]
        if not ok(value):
            raise UserError(f"actor.{name.replace('clip_', 'clip_ratio_')}={value!r}: must be {what}")
    constants = config.constants(settings, **clip)
    questions = case.get("questions")
    if not isinstance(questions, list) or not questions:
        raise UserError("questions: must be a list with at least one question")
    step = _count(case.get("step", 1), "step")
    demo_reward = settings.demo.reward if isinstance(settings.demo.reward, float) else math.nan
    entries = [_question(q, f"questions[{i}]", method, settings, demo_reward) for i, q in enumerate(questions)]

    for i, (question, rows) in enumerate(entries):
        if not rows:
            raise UserError(f"questions[{i}]: has neither rollouts nor demos")
        if question.key in [other.key for other, _ in entries[:i]]:
            raise UserError(f"questions[{i}].uid={question.key!r}: an earlier question has it too")

    longest = max((row["length"] for _, rows in entries for row in rows), default=1)
    result = plan(
        [question for question, _ in entries],
        PlanSettings(
            method=method,
            normalization=settings.normalization or method.normalization,
            length_scale=settings.rl_length_scale or longest,
            demo_coef=config.at(settings.demo_coef, step),
            gate=settings.gate.at(step),
            gates={source: own.gate.at(step) for source, own in settings.per_source.items()},
            truncated=settings.rollouts.truncated,
            questions_per_step=len(entries),
        ),
    )
    return _tell(entries, result, method, constants)


def _tell(entries, result: Plan, method: Method, constants: Constants) -> dict:
    rows, loss = [], {"rl": 0.0, "demo": 0.0}
    for i in range(len(result)):
        question, given = entries[result.question[i]]
        is_demo = bool(result.kind[i] == DEMO)
        at = len(question.rewards) + result.index[i] if is_demo else result.index[i]
        tokens = _tokens(given[at], result, i, method, constants)
        terms = row_terms(method, tokens, torch.tensor([[is_demo]]))
        w_rl, w_demo = float(result.w_rl[i]), float(result.w_demo[i])
        rl, demo = terms.rl * (w_rl != 0), terms.demo * (w_demo != 0)
        of_tokens = _of_tokens(given[at])
        value = -(of_tokens * (w_rl * terms.rl_value * (w_rl != 0) + w_demo * terms.demo_value)).sum()
        loss["demo" if is_demo else "rl"] += float(value)
        estimator = method.r_estimator if is_demo else method.rollouts
        rows.append(
            {
                "uid": question.key,
                "kind": "demo" if is_demo else "rollout",
                "index": int(result.index[i]),
                "zone": result.decisions[result.question[i]].zone,
                "advantage": _plain(estimator.advantage(tokens)) if w_rl else None,
                "weight": {"rl": w_rl, "demo": w_demo},
                "coefficient": {"rl": rl[0].tolist(), "demo": demo[0].tolist()},
                "gradient": (-(of_tokens * (w_rl * rl + w_demo * demo)))[0].tolist(),
            }
        )
    dropped = [
        {
            "uid": entries[d.question][0].key,
            "kind": "demo" if d.kind == DEMO else "rollout",
            "index": d.index,
            "why": d.why,
        }
        for d in result.dropped
    ]
    return {"rows": rows, "dropped": dropped, "loss": {**loss, "total": loss["rl"] + loss["demo"]}}


def _of_tokens(row: dict) -> torch.Tensor:
    """What multiplies the row's weights on each token. -> (tokens,)"""
    weights = row["token_weights"]
    return torch.tensor(relative(weights, np.ones(len(weights))) if weights else 1.0, dtype=torch.float64)


def _tokens(row: dict, result: Plan, i: int, method: Method, constants: Constants) -> Tokens:
    # What only the other kind of row needs, and has, is not given: computed on both, used on that one.
    given = {name: row[name] if row[name] is None else [row[name]] for name in OF_TOKENS}
    columns = {name: value for name, value in given.items() if value is not None or name not in method.needs}
    return Tokens.on_paper(
        [row["log_prob"]],
        advantage=[row["advantage"]] if method.uses_critic and row["advantage"] else np.nan_to_num(result.advantage[i]),
        reward=result.reward[i],
        correct=result.correct[i],
        other_log_prob=row["other_log_prob"] or 0.0,
        constants=constants,
        **columns,
    )


def _question(given, where: str, method: Method, settings, demo_reward: float) -> tuple[Question, list[dict]]:
    given = _mapping(given, where, QUESTION_KEYS)
    rollouts = [_row(r, f"{where}.rollouts[{i}]", None) for i, r in enumerate(_list(given, "rollouts", where))]
    demos = [_row(r, f"{where}.demos[{i}]", demo_reward) for i, r in enumerate(_list(given, "demos", where))]
    source = str(given.get("source", ""))
    metric = settings.per_source.get(source, settings).gate.metric
    for i, row in enumerate(rollouts):
        if metric is not None and row["metric"] is None:
            raise UserError(f"{where}.rollouts[{i}].metric: missing; hpt.gate.metric={metric!r} reads it")
    for kind, rows, estimators in (
        ("rollouts", rollouts, [method.rollouts]),
        ("demos", demos, [method.r_estimator, method.s_estimator]),
    ):
        needs = frozenset().union(*(e.needs for e in estimators if e is not None))
        critic = kind == "rollouts" and method.uses_critic
        for i, row in enumerate(rows):
            for name in sorted(needs | ({"advantage"} if critic else set())):
                if row.get(name) is None:
                    raise UserError(f"{where}.{kind}[{i}].{name}: method {method.name!r} needs it, and it is missing")
    question = Question(
        key=str(given.get("uid", where)),
        rewards=np.array([r["reward"] for r in rollouts], dtype=np.float64),
        lengths=np.array([r["length"] for r in rollouts], dtype=int),
        demo_lengths=np.array([r["length"] for r in demos], dtype=int),
        demo_rewards=np.array([r["reward"] for r in demos], dtype=np.float64),
        metric=None if metric is None else np.array([r["metric"] for r in rollouts], dtype=np.float64),
        truncated=np.array([r["truncated"] for r in rollouts], dtype=bool),
        skipped_rollouts=_count(given.get("skipped_rollouts", 0), f"{where}.skipped_rollouts"),
        source=source,
    )
    return question, rollouts + demos


def _row(given, where: str, demo_reward: float | None) -> dict:
    """A row of the case; demo_reward: what a demonstration without a reward counts as, None for a rollout."""
    is_rollout = demo_reward is None
    given = _mapping(given, where, ROLLOUT_KEYS if is_rollout else ROW_KEYS)
    for key in ("length", "log_prob") + (("reward",) if is_rollout else ()):
        if key not in given:
            raise UserError(f"{where}.{key}: missing; a row needs length, log_prob and, on rollouts, reward")
    length = given["length"]
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(f"{where}.length={length!r}: must be a whole number of tokens, at least 1")
    row = {"length": length, "reward": demo_reward}
    if "reward" in given:
        row["reward"] = _number(given["reward"], f"{where}.reward")
    row["truncated"] = given.get("truncated", False)
    if not isinstance(row["truncated"], bool):
        raise UserError(f"{where}.truncated={row['truncated']!r}: must be true or false")
    row["metric"] = _number(given["metric"], f"{where}.metric") if given.get("metric") is not None else None
    for key in TOKEN_KEYS:
        value = given.get(key)
        if value is None:
            row[key] = None
        elif isinstance(value, list):
            if len(value) != length:
                raise UserError(f"{where}.{key}: {len(value)} numbers for a row of {length} tokens")
            row[key] = [_number(x, f"{where}.{key}[{t}]") for t, x in enumerate(value)]
        else:
            row[key] = [_number(value, f"{where}.{key}")] * length
    row["old_log_prob"] = row["old_log_prob"] or row["log_prob"]
    other = given.get("other_log_prob")
    row["other_log_prob"] = None if other is None else _number(other, f"{where}.other_log_prob")
    weights = row["token_weights"]
    if weights is not None and (is_rollout or min(weights) < 0 or not any(weights)):
        raise UserError(f"{where}.token_weights={weights!r}: 0 or more, one above 0, on demonstrations alone")
    for key in (key for key in TOKEN_KEYS if key.endswith("log_prob")):
        if row[key] is not None and max(row[key]) > 0:
            raise UserError(f"{where}.{key}={max(row[key])!r}: a log-probability is at most 0")
    return row


def _mapping(value, where: str, known: set[str]) -> Mapping:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: must be an object with keys {', '.join(sorted(known))}; got {value!r}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key; one of {', '.join(sorted(known))}")
    return value


def _list(given: Mapping, key: str, where: str) -> list:
    value = given.get(key, [])
    if not isinstance(value, list):
        raise UserError(f"{where}.{key}: must be a list, got {value!r}")
    return value


def _number(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}={value!r}: must be a finite number")
    return float(value)


def _count(value, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{where}={value!r}: must be a whole number, at least 0")
    return value


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
