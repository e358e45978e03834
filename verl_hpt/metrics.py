"""The numbers of a step that people watch, all under ``hpt/``. Shares lie in [0, 1]; see the README for the list.

``of_plan`` is what the gate and the plan did. ``LOSS_METRICS`` are made where the loss is: each micro-batch sends sums,
verl adds them up over micro-batches and ranks, and ``of_update`` divides them on the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl_hpt import gate
from verl_hpt.estimator import STARTS, RowTerms
from verl_hpt.loss import Block
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, Plan, PlanSettings, Question

QUANTILES = (0.1, 0.5, 0.9)
SENT = "actor/hpt/"  # where verl puts what the loss returns


def of_plan(plan: Plan, questions: Sequence[Question], settings: PlanSettings, counts: Counter) -> dict[str, float]:
    """What the gate and the plan did. counts: unusable demonstrations, by reason."""
    if not questions:
        return {"hpt/questions": 0.0}
    zones = Counter(decision.zone for decision in plan.decisions)
    plain = [question.started_at == 0 for question in questions]
    solved = [each[of].mean() if of.any() else 0.0 for each, of in zip(plan.solved, plain, strict=True)]
    rollouts = np.array([of.sum() for of in plain])
    on_rl = np.array([decision.on > 0 for decision in plan.decisions])
    taught = np.unique(plan.question[(plan.kind == DEMO) & (plan.question < len(questions))])
    metrics = {
        "hpt/questions": float(len(questions)),
        "hpt/demo_share": float(np.mean([not decision.on and decision.zone != "none" for decision in plan.decisions])),
        "hpt/taught_share": len(taught) / len(questions),
        "hpt/all_fail_share": float(np.mean(np.array(solved)[rollouts > 0] == 0)) if rollouts.any() else 0.0,
        "hpt/rows/rollouts": float((plan.kind == ROLLOUT).sum()),
        "hpt/rows/demos": float((plan.kind == DEMO).sum()),
        "hpt/rows/padding": float((plan.layout == PADDING).sum()),
        "hpt/dropped/rollouts": float(sum(d.kind == ROLLOUT for d in plan.dropped)),
        "hpt/dropped/demos": float(sum(d.kind == DEMO for d in plan.dropped)),
        "hpt/unusable_demos": float(counts["unusable"]),
        "hpt/optimizer_steps": float(plan.steps),
    }
    if rollouts.any():  # of those that started from nothing
        metrics["hpt/solve_rate"] = float(np.dot(solved, rollouts) / rollouts.sum())
    metrics |= of_rollouts(questions, settings)
    if settings.method.place in STARTS:
        metrics |= of_starts(questions, plan.solved)
    metrics |= {f"hpt/zone/{zone}": n / len(questions) for zone, n in zones.items()}
    metrics |= {f"hpt/{name}": float(n) for name, n in counts.items() if "/" in name}
    if rollouts[on_rl].any():
        share = np.dot(np.array(solved)[on_rl], rollouts[on_rl]) / rollouts[on_rl].sum()
        metrics["hpt/rl_solve_rate"] = float(share)
    metrics |= _by_source(questions, plan, solved, rollouts)
    rl, demo = _mean_weight(plan.w_rl, plan.tokens), _mean_weight(plan.w_demo, plan.demo_tokens)
    if rl and demo:
        # Strength of a demonstration's token against a rollout's: the effective ratio of the normalisation and λ.
        metrics["hpt/demo_to_rl_weight"] = demo / rl
    return metrics


def of_rollouts(questions: Sequence[Question], settings: PlanSettings) -> dict[str, float]:
    """Length of the rollouts, and how many of them were cut at the length limit, of all and of those scored a success.

    The latter share ignores ``gate.finished``: it is what the gate would have been told without it.
    """
    lengths = np.concatenate([q.lengths for q in questions])
    if not len(lengths):
        return {}
    cut = np.concatenate([np.zeros(len(q.lengths), bool) if q.truncated is None else q.truncated for q in questions])
    reached = np.concatenate([gate.solved(q.scores, settings.gate_of(q.source).success) for q in questions])
    return {
        "hpt/response_length": float(lengths.mean()),
        "hpt/truncated_share": float(cut.mean()),
        "hpt/truncated_success_share": float(cut[reached].mean()) if reached.any() else 0.0,
    }


def of_starts(questions: Sequence[Question], solved: Sequence[np.ndarray]) -> dict[str, float]:
    """Of rollouts that started from a demonstration: how many, how many were solved, from how many of its tokens."""
    started = np.concatenate([question.started_at != 0 for question in questions])
    prefixes = [np.zeros(len(q.rewards)) if q.prefixes is None else q.prefixes for q in questions]
    cut = np.concatenate([np.zeros(len(q.rewards), bool) if q.truncated is None else q.truncated for q in questions])
    metrics = {"hpt/start/share": float(started.mean()), "hpt/start/tokens": float(np.concatenate(prefixes).sum())}
    if started.any():
        metrics["hpt/start/solve_rate"] = float(np.concatenate(solved)[started].mean())
        metrics["hpt/start/cut"] = float(cut[started].mean())
    return metrics


# --- of the loss -----------------------------------------------------------------------------------------------------


def loss(block: Block) -> Tensor:
    """What each row adds to the loss. -> (rows,), as of the following ones"""
    return block.value


def strength(block: Block) -> Tensor:
    return block.gradient.abs().sum(-1)


def clipped(block: Block) -> Tensor:
    """Tokens that a mask stops: the RL term's, and on demonstrations the S term's too."""
    mask, terms = block.tokens.mask, block.terms
    stopped = (mask & (terms.keep == 0)).sum(-1) * block.rl
    return stopped + (mask & (terms.demo == 0)).sum(-1) * (block.imitated & block.is_demo)


def tokens(block: Block) -> Tensor:
    return block.tokens.mask.sum(-1)


def rl_tokens(block: Block) -> Tensor:
    return block.tokens.mask.sum(-1) * block.rl


def nll(block: Block) -> Tensor:
    return block.tokens.log_prob.sum(-1).neg_()


def approx_kl(block: Block) -> Tensor:
    return (block.tokens.old_log_prob - block.tokens.log_prob).sum(-1) * block.rl


Rows = Literal["rollouts", "demos", "all"]
ROWS = ("rollouts", "demos", "all")
PerRow = Callable[[Block], Tensor]


class Ratio(NamedTuple):
    """A number a row, summed over the rows of a kind, divided by another such sum; by nothing where ``per`` is None."""

    of: PerRow
    rows: Rows
    per: PerRow | None = None
    per_rows: Rows | None = None  # None: as ``rows``

    def parts(self) -> list[tuple[str, PerRow, Rows]]:
        """The sums that it is made of: name, number a row, rows."""
        pairs = [(self.of, self.rows), (self.per, self.per_rows or self.rows)]
        return [(f"{of.__name__}_{rows}", of, rows) for of, rows in pairs if of is not None]


# Every metric that is made where the loss is, by its name under ``hpt/``. A further one is one entry more.
LOSS_METRICS = {
    "loss/rl": Ratio(loss, "rollouts"),
    "loss/demo": Ratio(loss, "demos"),
    "demo_nll": Ratio(nll, "demos", tokens),
    "clip_share/demos": Ratio(clipped, "demos", tokens),
    "clip_share/rollouts": Ratio(clipped, "rollouts", rl_tokens),
    "approx_kl": Ratio(approx_kl, "rollouts", rl_tokens),
    "gradient_share/demos": Ratio(strength, "demos", strength, "all"),
    "gradient_share/rollouts": Ratio(strength, "rollouts", strength, "all"),
}
# Quantiles over the tokens that demonstrations teach, from histograms with these edges: the token's probability, and
# the coefficient of its ∇ log π, which is the weight relative to plain imitation.
HISTOGRAMS = {
    "demo_p": tuple(i / 20 for i in range(21)),
    "demo_w": (
        0.0,
        *(10 ** (i / 4 - 3) for i in range(12)),
        *(0.999, 1.001),  # plain imitation
        *(10 ** (i / 4) for i in range(1, 9)),
        *(1e3, 1e4, float("inf")),
    ),
}
_SUMS = {name: (of, rows) for metric in LOSS_METRICS.values() for name, of, rows in metric.parts()}
_BINS = {name: [f"{name}_{i}" for i in range(len(edges) - 1)] for name, edges in HISTOGRAMS.items()}
SUMS = (*_SUMS, *(name for names in _BINS.values() for name in names))


@torch.no_grad()
def sums_of(block: Block) -> dict[str, float]:
    """What a micro-batch sends: sums that add up over micro-batches and ranks, by name (``SUMS``)."""
    if block.tokens.prefix is not None:
        block = parted(block)
    demos = block.is_demo.to(block.value.dtype)
    of_kinds = torch.stack([1 - demos, demos, torch.ones_like(demos)], dim=1)
    functions = list(dict.fromkeys(of for of, _ in _SUMS.values()))
    of_rows = torch.stack([of(block).to(demos.dtype) for of in functions]) @ of_kinds

    taught = (block.is_demo & (block.rl | block.imitated)).nonzero().squeeze(-1)
    imitated = block.imitated[taught].unsqueeze(-1)
    coefficient = torch.where(imitated, block.terms.demo[taught], block.terms.rl[taught])
    of_tokens = {"demo_p": block.tokens.log_prob[taught].exp(), "demo_w": coefficient.abs()}
    learned = block.tokens.mask[taught].to(demos.dtype)
    counts = [histogram(of_tokens[name], edges, learned) for name, edges in HISTOGRAMS.items()]
    numbers = torch.cat([of_rows.reshape(-1), *counts]).tolist()  # one transfer
    at = {(of, rows): numbers[3 * i + j] for i, of in enumerate(functions) for j, rows in enumerate(ROWS)}
    bins = numbers[3 * len(functions) :]
    return {name: at[key] for name, key in _SUMS.items()} | dict(zip(SUMS[len(_SUMS) :], bins, strict=True))


def parted(block: Block) -> Block:
    """The block with the prefix of each row as a row of its own, a demonstration: a token's kind, not a row's, says
    where it is counted."""
    prefix, mask = block.tokens.prefix, block.tokens.mask
    at = torch.cat([torch.arange(len(mask), device=mask.device), prefix.any(-1).nonzero().squeeze(-1)])
    is_prefix = torch.arange(len(at), device=mask.device) >= len(mask)
    here = prefix[at] == is_prefix.unsqueeze(-1)

    def part(x: Tensor) -> Tensor:
        return (x.expand_as(mask)[at] * here).to(x.dtype)

    tokens = replace(
        block.tokens,
        mask=part(mask),
        prefix=None,
        **{name: part(getattr(block.tokens, name)) for name in ("log_prob", "old_log_prob")},
    )
    terms = RowTerms(**{field.name: part(getattr(block.terms, field.name)) for field in fields(RowTerms)})
    value = torch.where(is_prefix, block.prefix_value[at], (block.value - block.prefix_value)[at])
    is_demo = block.is_demo[at] | is_prefix
    return Block(tokens, terms, part(block.gradient), value, is_demo, block.rl[at], block.imitated[at])


@lru_cache
def _inner(edges: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The edges between bins, made once: a transfer to the device otherwise, a micro-batch and histogram."""
    return torch.tensor(edges[1:-1], dtype=dtype, device=device)


