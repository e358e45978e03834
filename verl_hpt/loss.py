"""The loss: tensors in, the loss and its sums by name out. verl's protocol around it is ``host.loss_fn``.

The driver gave each row its weights; the loss multiplies and sums. So the result cannot depend on micro-batches,
dynamic batch sizes, ranks, padding, Ulysses or ``ppo_epochs``. With coefficients under stop-gradient, the gradient of
one token is −(w_rl·c_rl + w_demo·c_demo)·∇ log π_θ; entropy bonus and KL loss act on RL rollouts alone, with their RL
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verl_hpt.estimator import Method, RowTerms, row_terms
from verl_hpt.parts import Constants, Tokens

ROW_FIELD = "hpt_row"
# One row of numbers a row of the batch: a field that is missing on one row would vanish for its whole rank.
ROW_COLUMNS = ("is_demo", "w_rl", "w_demo", "w_entropy", "advantage", "reward", "correct", "other_log_prob")
# What is told of each token where the run asks for it: weights (1 on rollouts), a teacher's log-probs (0 on rollouts).
TOKEN_FIELDS = {"token_weights": "hpt_token_weights", "teacher_log_prob": "hpt_teacher_log_prob"}
WEIGHTS, TEACHER = TOKEN_FIELDS["token_weights"], TOKEN_FIELDS["teacher_log_prob"]
# Edges of the histograms from which the driver reads quantiles: probabilities and weights of demonstrations' tokens.
P_EDGES = tuple(i / 20 for i in range(21))
W_EDGES = (
    0.0,
    *(10 ** (i / 4 - 3) for i in range(12)),
    *(0.999, 1.001),  # plain imitation
    *(10 ** (i / 4) for i in range(1, 9)),
    *(1e3, 1e4, float("inf")),
)
# Sums that add up over micro-batches and ranks, the same in every micro-batch: of rollouts' rows and demonstrations'.
SUMS = (
    "loss_rl", "loss_demo", "strength_rollouts", "strength_demos", "clipped_rollouts", "clipped_demos",
    "tokens_rollouts", "demo_tokens", "rl_tokens", "rl_tokens_demos", "nll_rollouts", "demo_nll", "approx_kl",
    "approx_kl_demos", *(f"demo_p_{i}" for i in range(len(P_EDGES) - 1)),
    *(f"demo_w_{i}" for i in range(len(W_EDGES) - 1)),
)  # fmt: skip


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


def loss_and_sums(
    log_prob: Tensor, entropy: Tensor | None, mask: Tensor, column: Mapping[str, Tensor], rows: Mapping, spec: LossSpec
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a block of rows, on the graph of ``log_prob`` and ``entropy``, and its sums by name.

    Args:
        log_prob, entropy: (rows, response_len), what the model says now; entropy None where nothing reads it.
        mask: (rows, response_len) bool, tokens that the row's author wrote.
        column: ``ROW_COLUMNS`` by name, (rows, 1) each. rows: the other fields of ``spec.fields``, padded.
    """
    off = ~mask

    def blanked(x: Tensor) -> Tensor:
        """0 off the mask, so that nothing that stands there can leak."""
        return x.detach().to(log_prob.dtype).masked_fill(off, 0.0)

    is_demo = column["is_demo"].bool()
    tokens = Tokens(
        log_prob=blanked(log_prob),
        mask=mask,
        advantage=blanked(rows["advantages"]) if "advantages" in spec.fields else column["advantage"],
        reward=column["reward"],
        correct=column["correct"].bool(),
        old_log_prob=blanked(rows["old_log_probs"]),
        ref_log_prob=blanked(rows["ref_log_prob"]) if "ref_log_prob" in spec.fields else None,
        entropy=None if entropy is None else blanked(entropy),
        other_log_prob=column["other_log_prob"],
        teacher_log_prob=blanked(rows[TEACHER]) if TEACHER in spec.fields else None,
        constants=spec.constants,
    )
    terms = row_terms(spec.method, tokens, is_demo)
    w_rl = column["w_rl"]
    if "rollout_is_weights" in spec.fields:
        w_rl = w_rl * torch.where(is_demo, torch.ones_like(w_rl), blanked(rows["rollout_is_weights"]))
    of_tokens = blanked(rows[WEIGHTS]) if WEIGHTS in spec.fields else mask
    loss, sums = _sum(log_prob, tokens, terms, column, w_rl, of_tokens)
    named = dict(zip(SUMS, torch.cat([x.reshape(-1).to(loss.dtype) for x in sums]).unbind(), strict=True))
    if spec.entropy_coeff:
        bonus = Weighted.apply(entropy, (column["w_entropy"] * tokens.entropy).sum(), column["w_entropy"] * mask)
        loss = loss - spec.entropy_coeff * bonus
        named["entropy_bonus"] = bonus.detach()
    if spec.kl_coef:
        kl = spec.kl_penalty(log_prob.masked_fill(off, 0.0), tokens.ref_log_prob, spec.kl_type)
        kl = (torch.where(is_demo, torch.zeros_like(w_rl), w_rl) * kl * mask).sum()
        loss = loss + spec.kl_coef * kl
        named["kl_loss"] = kl.detach()
    return loss, named


