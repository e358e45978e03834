"""Losses of the methods whose demonstrations stand elsewhere: prefixes, hints, streams, buffers. As ``losses``, written
out slowly from the formulas and independently of the package.

A rollout may say ``prefix`` (how many of its tokens, the first ones, a demonstration wrote) and ``start`` (a label that
rollouts share which started alike; by default their prefix). A case may have ``stream`` and ``buffer``, lists of
demonstrations: each is a question of its own in a step of its own as far as the normalisation goes, since the methods
average them apart from the rollouts. Of a question's own demonstrations none is trained on.
"""

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .losses import bounded, log_likelihood
from .step import Key, Question, Row, Settings, Term, leaves_of, normalised, questions_of, settings_of

OWN = {
    **dict.fromkeys(["uft", "chord_mu", "chord_phi", "amft_style"], "token"),
    **dict.fromkeys(["stephint", "g2rpo_a", "questa", "pope", "guide"], "sequence"),
    "prefix_rft": "question",
    "relift": "official",
}
COEFFICIENT = {"uft": 0.001, "relift": 1.0}  # lambda where a case does not say it
DROPPED = 0.8  # prefix_rft: share of a prefix's tokens, those with the least entropy, that do not learn
BESIDE = ("stream", "buffer")


# ---------------------------------------------------------------- rollouts and how they started


def prefix_of(row: Row) -> int:
    return row.given.get("prefix", 0)


def start_of(row: Row) -> Hashable:
    """0 where the rollout started from nothing."""
    label = row.given.get("start")
    return prefix_of(row) if label is None else f"start {label}"


def own_tokens(row: Row) -> range:
    return range(prefix_of(row), len(row))


def advantage_over(rewards: list[float], reward: float, std: bool) -> float:
    """Of one rollout within a group of rewards, its own among them. Alone it keeps its reward."""
    if len(rewards) == 1:
        return reward / (1.0 + 1e-6) if std else reward
    mean = math.fsum(rewards) / len(rewards)
    if not std:
        return reward - mean
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in rewards) / (len(rewards) - 1))
    return (reward - mean) / (deviation + 1e-6)


def clipped_token(row: Row, t: int, advantage: float, s: Settings) -> Tensor:
    """Minus PPO's pessimistic minimum, with dual clip."""
    ratio = torch.exp(row.lp[t] - row.old[t])
    objective = torch.minimum(ratio * advantage, bounded(ratio, s) * advantage)
    if advantage < 0 and s.dual is not None:
        objective = torch.maximum(objective, torch.tensor(s.dual * advantage, dtype=torch.float64))
    return -objective


def reinforced(q: Question, s: Settings, alike: Callable[[Row], Hashable], std: bool = True) -> list[Term]:
    """GRPO (or Dr. GRPO) on every rollout's own tokens, its group the rollouts for which ``alike`` is the same."""
    terms = []
    for row in q.rollouts:
        group = [other.reward for other in q.rollouts if alike(other) == alike(row)]
        advantage = advantage_over(group, row.reward, std)
        terms.append(Term("R", row, [clipped_token(row, t, advantage, s) for t in own_tokens(row)]))
    return terms


def together(row: Row) -> Hashable:
    return "one group"


# ---------------------------------------------------------------- prefixes


def prefix_rft(q: Question, s: Settings) -> list[Term]:
    """2507.01679. Plain rollouts: R - mean of the plain; continuations: R less the mean of those that share the start,
    alone R; the prefix: (R - mean of the plain)/k on its tokens of most entropy, the others counted at 0."""
    plain = [row.reward for row in q.rollouts if start_of(row) == 0]
    baseline = math.fsum(plain) / len(plain) if plain else 0.0
    terms = []
    for term in reinforced(q, s, start_of, std=False):
        row, given = term.row, prefix_of(term.row)
        sharing = sum(start_of(other) == start_of(row) for other in q.rollouts)
        by_entropy = sorted(range(given), key=lambda t: (row.entropy[t].item(), t))
        certain = set(by_entropy[: math.floor(s.options["prefix_dropped"] * given + 1e-6)])
        of_prefix = [
            torch.zeros((), dtype=torch.float64)
            if t in certain
            else clipped_token(row, t, (row.reward - baseline) / sharing, s)
            for t in range(given)
        ]
        terms.append(Term("R", row, of_prefix + term.tokens))
    return terms


def uft(q: Question, s: Settings) -> list[Term]:
    """2505.16984: GRPO over all rollouts, and the likelihood of the hint's tokens, of every row that has some."""
    imitated = [Term("S", row, [-row.lp[t] for t in range(prefix_of(row))]) for row in q.rollouts if prefix_of(row)]
    return reinforced(q, s, together) + imitated


