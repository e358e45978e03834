"""The numbers of a step that people watch, all under ``hpt/``. Shares lie in [0, 1]; see the README for the list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from verl_hpt import gate
from verl_hpt.loss import P_EDGES, W_EDGES
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, Plan, PlanSettings, Question

QUANTILES = (0.1, 0.5, 0.9)
SENT = "actor/hpt/"  # where verl puts what the loss returns


def of_plan(plan: Plan, questions: Sequence[Question], settings: PlanSettings, counts: Counter) -> dict[str, float]:
    """What the gate and the plan did. counts: unusable demonstrations, by reason."""
    if not questions:
        return {"hpt/questions": 0.0}
    zones = Counter(decision.zone for decision in plan.decisions)
    solved = [each.mean() if len(each) else 0.0 for each in plan.solved]
    rollouts = np.array([len(q.rewards) for q in questions])
    on_rl = np.array([decision.on > 0 for decision in plan.decisions])
    taught = np.unique(plan.question[plan.kind == DEMO])
    metrics = {
        "hpt/questions": float(len(questions)),
        "hpt/demo_share": float(np.mean([not decision.on and decision.zone != "none" for decision in plan.decisions])),
        "hpt/taught_share": len(taught) / len(questions),
        "hpt/solve_rate": float(np.dot(solved, rollouts) / max(rollouts.sum(), 1)),
        "hpt/all_fail_share": float(np.mean(np.array(solved) == 0)),
        "hpt/rows/rollouts": float((plan.kind == ROLLOUT).sum()),
        "hpt/rows/demos": float((plan.kind == DEMO).sum()),
        "hpt/rows/padding": float((plan.layout == PADDING).sum()),
        "hpt/dropped/rollouts": float(sum(d.kind == ROLLOUT for d in plan.dropped)),
        "hpt/dropped/demos": float(sum(d.kind == DEMO for d in plan.dropped)),
        "hpt/unusable_demos": float(counts["unusable"]),
        "hpt/optimizer_steps": float(plan.steps),
    }
    metrics |= of_rollouts(questions, settings)
    metrics |= {f"hpt/zone/{zone}": n / len(questions) for zone, n in zones.items()}
    metrics |= {f"hpt/{name}": float(n) for name, n in counts.items() if "/" in name}
    if on_rl.any():
        share = np.dot(np.array(solved)[on_rl], rollouts[on_rl]) / max(rollouts[on_rl].sum(), 1)
        metrics["hpt/rl_solve_rate"] = float(share)
    metrics |= _by_source(questions, plan, solved)
    rl, demo = _mean_weight(plan.w_rl, plan.tokens), _mean_weight(plan.w_demo, plan.tokens)
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


def of_update(metrics: dict) -> None:
    """Turn the sums that the loss sent, averaged by verl over optimizer steps, into shares and means; in place."""
    sent = {key[len(SENT) :]: metrics.pop(key) for key in list(metrics) if key.startswith(SENT)}
    if not sent:
        return
    metrics["hpt/loss/rl"], metrics["hpt/loss/demo"] = sent["loss_rl"], sent["loss_demo"]
    if sent["demo_tokens"]:
        metrics["hpt/demo_nll"] = sent["demo_nll"] / sent["demo_tokens"]
        metrics["hpt/clip_share/demos"] = sent["clipped_demos"] / sent["demo_tokens"]
        for name, edges in (("demo_p", P_EDGES), ("demo_w", W_EDGES)):
            counts = np.array([sent[f"{name}_{i}"] for i in range(len(edges) - 1)])
            for q in QUANTILES:
                metrics[f"hpt/{name}/q{round(100 * q)}"] = quantile(counts, edges, q)
    if sent["rl_tokens"]:
        metrics["hpt/clip_share/rollouts"] = sent["clipped_rollouts"] / sent["rl_tokens"]
        metrics["hpt/approx_kl"] = sent["approx_kl"] / sent["rl_tokens"]
    strength = sent["strength_rollouts"] + sent["strength_demos"]
    if strength:
        metrics["hpt/gradient_share/demos"] = sent["strength_demos"] / strength
        metrics["hpt/gradient_share/rollouts"] = sent["strength_rollouts"] / strength
    for name in ("entropy_bonus", "kl_loss"):
        if name in sent:
            metrics[f"hpt/{name}"] = sent[name]


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


def _by_source(questions: Sequence[Question], plan: Plan, solved) -> dict[str, float]:
    """Share on demonstrations and solve rate of each data source, where there are several."""
    sources = sorted({q.source for q in questions})
    if len(sources) < 2:
        return {}
    metrics = {}
    for source in sources:
        here = [i for i, q in enumerate(questions) if q.source == source]
        metrics[f"hpt/source/{source}/demo_share"] = float(np.mean([not plan.decisions[i].on for i in here]))
        metrics[f"hpt/source/{source}/solve_rate"] = float(np.mean([solved[i] for i in here]))
    return metrics


def _mean_weight(weights: np.ndarray, tokens: np.ndarray) -> float:
    """Mean weight of a token among the rows that have one."""
    here = weights != 0
    return float(np.dot(weights[here], tokens[here]) / tokens[here].sum()) if here.any() else 0.0
