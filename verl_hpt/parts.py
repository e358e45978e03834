"""The four kinds of parts that a gradient estimator is made of, each a free function on tensors.

A method's gradient on one token is ``w · ∇ log π_θ`` with (arXiv 2509.04419, "Towards a Unified View", section 3)

    w = mask · π_θ/π_ref · Â · f'

- a **mask** returns ``(keep, bound)``: keep is 1 where the token learns; bound is the ratio shown in the loss value
  where it does not (None: the token's value is 0 there);
- a **reference** returns log π_ref, the denominator (log space);
- an **advantage** returns Â; one with ``over_group`` has it computed by the plan from the rewards of a question's rows;
- a **likelihood** returns ``(f/p, f')`` of a function f(p) of the token's probability: (1, 1) for f(p) = p. f/p is read
  in R terms alone, where the loss shows Â·f(p)/π_ref. Of two ways to the same w take the one whose factors stay finite
  as p → 0: a weight of √p is reference ``current`` with f' = √p, not reference ``one`` with f' = 1/√p.

Sources are arXiv ids. Formulas were compared with published code where there is some; section and equation numbers come
from notes on the papers and were not all checked at the source.

Every part takes ``Tokens`` and returns tensors of shape (rows, response_len). All of it is under stop-gradient: the
coefficient multiplies ∇ log π_θ and nothing is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from verl_hpt.errors import checked, setting


@checked
class Constants:
    """Numbers of the methods. The clip range comes from verl's ``actor.*``, the others from ``hpt.options``."""

    clip_low: float = setting(0.2, "with Â < 0, ratios below 1 − ε_low do not learn; below 0 none does", ge=0)
    clip_high: float = setting(0.2, "with Â > 0, ratios above 1 + ε_high do not learn; below 0 none does", ge=0)
    clip_c: float = setting(
        3.0, "verl asserts it, and from 1 down tokens stop before they moved: dual clip (arXiv 1912.09729), Â < 0", gt=1
    )
    shaping: float = setting(
        0.1, "γ₀ of f(p) = p/(p + γ₀) (LUFFY, arXiv 2504.14945, §3.3); at 0 no token learns, below it signs flip", gt=0
    )
    entropy_weight: float = setting(
        0.5, "SRFT's weight of its SFT term (arXiv 2506.19767, eq. 6–7); below 0 demonstrations are unlearned", ge=0
    )
    positive_weight: float = setting(
        0.1, "SRFT's weight of correct rollouts (eq. 8–9); below 0 correct rollouts are unlearned", ge=0
    )
    kl: float = setting(
        0.1, "ASFT's λ_kl (arXiv 2509.23753; 0.03 for bf16); below 0 it drives away from the reference model", ge=0
    )
    max_ratio: float = setting(
        100.0, "cap of ASFT's π_ref/p, unbounded as p → 0, and of `teacher`'s p/π_ref; its logarithm is taken", gt=0
    )
    otr_beta: float = setting(
        0.0, "OTR's reward of a sampled token that is no label (arXiv 2509.26313); at 1 no token learns", lt=1
    )
    psft_clip: float = setting(0.28, "ε of PSFT (arXiv 2508.17784); below 0 no token learns", ge=0)
    trust: float = setting(
        0.1, "α of TrSFT (arXiv 2512.17636); it is a probability, and its logarithm is taken", gt=0, le=1
    )
    prefix_dropped: float = setting(
        0.8, "share of a prefix's tokens, the most certain ones, that do not learn (arXiv 2507.01679)", ge=0, lt=1
    )
    uniform: float = setting(
        1.0, "U of RL-PLUS (arXiv 2508.00222): 1 in its code, 1/vocabulary on paper; it is a probability", gt=0, le=1
    )


