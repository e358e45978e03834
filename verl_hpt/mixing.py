"""The plan of one update: which rows it has, what each weighs, and in which optimizer step and rank it stands.

``plan`` is pure: it depends on its inputs alone, not on the order in which rollouts arrived. Each question goes whole
into one optimizer step; questions, and among them those on demonstrations, are dealt evenly; every step of every rank
has the same number of rows, filled up with padding rows that carry no token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from verl_hpt import gate
from verl_hpt.estimator import Method
from verl_hpt.gate import Decision, GateSettings
from verl_hpt.normalize import weights

ROLLOUT, DEMO, PADDING = 0, 1, -1
NOTHING = Decision("none", 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Question:
    """What the plan knows of one question.

    Attributes:
        key: identity, the same whenever the question is drawn.
        rewards: (n,) verifier's score of each rollout; the gate reads it.
        lengths: (n,) tokens of each rollout.
        returns: (n,) what Â is made of; None: rewards (they differ with ``algorithm.use_kl_in_reward``).
        demo_lengths, demo_rewards: (k,) tokens and score of each usable demonstration.
        source: data source.
    """

    key: str
    rewards: np.ndarray
    lengths: np.ndarray
    returns: np.ndarray | None = None
    demo_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    demo_rewards: np.ndarray = field(default_factory=lambda: np.zeros(0))
    source: str = ""


@dataclass(frozen=True)
class PlanSettings:
    """Numbers that the plan needs.

    questions_per_step: questions of one optimizer step (``actor.ppo_mini_batch_size``).
    ranks: data-parallel ranks. rows_multiple: rows a rank are a multiple of it (micro-batch size without dynamic
    batches). gates: gate of a data source; the default gate otherwise.
    """

    method: Method
    normalization: str
    length_scale: float
    demo_coef: float = 0.1
    gate: GateSettings = field(default_factory=GateSettings)
    gates: dict[str, GateSettings] = field(default_factory=dict)
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


@dataclass
class Plan:
    """The rows of one update. Arrays of shape (rows,), in the order of the questions given, rollouts first.

    layout: (steps · rows_per_step,) row numbers, ``PADDING`` where nothing stands, in the order in which verl must get
    them: rank r takes a contiguous chunk and cuts it in order, so row j of step s of rank r of S steps with m rows a
    rank stands at r·S·m + s·m + j.
    """

    decisions: list[Decision]
    question: np.ndarray
    kind: np.ndarray
    index: np.ndarray
    advantage: np.ndarray
    reward: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
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


def plan(questions: Sequence[Question], settings: PlanSettings) -> Plan:
    """Decide, weigh and lay out one update."""
    decisions, rows, dropped = [], [], []
    for number, question in enumerate(questions):
        decision, kept, lost = _rows_of(number, question, settings)
        decisions.append(decision)
        rows.extend(kept)
        dropped.extend(lost)
    columns = np.array(rows, dtype=np.float64).reshape(-1, 9).T
    question, kind, index = columns[:3].astype(int)
    advantage, reward, correct, tokens, rl_share, demo_share = columns[3:]

    steps = max(1, -(-len(questions) // settings.questions_per_step))
    step_of = _deal(questions, decisions, np.unique(question), steps, settings.seed)
    step = step_of[question] if len(question) else question
    w_rl, w_demo = np.zeros(len(question)), np.zeros(len(question))
    w_entropy = np.zeros(len(question))
    for s in range(steps):
        here = step == s
        w_rl[here], w_demo[here] = weights(
            settings.normalization,
            question[here],
            tokens[here],
            rl_share[here],
            demo_share[here],
            length_scale=settings.length_scale,
            demo_coef=settings.demo_coef,
        )
        learning = here & (kind == ROLLOUT) & (rl_share != 0)
        if settings.normalization == "official":  # its entropy bonus is a token mean, not a sum over L
            w_entropy[learning] = rl_share[learning] / max(tokens[learning].sum(), 1)
        else:
            w_entropy[learning] = w_rl[learning]
    rows_per_step, layout = _lay_out(step, tokens, steps, settings.ranks, settings.rows_multiple)
    return Plan(
        decisions, question, kind, index, advantage, reward, correct.astype(bool), tokens.astype(int), w_rl, w_demo,
        w_entropy, step, dropped, steps, rows_per_step, layout,
    )  # fmt: skip


def decide(question: Question, settings: PlanSettings) -> Decision:
    """The method's rule and the gate, and what becomes of a question that has no usable demonstration."""
    method, bounds = settings.method, settings.gate_of(question.source)
    solved, n, k = int((question.rewards >= bounds.success).sum()), len(question.rewards), len(question.demo_lengths)
    if method.when == "never" or (k == 0 and method.when != "own"):
        return gate.RL if method.rollouts is not None else NOTHING
    if method.when == "always":
        return gate.BOTH if method.rollouts is not None else gate.DEMO
    if method.when == "soft":
        return gate.decide_soft(solved, n, bool((question.demo_rewards >= bounds.success).any()), bounds)
    if method.when == "unrewarded":
        return gate.RL if (question.rewards > 0).any() else gate.DEMO
    if method.when == "own" and (solved or k == 0):
        return Decision("own", 0.0, 0.0, 1.0) if solved else NOTHING
    if method.when == "own":
        return gate.DEMO
    return gate.decide(solved, n, bounds)