def stephint(q: Question, s: Settings) -> list[Term]:
    """2507.02841: GRPO over all rollouts, the steps that were given are frozen."""
    return reinforced(q, s, together)


def g2rpo_a(q: Question, s: Settings) -> list[Term]:
    """2508.13023: GRPO over all rollouts; the guidance lies inside the completion and learns as the rest of it."""
    terms = []
    for row in q.rollouts:
        advantage = advantage_over([other.reward for other in q.rollouts], row.reward, std=True)
        terms.append(Term("R", row, [clipped_token(row, t, advantage, s) for t in range(len(row))]))
    return terms


# ---------------------------------------------------------------- hints, streams, buffers


def questa(q: Question, s: Settings) -> list[Term]:
    """2507.13266: GRPO in the context with the hint; what has no hint, or another one, is no sample of that context."""
    return reinforced(q, s, start_of)


def pope(q: Question, s: Settings) -> list[Term]:
    """2601.18779: as QuestA, plain rollouts beside."""
    return reinforced(q, s, start_of)


def guide(q: Question, s: Settings) -> list[Term]:
    """2506.13923: the advantage over the whole group. A hinted row's log-probs are of the plain prompt, its old ones of
    the hinted prompt: the ratio corrects for the context."""
    return reinforced(q, s, together)


def chord(q: Question, s: Settings) -> list[Term]:
    """2508.11408, equation 1: (1 - mu) of GRPO; the stream's part is in ``of_stream``."""
    return [Term("R", term.row, [(1 - s.demo_coef) * x for x in term.tokens]) for term in reinforced(q, s, together)]


def relift(q: Question, s: Settings) -> list[Term]:
    """2506.07527: GRPO without the deviation."""
    return reinforced(q, s, together, std=False)


METHODS = {
    **{f.__name__: f for f in (prefix_rft, uft, stephint, g2rpo_a, questa, pope, guide, relift)},
    **dict.fromkeys(["chord_mu", "chord_phi", "amft_style"], chord),
}


def doubted(row: Row) -> Term:
    """CHORD-phi, equation 5: -sg(p(1 - p)) log p."""
    tokens = []
    for t in range(len(row)):
        p = torch.exp(row.lp[t]).item()
        tokens.append(-p * (1 - p) * row.lp[t])
    return Term("S", row, tokens)


def beside(method: str, row: Row) -> Term:
    """What a demonstration of the stream or the buffer adds; the weight mu or lambda is the normalisation's."""
    return doubted(row) if method == "chord_phi" else log_likelihood("S", row)


# ---------------------------------------------------------------- one update


def settings(case: dict) -> Settings:
    hpt = case["hpt"]
    options = {"prefix_dropped": DROPPED, **(hpt.get("options") or {})}
    normalization = hpt.get("normalization") or OWN[hpt["method"]]
    own = {"demo_coef": COEFFICIENT.get(hpt["method"], 0.1), **hpt, "normalization": normalization, "options": options}
    return settings_of({"hpt": own})


def parts_of(case: dict) -> dict[str, dict]:
    """The case's questions, its stream and its buffer, each as a case; what is beside are questions of one row."""
    parts = {"questions": {"hpt": case["hpt"], "questions": case["questions"]}}
    for name in BESIDE:
        rows = [{"uid": f"{name}[{i}]", "demos": [row]} for i, row in enumerate(case.get(name) or [])]
        parts[name] = {"hpt": case["hpt"], "questions": rows}
    return parts


def shares(case: dict, leaves: dict[Key, Tensor]) -> dict[tuple[Key, str], Tensor]:
    """Loss of each row that takes part, by row and part of the update."""
    s, found = settings(case), {}
    for part, of_part in parts_of(case).items():
        questions = questions_of(of_part, leaves, s)
        if part == "questions":
            terms = [term for q in questions for term in METHODS[s.method](q, s)]
        else:
            terms = [beside(s.method, q.demos[0]) for q in questions]
        found |= {(key, part): share for key, share in normalised(terms, len(questions), s).items()}
    return found


def gradients(case: dict) -> dict[Key, list[float]]:
    """d loss / d log_prob of every token of every row; zeros for a row that is not in the loss."""
    leaves = {key: leaf for part in parts_of(case).values() for key, leaf in leaves_of(part).items()}
    total = sum(shares(case, leaves).values(), torch.zeros((), dtype=torch.float64))
    total.backward()
    return {key: [0.0] * len(x) if x.grad is None else x.grad.tolist() for key, x in leaves.items()}
