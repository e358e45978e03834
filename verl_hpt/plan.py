"""The plan of one update: which rows it has, what each weighs, and in which optimizer step and rank it stands.

``plan`` is pure: it depends on its inputs alone, not on the order in which rollouts arrived. What each question trains
on is the gate's decision. Each question goes whole into one optimizer step; questions, and among them those on
demonstrations, are dealt evenly; every step of every rank has the same number of rows, filled up with padding rows that
carry no token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from verl_hpt import gate
from verl_hpt.estimator import STARTS, Method
from verl_hpt.gate import Decision, GateSettings, Outcome
from verl_hpt.normalize import weights

ROLLOUT, DEMO, PADDING = 0, 1, -1


@dataclass(frozen=True)
class Question:
    """What the plan knows of one question.

    Attributes:
        key: identity, the same whenever the question is drawn.
        rewards: (n,) verifier's score of each rollout.
        lengths: (n,) tokens of each rollout.
        returns: (n,) what Â is made of; None: rewards (they differ with ``algorithm.use_kl_in_reward``).
        metric: (n,) what the gate reads in place of the rewards (``hpt.gate.metric``); None: rewards.
        truncated: (n,) bool, rollouts that were cut at the length limit; None: none was.
        prefixes: (n,) tokens of a demonstration that a rollout's response begins with; None: none does. ``lengths`` are
            its own tokens.
        starts: (n,) 0 where a rollout started from nothing, equal where two started alike; None: by ``prefixes``.
        skipped_rollouts: rollouts of this draw that verl-hpt did not have sampled (early gate, or a step at which every
            question is on its demonstration).
        demo_lengths, demo_rewards: (k,) tokens and score of each usable demonstration; score nan: none was given, and
            ``demo_scores`` says what it counts as.
        source: data source. history: numbers of its earlier draws by name, for a gate.
    """

    key: str
    rewards: np.ndarray
    lengths: np.ndarray
    returns: np.ndarray | None = None
    metric: np.ndarray | None = None
    truncated: np.ndarray | None = None
    prefixes: np.ndarray | None = None
    starts: np.ndarray | None = None
    skipped_rollouts: int = 0
    demo_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    demo_rewards: np.ndarray = field(default_factory=lambda: np.zeros(0))
    source: str = ""
    history: Mapping[str, float] = field(default_factory=lambda: gate.NEVER_DRAWN)

    @property
    def scores(self) -> np.ndarray:
        """What the gate reads of each rollout. -> (n,)"""
        return self.rewards if self.metric is None else self.metric

    @property
    def order(self) -> tuple:
        """Sorts a batch's questions, and draws of one, whichever rollouts arrived first."""
        return self.key, tuple(self.rewards), tuple(self.lengths), tuple(self.started_at)

    @property
    def started_at(self) -> np.ndarray:
        """``starts``, whichever way they are given. -> (n,)"""
        given = self.prefixes if self.starts is None else self.starts
        return np.zeros(len(self.rewards), dtype=int) if given is None else np.asarray(given)


@dataclass(frozen=True)
class PlanSettings:
    """Numbers that the plan needs.

    questions_per_step: questions of one optimizer step (``actor.ppo_mini_batch_size``).
    ranks: data-parallel ranks. rows_multiple: rows a rank are a multiple of it (micro-batch size without dynamic
    batches). gates: gate of a data source; the default gate otherwise. truncated: what becomes of rollouts that were
    cut at the length limit (``hpt.rollouts.truncated``): "keep", count as "unsolved", or "mask". collects: what a
    method's buffer takes (``hpt.buffer.content``).
    """

    method: Method
    normalization: str
    length_scale: float
    demo_coef: float = 0.1
    gate: GateSettings = field(default_factory=GateSettings)
    gates: dict[str, GateSettings] = field(default_factory=dict)
    truncated: Literal["keep", "unsolved", "mask"] = "keep"
    collects: Literal["demonstrations", "successes"] = "demonstrations"
    questions_per_step: int = 1
    ranks: int = 1
    rows_multiple: int = 1
    seed: int = 0

    def gate_of(self, source: str) -> GateSettings:
        return self.gates.get(source, self.gate)


@dataclass(frozen=True)
class Dropped:
    """A rollout or a demonstration that the update does not see, and why."""

    question: int
    kind: int
    index: int
    why: str