def _rows_of(number: int, question: Question, settings: PlanSettings):
    """Rows of one question as (question, kind, index, advantage, reward, correct, tokens, rl_share, demo_share)."""
    method, success = settings.method, settings.gate_of(question.source).success
    decision = decide(question, settings)
    n, k = len(question.rewards), len(question.demo_lengths)
    returns = question.rewards if question.returns is None else question.returns
    kept, dropped = [], []

    grouped = method.place == "group" and k > 0
    group = np.concatenate([returns, question.demo_rewards]) if grouped else returns
    of_rollouts = _over_group(method.rollouts, group)
    of_demos = _over_group(method.r_estimator, group)[n:] if grouped else np.full(k, np.nan)

    own = int(np.argmax(question.rewards >= success)) if decision.zone == "own" else None
    for i in range(n):
        demo_share = method.term("S").scale if own == i else 0.0
        if decision.on or demo_share:
            correct = question.rewards[i] >= success
            kept.append((number, ROLLOUT, i, of_rollouts[i], question.rewards[i], correct, question.lengths[i],
                         decision.on, demo_share))  # fmt: skip
        else:
            dropped.append(Dropped(number, ROLLOUT, i, _why_no_rollout(decision)))

    r_term = method.off_zone or method.term("R") if decision.zone == "off" else method.term("R")
    rl_share = decision.off * r_term.scale if r_term is not None else 0.0
    demo_share = decision.sft * method.term("S").scale if method.term("S") is not None else 0.0
    for j in range(k):
        if own is None and (rl_share or demo_share):
            correct = question.demo_rewards[j] >= success
            kept.append((number, DEMO, j, of_demos[j], question.demo_rewards[j], correct, question.demo_lengths[j],
                         rl_share, demo_share))  # fmt: skip
        else:
            dropped.append(Dropped(number, DEMO, j, _why_no_demo(decision)))
    return decision, kept, dropped


def _over_group(estimator, rewards: np.ndarray) -> np.ndarray:
    """Â of the members of a group, nan where the estimator's advantage is not made from rewards."""
    if estimator is None or estimator.advantage.over_group is None or len(rewards) == 0:
        return np.full(len(rewards), np.nan)
    return estimator.advantage.over_group(np.asarray(rewards, dtype=np.float64))


def _why_no_rollout(decision: Decision) -> str:
    return {
        "demo": "the question trains on its demonstration",
        "off": "the question trains off-policy on its demonstration",
        "own": "the question trains on its first correct rollout",
        "none": "the method trains on demonstrations only, and the question has no usable one",
    }.get(decision.zone, "its coefficient is 0")


def _why_no_demo(decision: Decision) -> str:
    return {
        "rl": "the question trains on its rollouts",
        "own": "the question trains on its own correct rollout",
    }.get(decision.zone, "its coefficient is 0")


def _deal(questions, decisions, present: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Step of each question: those without rollouts first, then the others, dealt round by round. -> (questions,)"""

    def order(q: int):
        question = questions[q]
        digest = hashlib.blake2b(f"{seed}\0{question.key}".encode(), digest_size=8).digest()
        return digest, tuple(question.rewards), tuple(question.lengths)

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