def histogram(x: Tensor, edges: tuple[float, ...], weight: Tensor) -> Tensor:
    """Sums of the weights of the x between edges; an edge belongs to the bin below it. -> (bins,)"""
    bins = torch.bucketize(x, _inner(edges, x.dtype, x.device)).reshape(-1)
    return torch.bincount(bins, weight.reshape(-1), minlength=len(edges) - 1).to(weight.dtype)


def of_update(metrics: dict) -> None:
    """Turn the sums that the loss sent, averaged by verl over optimizer steps, into shares and means; in place."""
    sent = {key[len(SENT) :]: metrics.pop(key) for key in list(metrics) if key.startswith(SENT)}
    if not sent:
        return
    for name, metric in LOSS_METRICS.items():
        number, *per = (sent[part] for part, _, _ in metric.parts())
        if not per or per[0]:
            metrics[f"hpt/{name}"] = number / per[0] if per else number
    for name, edges in HISTOGRAMS.items():
        counts = np.array([sent[bin_] for bin_ in _BINS[name]])
        if counts.sum():
            metrics |= {f"hpt/{name}/q{round(100 * q)}": quantile(counts, edges, q) for q in QUANTILES}
    metrics |= {f"hpt/{name}": number for name, number in sent.items() if name not in SUMS}


