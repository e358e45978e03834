"""A case of ``verl-hpt explain`` as verl's rows, and its loss and gradients under every split of an update.

An update's rows of each rank and step are cut, in order, into micro-batches. A rank's loss is the sum over them, a
step's the mean over ranks, as verl's engine and FSDP have it; the loss here is summed over steps, as ``explain`` does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from engine.batches import NO_TOKENS, NONE, Case, Content, announce, contents, model_output, row_batch, whole

from verl_hpt.config import at
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.loss import LossSpec
from verl_hpt.methods import METHODS
from verl_hpt.parts import Constants
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, Plan, PlanSettings, Question

Key = tuple[str, str, int]  # uid, "rollout" or "demo", index: as explain names rows
BLANK = -0.3  # log-prob and entropy where nothing must be read


def per_token(value, length: int) -> list[float]:
    return list(value) if isinstance(value, list) else [value] * length


@dataclass
class Rows:
    """A case's questions and rows. log_prob, entropy: what the model says of a row's tokens."""

    case: Case
    names: dict[tuple[int, int, int], Key]
    log_prob: dict[tuple[int, int, int], list[float]]
    entropy: dict[tuple[int, int, int], list[float]]
    given: dict

    def plan(self, ranks: int = 1, **settings) -> Plan:
        method, hpt = METHODS[self.given["method"]], self.given
        return self.case.planned(
            PlanSettings(
                method,
                hpt.get("normalization") or method.normalization,
                float(hpt.get("rl_length_scale", 1.0)),
                hpt.get("demo_coef", at(method.demo_coef, 1)),
                **{"questions_per_step": 99, "ranks": ranks} | settings,
            )
        )


def rows_of(case: dict) -> Rows:
    """The case as the plan and the loss take it."""
    found = Rows(Case([], {}), {}, {}, {}, case["hpt"])
    beside = {name: [{"uid": f"{name}[{i}]", "demos": [row]} for i, row in enumerate(case.get(name, []))]
              for name in ("stream", "buffer")}  # fmt: skip
    for number, question in enumerate([*case["questions"], *beside["stream"], *beside["buffer"]]):
        rollouts, demos = question.get("rollouts", []), question.get("demos", [])
        for kind, rows in ((ROLLOUT, rollouts), (DEMO, demos)):
            for index, row in enumerate(rows):
                place, length, prefix = (number, kind, index), row["length"], row.get("prefix", 0)
                old = per_token(row.get("old_log_prob", row["log_prob"]), length)
                mask = [0] * prefix + [1] * (length - prefix)
                found.case.content[place] = Content([1, 2], [3] * length, mask, old, old)
                found.names[place] = (question["uid"], "demo" if kind == DEMO else "rollout", index)
                found.log_prob[place] = per_token(row["log_prob"], length)
                found.entropy[place] = per_token(row.get("entropy", BLANK), length)
        made = question_of(question["uid"], rollouts, demos)
        if number < len(case["questions"]):
            found.case.questions.append(made)
        elif number < len(case["questions"]) + len(beside["stream"]):
            found.case.stream.append(made)
        else:
            found.case.buffer = [[*(found.case.buffer[0] if found.case.buffer else []), made]]
    return found


def question_of(uid: str, rollouts: list[dict], demos: list[dict]) -> Question:
    labels = [row.get("start") or row.get("prefix", 0) for row in rollouts]
    known = list(dict.fromkeys([0, *labels]))
    return Question(
        uid,
        np.array([row["reward"] for row in rollouts], dtype=float) if rollouts else NONE,
        np.array([row["length"] - row.get("prefix", 0) for row in rollouts], dtype=int) if rollouts else NO_TOKENS,
        prefixes=np.array([row.get("prefix", 0) for row in rollouts], dtype=int),
        starts=np.array([known.index(label) for label in labels], dtype=int),
        demo_lengths=np.array([row["length"] for row in demos], dtype=int),
        demo_rewards=np.array([row.get("reward", 1.0) for row in demos], dtype=float),
    )


def constants_of(hpt: dict) -> Constants:
    clip = {f"clip_{name}": bound for name, bound in (hpt.get("clip") or {}).items()}
    return Constants(**clip, **hpt.get("options", {}))


@dataclass
class Outcome:
    """loss: whole, and what rollouts and demonstrations add to it. gradients: on the log-probs of each row."""

    loss: np.ndarray
    gradients: dict[Key, list[float]]


class Update:
    """An optimizer step, or several, of a case on so many ranks."""

    def __init__(self, case: dict, ranks: int = 1, dtype: torch.dtype = torch.float64):
        self.rows, self.ranks, self.dtype = rows_of(case), ranks, dtype
        self.plan = self.rows.plan(ranks)
        self.chunks = self.plan.layout.reshape(ranks, self.plan.steps, -1)
        self.rows_a_rank = self.chunks.shape[2]
        self._micro_batch = functools.cache(self._micro_batch)

    def _micro_batch(self, rank: int, step: int, start: int, end: int) -> Outcome:
        return outcome(self.rows, self.plan, self.chunks[rank, step, start:end], self.ranks, self.dtype)

    def cut(self, *cuts: int) -> Outcome:
        """What comes of it where each rank's rows of a step are cut at these places."""
        parts = [
            self._micro_batch(rank, step, a, b)
            for rank in range(self.ranks)
            for step in range(self.plan.steps)
            for a, b in itertools.pairwise((0, *cuts, self.rows_a_rank))
        ]
        gradients = {key: [x / self.ranks for x in row] for part in parts for key, row in part.gradients.items()}
        return Outcome(sum(part.loss for part in parts) / self.ranks, gradients)

    def every_cut(self) -> Iterator[Outcome]:
        places = range(1, self.rows_a_rank)
        for cuts in itertools.chain.from_iterable(itertools.combinations(places, k) for k in range(len(places) + 1)):
            yield self.cut(*cuts)


def outcome(rows: Rows, plan: Plan, layout: np.ndarray, ranks: int, dtype: torch.dtype) -> Outcome:
    """One micro-batch through the loss, in verl's row format."""
    method, of_rows = METHODS[rows.given["method"]], contents(rows.case, plan, layout)
    batch = announce(row_batch(rows.case, plan, layout, dtype), dp_size=ranks)
    places = [None if row == PADDING else (plan.question[row], plan.kind[row], plan.index[row]) for row in layout]
    leaf, entropy = (
        whole(of_rows, [[BLANK] if place is None else of[place] for place in places], dtype, BLANK)
        for of in (rows.log_prob, rows.entropy)
    )
    spec = LossSpec(method, constants_of(rows.given))
    loss, metrics = hpt_loss(model_output(batch, leaf.requires_grad_(), entropy), batch, spec=spec)
    loss.backward()
    on_rows = leaf.grad.split([len(row.prompt) + len(row.answer) for row in of_rows])
    sums = [metrics[f"hpt/loss_{kind}"].aggregate() for kind in ("rollouts", "demos")]
    return Outcome(
        np.array([loss.item(), *sums]),
        {
            rows.names[place]: grad[len(row.prompt) - 1 : -1].tolist()
            for place, grad, row in zip(places, on_rows, of_rows, strict=True)
            if place is not None
        },
    )
