"""The loss: tensors in, the loss and what its metrics are made of out. verl's protocol around it is ``host.loss_fn``.

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
# All scalars of a row travel in one tensor: TransferQueue drops a field for a whole rank if one row lacks it.
ROW_COLUMNS = (
    "is_demo", "w_rl", "w_demo", "w_entropy", "advantage", "reward", "correct", "other_log_prob", "prefix",
    "demo_advantage",
)  # fmt: skip
# Columns with a number a token, where the run has them: weights (1 on rollouts), a teacher's log-probs (0 on rollouts).
TOKEN_FIELDS = {"token_weights": "hpt_token_weights", "teacher_log_prob": "hpt_teacher_log_prob"}
WEIGHTS, TEACHER = TOKEN_FIELDS["token_weights"], TOKEN_FIELDS["teacher_log_prob"]


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


@dataclass
class Block:
    """What the loss made of a block of rows, for the metrics (``metrics.LOSS_METRICS``). Nothing in it is on the graph.

    gradient: (rows, response_len), of the loss on log π_θ. value: (rows,), what each row adds to the loss. is_demo,
    rl, imitated: (rows,) bool, demonstrations, rows with a weight in the RL sum, rows with one in the SFT sum. Padding
    is marked as a demonstration and has an empty mask, so that it counts nowhere. prefix_value: (rows,), what the
    prefix of each row adds to its value; None: there are no prefixes.
    """

    tokens: Tokens
    terms: RowTerms
    gradient: Tensor
    value: Tensor
    is_demo: Tensor
    rl: Tensor
    imitated: Tensor
    prefix_value: Tensor | None = None


def loss_of(
    log_prob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    column: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    spec: LossSpec,
    watch: Callable[[Block], dict[str, float]] = lambda block: {},
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """The loss of a block of rows, on the graph of ``log_prob`` and ``entropy``, and its sums by name.

    Args:
        log_prob, entropy: (rows, response_len), what the model says now; entropy None where nothing reads it.
        mask: (rows, response_len) bool, tokens that the row's author wrote. A prefix that learns (the row's column
            ``prefix``) is 0 there, as verl has it, and counts here.
        column: ``ROW_COLUMNS`` by name, (rows, 1) each. rows: the other fields of ``spec.fields``, padded.
        watch: makes the sums of what the loss is made of, before that is freed (``metrics.sums_of``).
    """
    is_demo, prefix, own = column["is_demo"].bool(), None, mask
    advantage = column["advantage"]
    if spec.method.place == "prefix":
        prefix = torch.arange(mask.shape[1], device=mask.device) < column["prefix"]
        own, mask = mask & ~prefix, mask | prefix
        advantage = torch.where(prefix, column["demo_advantage"], advantage)
    on_demo = is_demo if prefix is None else is_demo | prefix
    off = ~mask

    def blanked(x: Tensor) -> Tensor:
        """0 off the mask, so that nothing that stands there can leak."""
        return x.detach().to(log_prob.dtype).masked_fill(off, 0.0)

    if "advantages" in spec.fields:
        critic = blanked(rows["advantages"])
        advantage = critic if prefix is None else torch.where(prefix, advantage, critic)
    tokens = Tokens(
        log_prob=blanked(log_prob),
        mask=mask,
        advantage=advantage,
        reward=column["reward"],
        correct=column["correct"].bool(),
        old_log_prob=blanked(rows["old_log_probs"]),
        ref_log_prob=blanked(rows["ref_log_prob"]) if "ref_log_prob" in spec.fields else None,
        entropy=None if entropy is None else blanked(entropy),
        other_log_prob=column["other_log_prob"],
        teacher_log_prob=blanked(rows[TEACHER]) if TEACHER in spec.fields else None,
        prefix=prefix,
        constants=spec.constants,
    )
    w_rl = column["w_rl"]
    if "rollout_is_weights" in spec.fields:
        w_rl = w_rl * torch.where(on_demo, torch.ones_like(w_rl), blanked(rows["rollout_is_weights"]))
    of_tokens = blanked(rows[WEIGHTS]) if WEIGHTS in spec.fields else mask
    block = _block(row_terms(spec.method, tokens, is_demo), tokens, column, w_rl, of_tokens)
    loss, sums = Weighted.apply(log_prob, block.value.sum(), block.gradient), watch(block)
    del block  # its tensors are not kept while the rest is made
    if spec.entropy_coeff:
        w_entropy = column["w_entropy"]
        bonus = Weighted.apply(entropy, (w_entropy * tokens.entropy * own).sum(), w_entropy * own)
        loss = loss - spec.entropy_coeff * bonus
        sums["entropy_bonus"] = bonus.detach()
    if spec.kl_coef:
        kl = spec.kl_penalty(log_prob.masked_fill(off, 0.0), tokens.ref_log_prob, spec.kl_type)
        kl = (torch.where(is_demo, torch.zeros_like(w_rl), w_rl) * kl * own).sum()
        loss = loss + spec.kl_coef * kl
        sums["kl_loss"] = kl.detach()
    return loss, sums


def _block(terms: RowTerms, tokens: Tokens, column: Mapping[str, Tensor], w_rl: Tensor, of_tokens: Tensor) -> Block:
    """The terms under their weights; of_tokens: (rows, response_len), what multiplies a row's weights on each token."""
    on_rl, on_demo = w_rl * of_tokens, column["w_demo"] * of_tokens
    gradient = (on_rl * terms.rl).addcmul_(on_demo, terms.demo).neg_()
    value = on_rl.mul_(terms.rl_value).addcmul_(on_demo, terms.demo_value).neg_()
    on_prefix = None if tokens.prefix is None else (value * tokens.prefix).sum(-1)
    is_demo, rl, imitated = ((column[name] != 0).squeeze(-1) for name in ("is_demo", "w_rl", "w_demo"))
    return Block(tokens, terms, gradient, value.sum(-1), is_demo, rl, imitated, on_prefix)


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