class Weighted(torch.autograd.Function):
    """A given value whose gradient on ``of`` is the given weight: the one place where a loss meets the graph.

    Coefficients are under stop-gradient, so no other gradient exists; nothing but the weight is kept for backward.
    """

    @staticmethod
    def forward(ctx, of: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        return weight * grad, None, None


def _sum(
    log_prob: Tensor, tokens: Tokens, terms: RowTerms, column: dict, w_rl: Tensor, of_tokens: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The terms under their weights summed, on the graph; and the numbers that ``SUMS`` names, in its order.

    of_tokens: (rows, response_len) what multiplies a row's weights on each token: the mask, or weights, 0 off the mask.
    """
    with torch.no_grad():
        mask, demo = tokens.mask, column["is_demo"].squeeze(-1)
        rl, imitated = (column["w_rl"] != 0).squeeze(-1), (column["w_demo"] != 0).squeeze(-1)
        w_rl, w_demo = w_rl * of_tokens, column["w_demo"] * of_tokens
        gradient = (w_rl * terms.rl).addcmul_(w_demo, terms.demo).neg_()
        value = w_rl.mul_(terms.rl_value).addcmul_(w_demo, terms.demo_value).sum(-1).neg_()
        count = mask.sum(-1)
        of_rows = torch.stack(  # sums over each row's tokens, then over the rows of a kind
            [
                value,
                gradient.abs().sum(-1),
                (mask & (terms.keep == 0)).sum(-1) * rl,
                count,
                count * rl,
                tokens.log_prob.sum(-1).neg_(),
                (tokens.old_log_prob - tokens.log_prob).sum(-1) * rl,
            ]
        )
        taught = ((demo > 0) & (rl | imitated)).nonzero().squeeze(-1)
        learned, s_rows, s_term = mask[taught], imitated[taught].unsqueeze(-1), terms.demo[taught]
        of_kinds = of_rows @ torch.stack([1 - demo, demo], dim=1)
        of_kinds[2, 1] += ((s_term == 0) & s_rows & learned).sum()  # an S term's mask stops tokens too
        sums = [
            of_kinds,
            _histogram(tokens.log_prob[taught][learned].exp(), P_EDGES),
            # The weight of ∇ log π relative to plain imitation: the coefficient itself.
            _histogram(torch.where(s_rows, s_term, terms.rl[taught])[learned].abs(), W_EDGES),
        ]
        total = value.sum()
    return Weighted.apply(log_prob, total, gradient), sums


def _histogram(x: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Counts of x between edges. -> (bins,)"""
    inner = torch.tensor(edges[1:-1], dtype=x.dtype, device=x.device)
    return torch.bincount(torch.bucketize(x, inner), minlength=len(edges) - 1)