class Row(NamedTuple):
    """One row of the update: rollout or demonstration ``index`` of a question. Shares: factors of its two weights.

    tokens, demo_tokens: those that count in the RL and in the SFT sum. prefix: those of a demonstration that it begins
    with and that learn; demo_advantage: Â of these.
    """

    question: int
    kind: int
    index: int
    advantage: float
    reward: float
    correct: bool
    tokens: int
    rl_share: float
    demo_share: float
    demo_tokens: int
    prefix: int = 0
    demo_advantage: float = math.nan


@dataclass
class Plan:
    """The rows of one update. Arrays of shape (rows,), in the order of the questions given, rollouts first.

    decisions, solved: one a question of the batch; solved says of each of its rollouts whether it counts as solved,
    (n,) bool. What stands beside the batch (stream, buffer) follows as questions without a decision: ``question`` goes
    on counting.

    layout: (steps · rows_per_step,) row numbers, ``PADDING`` where nothing stands, in the order in which verl must get
    them: rank r takes a contiguous chunk and cuts it in order, so row j of step s of rank r of S steps with m rows a
    rank stands at r·S·m + s·m + j.
    """

    decisions: list[Decision]
    solved: list[np.ndarray]
    question: np.ndarray
    kind: np.ndarray
    index: np.ndarray
    advantage: np.ndarray
    reward: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    demo_tokens: np.ndarray
    prefix: np.ndarray
    demo_advantage: np.ndarray
    w_rl: np.ndarray
    w_demo: np.ndarray
    w_entropy: np.ndarray
    step: np.ndarray
    dropped: list[Dropped]
    steps: int
    rows_per_step: int
    layout: np.ndarray

    def __len__(self) -> int:
        return len(self.question)


def outcome_of(question: Question, settings: PlanSettings, of: slice | None = None) -> Outcome:
    """What the gate of its data source knows of a question. of: its rollouts; None: those that started from nothing."""
    bounds = settings.gate_of(question.source)
    cut = question.truncated if bounds.finished or settings.truncated != "keep" else None
    of = question.started_at == 0 if of is None else of
    return Outcome(
        question.rewards[of], bounds, question.scores[of], None if cut is None else cut[of], question.history
    )


def decide(question: Question, settings: PlanSettings) -> Decision:
    """The gate's decision, before the question's demonstrations are read."""
    method = settings.method
    outcome, trains_rollouts = outcome_of(question, settings), method.rollouts is not None
    return gate.decide(method.when, outcome, trains_rollouts, method.place, settings.collects)