@dataclass
class Tokens:
    """What the parts may look at. Shapes (rows, response_len) unless said; float32 or float64, no gradient."""

    log_prob: Tensor  # log π_θ
    mask: Tensor  # bool: tokens that count: the row's author wrote them, or they are a prefix that learns
    advantage: Tensor  # Â of the plan, or of verl's GAE; (rows, 1) or (rows, response_len)
    reward: Tensor  # (rows, 1) score of the row
    correct: Tensor  # (rows, 1) bool: reward ≥ gate.success
    old_log_prob: Tensor | None = None  # log π_old
    ref_log_prob: Tensor | None = None  # log π of verl's frozen reference model
    entropy: Tensor | None = None  # token entropy of π_θ, nats
    other_log_prob: Tensor | None = None  # (rows, 1) mean log-prob of a demonstration under other models (POFT)
    teacher_log_prob: Tensor | None = None  # log π of the model that wrote the demonstration
    prefix: Tensor | None = field(default=None, kw_only=True)  # bool: a demonstration's tokens that begin a rollout
    averaged: Tensor | None = field(default=None, kw_only=True)  # bool: what ``row_mean`` is taken over; None: mask
    constants: Constants = field(default_factory=Constants)
    _ratio: Tensor | None = field(default=None, init=False, repr=False)

    def ones(self) -> Tensor:
        """1 on every token, one number in memory; not to be written to."""
        return self.log_prob.new_ones(()).expand_as(self.log_prob)

    def zeros(self) -> Tensor:
        """0 on every token, one number in memory; not to be written to."""
        return self.log_prob.new_zeros(()).expand_as(self.log_prob)

    def log_ratio(self) -> Tensor:
        """log π_θ/π_old, clamped to ±20 as verl does (``compute_policy_loss_vanilla``)."""
        return (self.log_prob - self.old_log_prob).clamp_(-20.0, 20.0)

    def ratio(self) -> Tensor:
        """π_θ/π_old; kept, since mask and reference both read it."""
        if self._ratio is None:
            self._ratio = self.log_ratio().exp_()
        return self._ratio

    def row_mean(self, x: Tensor) -> Tensor:
        """Mean of x over the tokens of each row. (rows, response_len) -> (rows, 1)"""
        of = self.mask if self.averaged is None else self.averaged
        return (x * of).sum(-1, keepdim=True) / of.sum(-1, keepdim=True).clamp(min=1)


ON_DEMAND = tuple(one.name for one in fields(Tokens) if one.default is None and one.init and not one.kw_only)
Part = Callable[[Tokens], Tensor | tuple[Tensor, Tensor | None]]
KINDS = ("mask", "reference", "advantage", "likelihood")
PARTS: dict[str, dict[str, Part]] = {kind: {} for kind in KINDS}


def part(
    kind: str,
    *,
    needs: tuple[str, ...] = (),
    over_group: Callable[[np.ndarray], np.ndarray] | None = None,
    over_starts: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
):
    """Register a part under its function's name, so that a config can name it.

    Args:
        kind: mask, reference, advantage or likelihood.
        needs: columns of ``Tokens`` that are there only on demand, of ``ON_DEMAND``.
        over_group: for an advantage: rewards of one question's rows (n,) -> advantages (n,), computed by the plan.
        over_starts: for the advantage of prefixes: rewards (n,) and starts (n,), 0 where a rollout started from
            nothing, equal where two started alike -> advantages of the prefixes (n,).

    Example of a user's own module, named in ``hpt.modules``::

        @part("likelihood")
        def squared(tokens):            # f(p) = p²/2
            p = tokens.log_prob.exp()
            return p / 2, p
    """
    if kind not in KINDS:
        raise ValueError(f"a part is one of {', '.join(KINDS)}, got {kind!r}")

    def register(function: Part) -> Part:
        name = function.__name__.rstrip("_")
        known = PARTS[kind].get(name)
        if known is not None and known.__module__ != function.__module__:
            raise ValueError(f"{kind} {name!r} is already registered by {known.__module__}: choose another name")
        function.part_name, function.kind, function.needs = name, kind, frozenset(needs)
        function.over_group, function.over_starts = over_group, over_starts
        PARTS[kind][name] = function
        return function

    return register


# --- masks ----------------------------------------------------------------------------------------------------------


@part("mask")
def everywhere(tokens: Tokens):
    """1: every token learns."""
    return tokens.ones(), None


@part("mask", needs=("old_log_prob",))
def ppo_clip(tokens: Tokens):
    """PPO's clip with verl's dual clip (arXiv 1707.06347, eq. 7; 1912.09729, eq. 5)."""
    c, ratio, advantage = tokens.constants, tokens.ratio(), tokens.advantage
    up = (advantage > 0) & (ratio > 1 + c.clip_high)
    down = (advantage < 0) & (ratio < 1 - c.clip_low)
    dual = (advantage < 0) & (ratio > c.clip_c)
    bound = ratio.clamp(1 - c.clip_low, 1 + c.clip_high).masked_fill_(dual, c.clip_c)
    return (~up.logical_or_(down).logical_or_(dual)).to(ratio.dtype), bound


