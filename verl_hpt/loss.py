"""The actor's loss, in verl's place for it: ``actor_rollout_wg.set_loss_fn(partial(hpt_loss, spec=...))``.

The driver gave each row its weights; the worker multiplies, sums and scales by ``dp_size``, on every engine (FSDP
averages gradients over ranks, Megatron's engine applies its own micro-batch scaling). So the result cannot depend on
micro-batches, dynamic batch sizes, ranks, padding, Ulysses or ``ppo_epochs``. With coefficients under stop-gradient,
the gradient of one token is −(w_rl·c_rl + w_demo·c_demo)·∇ log π_θ; entropy bonus and KL loss act on RL rollouts alone,
with their RL weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from verl_hpt.estimator import Method, RowTerms, row_terms
from verl_hpt.parts import Constants, Tokens

ROW_FIELD = "hpt_row"
# One row of numbers a row of the batch: a field that is missing on one row would vanish for its whole rank.
ROW_COLUMNS = ("is_demo", "w_rl", "w_demo", "w_entropy", "advantage", "reward", "correct", "other_log_prob")
# Edges of the histograms from which the driver reads quantiles: probabilities and weights of demonstrations' tokens.
P_EDGES = tuple(i / 20 for i in range(21))
W_EDGES = (
    0.0,
    *(10 ** (i / 4 - 3) for i in range(12)),
    *(0.999, 1.001),  # plain imitation
    *(10 ** (i / 4) for i in range(1, 9)),
    *(1e3, 1e4, float("inf")),
)


@dataclass(frozen=True)
class LossSpec:
    """All that the worker needs to know; plain values, sent to it once.

    fields: what the rows must bring. The loss raises, naming the field, when one is absent.
    """

    method: Method
    constants: Constants = field(default_factory=Constants)
    fields: tuple[str, ...] = ("response_mask", "old_log_probs", ROW_FIELD)
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    kl_type: str = "low_var_kl"
    kl_penalty: Callable | None = None  # verl's, handed in


def hpt_loss(model_output, data, dp_group=None, *, spec: LossSpec):
    """verl's loss function protocol. Returns the loss, a scalar on the graph, and metrics as sums."""
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    entropy = model_output.get("entropy")
    wanted = "entropy" in spec.method.needs or spec.entropy_coeff != 0
    present = set(data.keys())
    missing = [name for name in spec.fields if name not in present]
    if missing or (wanted and entropy is None):
        missing += ["entropy"] if wanted and entropy is None else []
        raise KeyError(f"the actor update lacks the field(s) {', '.join(missing)}; it has {', '.join(sorted(present))}")
    rows = data.select(*spec.fields).to_padded_tensor()
    log_prob = log_prob if log_prob.dtype == torch.float64 else log_prob.float()
    entropy = None if entropy is None or not wanted else no_padding_2_padding(entropy, data).to(log_prob.dtype)

    column = dict(zip(ROW_COLUMNS, rows[ROW_FIELD].to(log_prob.dtype).unsqueeze(-1).unbind(1), strict=True))
    mask, is_demo = rows["response_mask"].bool(), column["is_demo"].bool()
    tokens = Tokens(
        log_prob=log_prob.detach(),
        mask=mask,
        advantage=_cast(rows, "advantages", log_prob) if "advantages" in spec.fields else column["advantage"],
        reward=column["reward"],
        correct=column["correct"].bool(),
        old_log_prob=_cast(rows, "old_log_probs", log_prob),
        ref_log_prob=_cast(rows, "ref_log_prob", log_prob) if "ref_log_prob" in spec.fields else None,
        entropy=None if entropy is None else entropy.detach(),
        other_log_prob=column["other_log_prob"],
        constants=spec.constants,
    )
    terms = row_terms(spec.method, tokens, is_demo)
    w_rl = column["w_rl"]
    if "rollout_is_weights" in spec.fields:
        w_rl = w_rl * torch.where(is_demo, torch.ones_like(w_rl), _cast(rows, "rollout_is_weights", log_prob))
    w_rl, w_demo = w_rl * mask, column["w_demo"] * mask

    gradient = w_rl * terms.rl + w_demo * terms.demo
    value = -(w_rl * terms.rl_value + w_demo * terms.demo_value)
    ascent = -(gradient * log_prob).sum()
    loss = ascent - ascent.detach() + value.sum()
    sums = _sums(tokens, terms, is_demo, w_rl, w_demo, value)
    if spec.entropy_coeff:
        bonus = (column["w_entropy"] * mask * entropy).sum()
        loss = loss - spec.entropy_coeff * bonus
        sums["entropy_bonus"] = bonus
    if spec.kl_coef:
        kl = spec.kl_penalty(log_prob, tokens.ref_log_prob, spec.kl_type)
        kl = torch.where(is_demo, torch.zeros_like(kl), w_rl.detach() * kl).sum()
        loss = loss + spec.kl_coef * kl
        sums["kl_loss"] = kl
    scale = float(data["dp_size"])
    names, values = list(sums), torch.stack([s.detach().float() for s in sums.values()]).tolist()
    metrics = {f"hpt/{n}": Metric(AggregationType.SUM, v * scale) for n, v in zip(names, values, strict=True)}
    return loss * scale, metrics


def _cast(rows, name: str, like: Tensor) -> Tensor:
    return rows[name].to(like.dtype)


@torch.no_grad()
def _sums(tokens: Tokens, terms: RowTerms, is_demo: Tensor, w_rl: Tensor, w_demo: Tensor, value: Tensor) -> dict:
    """Sums that add up over micro-batches and ranks to what the driver shows; the same keys in every micro-batch."""
    on_demo = tokens.mask & is_demo
    on_rollout = tokens.mask & ~is_demo
    rl, imitated = w_rl != 0, w_demo != 0
    size = (w_rl * terms.rl + w_demo * terms.demo).abs()
    clipped = (terms.keep == 0) & rl
    p, learned = tokens.log_prob.exp(), on_demo & (rl | imitated)
    # The weight of ∇ log π relative to plain imitation: the coefficient itself.
    w = torch.where(imitated, terms.demo, terms.rl).abs()
    sums = {
        "loss_rl": value[~is_demo.squeeze(-1)].sum(),
        "loss_demo": value[is_demo.squeeze(-1)].sum(),
        "demo_nll": -(tokens.log_prob * on_demo).sum(),
        "demo_tokens": on_demo.sum(),
        "rl_tokens": (on_rollout & rl).sum(),
        "strength_rollouts": (size * on_rollout).sum(),
        "strength_demos": (size * on_demo).sum(),
        "clipped_rollouts": (clipped & on_rollout).sum(),
        "clipped_demos": (clipped & on_demo).sum() + ((terms.demo == 0) & imitated & on_demo).sum(),
        "approx_kl": ((tokens.old_log_prob - tokens.log_prob) * (on_rollout & rl)).sum(),
    }
    sums |= _histogram("demo_p", p[learned], P_EDGES)
    sums |= _histogram("demo_w", w[learned], W_EDGES)
    return sums


def _histogram(name: str, x: Tensor, edges: tuple[float, ...]) -> dict[str, Tensor]:
    inner = torch.tensor(edges[1:-1], dtype=x.dtype, device=x.device)
    counts = torch.bincount(torch.bucketize(x, inner), minlength=len(edges) - 1)
    return {f"{name}_{i}": count for i, count in enumerate(counts)}