def plan(
    questions: Sequence[Question],
    settings: PlanSettings,
    decisions: Sequence[Decision] | None = None,
    stream: Sequence[Question] = (),
    buffer: Sequence[Sequence[Question]] = (),
) -> Plan:
    """Weigh and lay out one update.

    Args:
        decisions: of ``decide``, one a question; made here where they are not given.
        stream: demonstrations beside the questions, dealt over their optimizer steps; a pool of their own in the
            normalisation. buffer: those that are trained on in optimizer steps of their own, after the others.
    """
    if decisions is None:
        decisions = [decide(question, settings) for question in questions]
    solved = [outcome_of(question, settings, slice(None)).correct for question in questions]
    decisions = [_settle(*pair, settings) for pair in zip(questions, decisions, strict=True)]
    own, everything = len(questions), [*questions, *stream, *(question for part in buffer for question in part)]
    fates = [*decisions, *[gate.DEMO] * (len(everything) - own)]
    rows: list[Row] = []
    dropped: list[Dropped] = []
    for number, question in enumerate(everything):
        correct = solved[number] if number < own else np.zeros(0, dtype=bool)
        _add_rows(number, question, fates[number], correct, settings, rows, dropped)
    row = Row(*np.array(rows, dtype=np.float64).reshape(-1, len(Row._fields)).T)
    question, kind, index = (column.astype(int) for column in row[:3])

    steps = max(1, -(-own // settings.questions_per_step))
    streamed = (question >= own) & (question < own + len(stream))
    step_of = _deal(everything, fates, np.unique(question[question < own]), steps, settings.seed)
    step_of += _deal(everything, fates, np.unique(question[streamed]), steps, settings.seed)
    step_of[own + len(stream) :] = np.repeat(steps + np.arange(len(buffer)), [len(part) for part in buffer])
    steps += len(buffer)
    step = step_of[question] if len(question) else question
    rl_coef = 1 - settings.demo_coef if settings.method.convex else 1.0
    of_author = row.tokens - (row.prefix if settings.method.r_estimator is not None else 0)
    w_rl, w_demo, w_entropy = np.zeros((3, len(question)))
    for s in range(steps):
        for pool in ((step == s) & ~streamed, (step == s) & streamed):
            w_rl[pool], w_demo[pool] = weights(
                settings.normalization,
                *(column[pool] for column in (question, row.tokens, row.rl_share, row.demo_share)),
                demo_tokens=row.demo_tokens[pool],
                length_scale=settings.length_scale,
                demo_coef=settings.demo_coef,
            )
        learning = (step == s) & (kind == ROLLOUT) & (row.rl_share != 0)
        w_rl[learning] *= rl_coef
        if settings.normalization == "official":  # its entropy bonus is a token mean, not a sum over L
            w_entropy[learning] = rl_coef * row.rl_share[learning] / max(of_author[learning].sum(), 1)
        else:
            w_entropy[learning] = w_rl[learning]
    rows_per_step, layout = _lay_out(step, of_author + row.prefix, steps, settings.ranks, settings.rows_multiple)
    return Plan(
        decisions, solved, question, kind, index, row.advantage, row.reward, row.correct.astype(bool),
        row.tokens.astype(int), row.demo_tokens.astype(int), row.prefix.astype(int), row.demo_advantage, w_rl, w_demo,
        w_entropy, step, dropped, steps, rows_per_step, layout,
    )  # fmt: skip


def _settle(question: Question, decision: Decision, settings: PlanSettings) -> Decision:
    """The decision once it is known which demonstrations the question has."""
    success, method = settings.gate_of(question.source).success, settings.method
    right = bool(gate.solved(demo_scores(question, settings), success).any())
    on_rollouts = method.rollouts is not None and method.when != "own"
    there = np.count_nonzero(question.started_at) if method.place in STARTS else len(question.demo_lengths)
    return gate.settle(decision, there, right, on_rollouts)


def demo_scores(question: Question, settings: PlanSettings) -> np.ndarray:
    """What each demonstration counts as. -> (k,)

    Where no score was given it is ``gate.success``; in a group, where Â compares it with the rollouts' rewards, the
    largest of that and the group's best, so that no method pushes away from a demonstration for want of a setting.
    """
    default = settings.gate_of(question.source).success
    if settings.method.place == "group":
        default = max([default, *_returns(question, settings)])
    return np.where(np.isnan(question.demo_rewards), default, question.demo_rewards)


def _returns(question: Question, settings: PlanSettings) -> np.ndarray:
    """What Â is made of, rollouts that were cut counted as failures where the settings say so. -> (n,)

    A failure counts as 0, or as the lowest of the group where that is below 0 (rewards of −1 and 1).
    """
    returns = question.rewards if question.returns is None else question.returns
    if settings.truncated == "keep" or question.truncated is None:
        return returns
    return np.where(question.truncated, min([0.0, *returns]), returns)


def _add_rows(
    number: int, question: Question, decision: Decision, solved: np.ndarray, settings: PlanSettings,
    rows: list[Row], dropped: list[Dropped],
) -> None:  # fmt: skip
    """Add the rows of one question to ``rows``, what the update does not see of it to ``dropped``."""
    method, n, k = settings.method, len(question.rewards), len(question.demo_lengths)
    returns, demo_rewards = _returns(question, settings), demo_scores(question, settings)
    grouped = method.place == "group" and k > 0
    group = np.concatenate([returns, demo_rewards]) if grouped else returns
    starts, r_estimator = question.started_at, method.r_estimator
    alike = np.zeros(len(group), dtype=int)  # whose rewards are compared
    if method.place in STARTS and method.baseline == "start":
        alike = starts
    of_rollouts = _over_groups(method.rollouts, group, alike)
    of_demos = _over_groups(r_estimator, group, alike)[n:] if grouped else np.full(k, np.nan)
    of_prefixes, learns = np.full(n, np.nan), np.zeros(n, dtype=int)
    if method.place == "prefix" and method.demos and question.prefixes is not None:
        learns = question.prefixes
        of_prefixes = _over_groups(r_estimator, returns, alike)
        if r_estimator is not None and r_estimator.advantage.over_starts is not None:
            of_prefixes = r_estimator.advantage.over_starts(returns, starts)
    if question.skipped_rollouts and len(group) == 1:
        of_rollouts = 0 * of_rollouts  # its raw reward is no advantage: the others of its group were not sampled

    s_scale = method.term("S").scale if method.term("S") is not None else 0.0
    imitated = int(np.argmax(solved)) if decision.zone == "own" else None  # the first of its rollouts that is correct
    masked = question.truncated if settings.truncated == "mask" and decision.on else None
    for i in range(n):
        demo_share = s_scale if imitated == i else decision.sft * s_scale if learns[i] else 0.0
        if masked is not None and masked[i]:
            dropped.append(Dropped(number, ROLLOUT, i, "it was cut at the length limit"))
        elif decision.on or demo_share:
            tokens = question.lengths[i] + (learns[i] if r_estimator is not None else 0)
            rows.append(Row(number, ROLLOUT, i, of_rollouts[i], question.rewards[i], solved[i], tokens, decision.on,
                            demo_share, learns[i] or tokens, learns[i], of_prefixes[i]))  # fmt: skip
        else:
            dropped.append(Dropped(number, ROLLOUT, i, _NO_ROLLOUT.get(decision.zone, _NO_SHARE)))

    r_term = method.off_zone or method.term("R") if decision.zone == "off" else method.term("R")
    rl_share, demo_share = (decision.off * r_term.scale if r_term is not None else 0.0), decision.sft * s_scale
    demo_correct = gate.solved(demo_rewards, settings.gate_of(question.source).success)
    for j in range(k):
        if imitated is None and (rl_share or demo_share) and method.place not in STARTS:
            rows.append(Row(number, DEMO, j, of_demos[j], demo_rewards[j], demo_correct[j], question.demo_lengths[j],
                            rl_share, demo_share, question.demo_lengths[j]))  # fmt: skip
        else:
            why = _STARTED if method.place in STARTS else _NO_DEMO.get(decision.zone, _NO_SHARE)
            dropped.append(Dropped(number, DEMO, j, why))


def _over_groups(estimator, rewards: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Â of rows compared with those that have the same number in ``alike``; nan where it is not made from rewards."""
    advantages, rewards = np.full(len(rewards), np.nan), np.asarray(rewards, dtype=np.float64)
    if estimator is None or estimator.advantage.over_group is None:
        return advantages
    for group in np.unique(alike) if alike.any() else alike[:1]:
        of_group = alike == group
        advantages[of_group] = estimator.advantage.over_group(rewards[of_group])
    return advantages


# Why a row is left out, by zone.
_NO_SHARE = "its coefficient is 0"
_STARTED = "rollouts start from it, it is no row of its own"
_NO_ROLLOUT = {
    "demo": "the question trains on its demonstration",
    "off": "the question trains off-policy on its demonstration",
    "own": "the question trains on its first correct rollout",
    "none": "the method trains on demonstrations only, and the question has no usable one",
}
_NO_DEMO = {
    "rl": "the question trains on its rollouts",
    "own": "the question trains on its own correct rollout",
    "collect": "it waits in the buffer",
    "keep": "the question trains on its rollouts, and its first correct one waits in the buffer",
}


def _deal(questions, decisions, present: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Step of each question: those without rollouts first, then the others, dealt round by round. -> (questions,)"""

    def order(q: int):
        key, *draw = questions[q].order
        return hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest(), *draw

    shuffled = sorted(present, key=order)
    imitating = [q for q in shuffled if not decisions[q].on]
    step_of = np.zeros(len(questions), dtype=int)
    for place, q in enumerate(imitating + [q for q in shuffled if decisions[q].on]):
        step_of[q] = place % steps
    return step_of


def _lay_out(step: np.ndarray, tokens: np.ndarray, steps: int, ranks: int, multiple: int) -> tuple[int, np.ndarray]:
    """Give every rank of every step the same number of rows, and about the same number of tokens."""
    most = int(np.bincount(step, minlength=steps).max()) if len(step) else 0
    a_rank = max(1, -(-most // (ranks * multiple))) * multiple
    layout = np.full((ranks, steps, a_rank), PADDING)
    for s in range(steps):
        rows = np.flatnonzero(step == s)
        load, held = np.zeros(ranks), np.zeros(ranks, dtype=int)
        for row in rows[np.argsort(-tokens[rows], kind="stable")]:
            rank = int(np.where(held < a_rank, load, np.inf).argmin())
            layout[rank, s, held[rank]] = row
            load[rank] += tokens[row]
            held[rank] += 1
    return a_rank * ranks, layout.reshape(-1)