def quantile(counts: np.ndarray, edges: Sequence[float], q: float) -> float:
    """Quantile of a histogram, linear within a bin; the last bin's lower edge where it has no upper one."""
    total = counts.sum()
    if total <= 0:
        return 0.0
    below = np.concatenate([[0.0], np.cumsum(counts)]) / total
    at = int(min(np.searchsorted(below, q, side="left"), len(counts))) - 1
    at = max(at, 0)
    low, high = edges[at], edges[at + 1]
    if not np.isfinite(high):
        return float(low)
    return float(low + (high - low) * (q - below[at]) / max(below[at + 1] - below[at], 1e-12))


# Where a step has several updates (``parameter_sync_step``), counts are summed, of what is kept the last is taken, of
# all else the mean over questions. verl would choose by words in a name: a source "minerva" would be a minimum.
SUMMED = (
    "questions", "rows/", "dropped/", "unusable", "optimizer_steps", "demo_source/", "stream/unusable", "start/tokens",
    "start/missed", "history/retired", "history/cooling", "history/early_gated", "history/tokens_sampled",
)  # fmt: skip
LAST = ("history/", "buffer/entries", "stream/epoch", "demo_coef", "start/length", "all_demo_streak", "alarm/")


def of_step(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Our metrics of a step, of those of its updates, whole or none of them: the names under ``hpt/``."""
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for update in updates for key in update if key.startswith("hpt/")):
        having, name = [update for update in updates if key in update], key.removeprefix("hpt/")
        values = np.array([update[key] for update in having], dtype=np.float64)
        if name == "history/tokens_saved" or name.startswith(SUMMED):
            found[key] = float(values.sum())
        elif name.startswith(LAST) or len(having) == 1:
            found[key] = float(values[-1])
        else:
            weights = np.array([update.get("hpt/questions", 0.0) for update in having])
            found[key] = float(np.average(values, weights=weights if weights.any() else None))
    return found


def _by_source(questions: Sequence[Question], plan: Plan, solved, rollouts) -> dict[str, float]:
    """Share on demonstrations and solve rate of each data source, where there are several."""
    sources = sorted({q.source for q in questions})
    if len(sources) < 2:
        return {}
    metrics = {}
    for source in sources:
        of_source = [i for i, q in enumerate(questions) if q.source == source]
        metrics[f"hpt/source/{source}/demo_share"] = float(np.mean([not plan.decisions[i].on for i in of_source]))
        if known := [solved[i] for i in of_source if rollouts[i]]:
            metrics[f"hpt/source/{source}/solve_rate"] = float(np.mean(known))
    return metrics


def _mean_weight(weights: np.ndarray, tokens: np.ndarray) -> float:
    """Mean weight of a token among the rows that have one."""
    weighted = weights != 0
    return float(np.dot(weights, tokens) / tokens[weighted].sum()) if weighted.any() else 0.0