@part("mask", needs=("old_log_prob",))
def sequence_clip(tokens: Tokens):
    """GSPO's clip of the sequence ratio (arXiv 2507.18071, eq. 5; token form eq. 13), no dual clip, as in verl."""
    c, advantage = tokens.constants, tokens.advantage
    ratio = _sequence_log_ratio(tokens).exp().expand_as(tokens.log_prob)
    clipped = ((advantage > 0) & (ratio > 1 + c.clip_high)) | ((advantage < 0) & (ratio < 1 - c.clip_low))
    return (~clipped).to(ratio.dtype), ratio.clamp(1 - c.clip_low, 1 + c.clip_high)


@part("mask", needs=("old_log_prob", "entropy"))
def uncertain_clip(tokens: Tokens):
    """PPO's clip, on a prefix's most uncertain tokens alone: the share ``hpt.options.prefix_dropped`` with the least
    entropy, rounded down, does not learn (Prefix-RFT, arXiv 2507.01679).

    Deviation from the published code: that ranks the tokens of a micro-batch, this those of each row; of equal
    entropies the earlier token is dropped.
    """
    keep, bound = ppo_clip(tokens)
    if tokens.prefix is None:
        return keep, bound
    dropped = (tokens.prefix.sum(-1, keepdim=True) * tokens.constants.prefix_dropped + 1e-6).floor()
    order = tokens.entropy.masked_fill(~tokens.prefix, float("inf")).argsort(dim=-1, stable=True)
    certain = order.argsort(dim=-1) < dropped  # other tokens come last, and a token of the prefix is always left
    return keep.masked_fill(certain, 0.0), bound.masked_fill(certain, 0.0)


@part("mask")
def correct_only(tokens: Tokens):
    """1[R ≥ gate.success]: rejection sampling (RAFT, arXiv 2304.06767, algorithm 1)."""
    return tokens.correct.to(tokens.log_prob.dtype).expand_as(tokens.log_prob), None


@part("mask", needs=("old_log_prob",))
def psft_clip(tokens: Tokens):
    """1[r ≤ 1 + ε]: a token stops learning once π_θ has moved that far from π_old (PSFT, arXiv 2508.17784, eq. 6)."""
    ratio = tokens.ratio()
    limit = 1 + tokens.constants.psft_clip
    return (ratio <= limit).to(ratio.dtype), ratio.clamp(max=limit)


# --- references: log π_ref ------------------------------------------------------------------------------------------


@part("reference")
def current(tokens: Tokens) -> Tensor:
    """π_ref = π_θ: the score-function gradient, ratio 1 (SFT, REINFORCE)."""
    return tokens.log_prob


@part("reference", needs=("old_log_prob",))
def old(tokens: Tokens) -> Tensor:
    """π_ref = π_old (PPO, GRPO)."""
    return tokens.log_prob - tokens.log_ratio()


@part("reference")
def one(tokens: Tokens) -> Tensor:
    """π_ref = 1: the demonstration's author is taken as certain (LUFFY, arXiv 2504.14945, section 3.2)."""
    return torch.zeros_like(tokens.log_prob)


@part("reference", needs=("teacher_log_prob",))
def teacher(tokens: Tokens) -> Tensor:
    """π_ref = the policy that wrote the demonstration: importance sampling, where a column has its log-probs.

    Of no paper's table: 1/π_ref of the unified estimator (arXiv 2509.04419, section 3) taken at its word. The ratio
    π_θ/π_ref is capped at ``hpt.options.max_ratio``.
    """
    return torch.maximum(tokens.teacher_log_prob, tokens.log_prob - float(np.log(tokens.constants.max_ratio)))


@part("reference", needs=("old_log_prob",))
def clipped_old(tokens: Tokens) -> Tensor:
    """π_θ/clip(r): the ratio is clipped, the token still learns (CISPO, arXiv 2506.13585, eq. 4).

    Deviation from the paper, as in verl's ``cispo``: a lower bound too.
    """
    c = tokens.constants
    return tokens.log_prob - tokens.ratio().clamp(1 - c.clip_low, 1 + c.clip_high).log()


@part("reference", needs=("old_log_prob",))
def sequence_old(tokens: Tokens) -> Tensor:
    """π_θ·(π_old(y)/π_θ(y))^{1/|y|}: a token carries its sequence's ratio (GSPO, arXiv 2507.18071, eq. 7, 14)."""
    return tokens.log_prob - _sequence_log_ratio(tokens)


@part("reference")
def trust_region(tokens: Tokens) -> Tensor:
    """max(π_θ, α): weight min(1, p/α), so improbable tokens cannot dominate (TrSFT in TRAPO, arXiv 2512.17636)."""
    return tokens.log_prob.clamp(min=float(np.log(tokens.constants.trust)))


@part("reference", needs=("old_log_prob",))
def mixture(tokens: Tokens) -> Tensor:
    """(π̂ + π_old)/2 with π̂ = ½π_old + ½U: multiple importance sampling (RL-PLUS, arXiv 2508.00222, section 3.2).

    U is ``hpt.options.uniform``: 1 as in its published code, 1/vocabulary size as in the paper.
    """
    p_old = tokens.old_log_prob.exp()
    guess = 0.5 * p_old + 0.5 * tokens.constants.uniform
    return (0.5 * (guess + p_old)).log()


# --- advantages -----------------------------------------------------------------------------------------------------


def center(rewards: np.ndarray) -> np.ndarray:
    """R − mean. A lone row keeps its reward, as in verl's ``compute_grpo_outcome_advantage``."""
    return rewards - rewards.mean() if len(rewards) > 1 else rewards.copy()


def standardize(rewards: np.ndarray) -> np.ndarray:
    """(R − mean)/(std + 1e-6) with the sample standard deviation; a lone row has mean 0 and std 1, as in verl."""
    return center(rewards) / ((rewards.std(ddof=1) if len(rewards) > 1 else 1.0) + 1e-6)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """R − mean of the others. A lone row keeps its reward, as in verl's ``rloo``."""
    n = len(rewards)
    return center(rewards) * n / (n - 1) if n > 1 else rewards.copy()


def over_plain(rewards: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(R − mean of the rollouts that started from nothing) / rollouts that share the start; 0 on the former."""
    plain = starts == 0
    baseline = rewards[plain].mean() if plain.any() else 0.0
    sharing = (starts[:, None] == starts[None, :]).sum(1)
    return np.where(plain, 0.0, (rewards - baseline) / sharing)


@part("advantage", over_starts=over_plain)
def against_plain(tokens: Tokens) -> Tensor:
    """Â of a prefix: its rollout's reward against those of rollouts without one (Prefix-RFT, arXiv 2507.01679, eq. 3).

    For k > 1 rollouts that share a prefix the published code centres their rewards among themselves before; this does
    not. Both agree at k = 1, which is what its paper ran.
    """
    return tokens.advantage


@part("advantage", over_group=center)
def centered(tokens: Tokens) -> Tensor:
    """Dr. GRPO's advantage, R − mean (arXiv 2503.20783, section 3.2); also REINFORCE with a mean baseline."""
    return tokens.advantage


@part("advantage", over_group=standardize)
def standardized(tokens: Tokens) -> Tensor:
    """GRPO's advantage, (R − mean)/std (arXiv 2402.03300, section 4.1.2)."""
    return tokens.advantage


@part("advantage", over_group=leave_one_out)
def against_others(tokens: Tokens) -> Tensor:
    """RLOO's advantage, R − mean of the others (arXiv 2402.14740, eq. 8)."""
    return tokens.advantage


@part("advantage")
def gae(tokens: Tokens) -> Tensor:
    """Generalised advantage estimation with verl's critic, a value a token (arXiv 1506.02438)."""
    return tokens.advantage


@part("advantage")
def unit(tokens: Tokens) -> Tensor:
    """Â = 1: imitation."""
    return tokens.ones()


@part("advantage")
def doubt(tokens: Tokens) -> Tensor:
    """Â = 1 − p; over the reference ``one`` the weight is p(1 − p), CHORD's φ (arXiv 2508.11408, eq. 5–6)."""
    return 1 - tokens.log_prob.exp()


@part("advantage")
def reward(tokens: Tokens) -> Tensor:
    """Â = R, no baseline: a demonstration that stands alone (HPT's off-policy ablation)."""
    return tokens.reward.expand_as(tokens.log_prob)


@part("advantage", needs=("entropy",))
def calm(tokens: Tokens) -> Tensor:
    """0.5·e^{−H̄}, H̄ the row's mean token entropy: imitate where the policy is sure (SRFT, 2506.19767, eq. 6–7)."""
    weight = tokens.constants.entropy_weight * (-tokens.row_mean(tokens.entropy)).exp()
    return weight.expand_as(tokens.log_prob)


@part("advantage", needs=("entropy",))
def excited(tokens: Tokens) -> Tensor:
    """0.1·e^{H̄} on correct rollouts, −1 on the others (SRFT, arXiv 2506.19767, eq. 8–9)."""
    up = tokens.constants.positive_weight * tokens.row_mean(tokens.entropy).exp()
    return torch.where(tokens.correct, up, -torch.ones_like(up)).expand_as(tokens.log_prob)


@part("advantage", needs=("entropy",))
def excited_tokens(tokens: Tokens) -> Tensor:
    """0.5·e^{H_t}: the published SRFT code's weight of its SFT term (unverified)."""
    return tokens.constants.entropy_weight * tokens.entropy.exp()


@part("advantage", needs=("entropy",), over_group=center)
def centered_excited(tokens: Tokens) -> Tensor:
    """Â·(0.1·e^{H_t} where Â > 0): the published SRFT code's rollouts (unverified)."""
    up = tokens.constants.positive_weight * tokens.entropy.exp()
    return tokens.advantage * torch.where(tokens.advantage > 0, up, torch.ones_like(up))


@part("advantage", needs=("other_log_prob",))
def preference(tokens: Tokens) -> Tensor:
    """σ(m̄ − m), m the row's mean log π_θ, m̄ that of other models (POFT, arXiv 2412.12865, eq. 5)."""
    weight = torch.sigmoid(tokens.other_log_prob - tokens.row_mean(tokens.log_prob))
    return weight.expand_as(tokens.log_prob)


# --- likelihoods: (f/p, f') -----------------------------------------------------------------------------------------


@part("likelihood")
def plain(tokens: Tokens):
    """f(p) = p."""
    return tokens.ones(), tokens.ones()


@part("likelihood")
def shaped(tokens: Tokens):
    """f(p) = p/(p + γ₀): learns most from improbable tokens (LUFFY, arXiv 2504.14945, eq. 6)."""
    denominator = tokens.log_prob.exp() + tokens.constants.shaping
    return 1 / denominator, tokens.constants.shaping / denominator**2


@part("likelihood")
def exploring(tokens: Tokens):
    """f(p) = sg((1 − p)^½)·p: more weight on improbable tokens (RL-PLUS, arXiv 2508.00222, section 3.3)."""
    weight = (1 - tokens.log_prob.exp()).clamp(min=0).sqrt()
    return weight, weight


@part("likelihood")
def expected_match(tokens: Tokens):
    """(1 − β)·p: what one token sampled at temperature 1 teaches in expectation (OTR, arXiv 2509.26313)."""
    weight = (1 - tokens.constants.otr_beta) * tokens.ones()
    return weight, weight


@part("likelihood", needs=("ref_log_prob",))
def anchored(tokens: Tokens):
    """p + λ_kl(π_ref/p − 1), over π_ref = π_θ: DFT with the k3 estimate of KL(ref‖θ) (ASFT, arXiv 2509.23753).

    Approximation: the exact form needs the logits of both models. The log-prob form grows without bound as p → 0, so
    π_ref/p is capped at ``hpt.options.max_ratio``; where the cap is not reached its KL has the exact gradient in
    expectation over tokens drawn from π_θ, not over the demonstration's tokens.
    """
    c, p = tokens.constants, tokens.log_prob.exp()
    ratio = (tokens.ref_log_prob - tokens.log_prob).exp().clamp(max=c.max_ratio)
    weight = p + c.kl * (ratio - 1)
    return weight, weight


def _sequence_log_ratio(tokens: Tokens) -> Tensor:
    """(1/|y|) Σ log π_θ/π_old, clamped at 10 as in verl's ``gspo``. -> (rows, 1)"""
    return tokens.row_mean(tokens.log_prob - tokens.old_log_prob).clamp(max=10.0)
