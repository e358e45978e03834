"""Normalisation: the two numbers that multiply a row's terms, w_rl and w_demo.

Everything is over one optimizer step of Q questions, known to the driver before the step is cut into micro-batches and
ranks; the worker only sums. So the loss cannot depend on how a batch is packed.

n_q: rows of question q in the RL sum (demonstrations with an R term included); k_q: its demonstrations in the SFT sum;
L: ``hpt.rl_length_scale``; λ: ``hpt.demo_coef``; |y|, |τ|: tokens of the row.

    name       RL terms                                    SFT terms
    question   (1/Q) Σ_q (1/n_q) Σ_i (1/L) Σ_t             (λ/Q) Σ_q (1/k_q) Σ_j (1/|τ_j|) Σ_t
    sequence   (1/Q) Σ_q (1/n_q) Σ_i (1/|y_i|) Σ_t         as question
    token      Σ / (RL tokens of the step)                 λ Σ / (demo tokens of the step)
    paper      Σ_q (1/n_q) Σ_i Σ_t                         λ Σ_q (1/k_q) Σ_j (1/|τ_j|) Σ_t
    official   (1/L) Σ_rows Σ_t                            λ Σ / (demo tokens of the step)

``question`` on RL terms is Dr. GRPO (arXiv 2503.20783); ``sequence`` is GRPO (2402.03300, eq. 3); ``paper`` is HPT's
eq. 11 and 12 (2509.04419); ``official`` its published code at one rank and one micro-batch, whose own demo weight grows
with the number of micro-batches and ranks.
"""

from __future__ import annotations

import numpy as np

NORMALIZATIONS = ("question", "sequence", "token", "paper", "official")


def weights(
    name: str,
    question: np.ndarray,
    tokens: np.ndarray,
    rl_share: np.ndarray,
    demo_share: np.ndarray,
    *,
    demo_tokens: np.ndarray | None = None,
    length_scale: float,
    demo_coef: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the rows of one optimizer step.

    Args:
        name: one of ``NORMALIZATIONS``.
        question: (rows,) question of each row, any integers; Q is the number of distinct ones.
        tokens: (rows,) tokens of each row that count in the RL sum. demo_tokens: the same in the SFT sum, None: tokens
            (they differ on a rollout that begins with a demonstration).
        rl_share, demo_share: (rows,) factor of the row's RL and SFT term; 0 where it has none.
        length_scale: L. demo_coef: λ.

    Returns:
        w_rl, w_demo: (rows,) float64.
    """
    if name not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {name!r}; one of {', '.join(NORMALIZATIONS)}")
    in_rl, in_demo = rl_share != 0, demo_share != 0
    if len(question) == 0:
        return np.zeros(0), np.zeros(0)
    _, at = np.unique(question, return_inverse=True)
    questions = at.max() + 1
    imitated = tokens if demo_tokens is None else demo_tokens
    length, demo_length = np.maximum(tokens, 1), np.maximum(imitated, 1)
    one_of_n = 1 / np.maximum(np.bincount(at, in_rl), 1)[at]
    one_of_k = 1 / np.maximum(np.bincount(at, in_demo), 1)[at]
    rl_tokens, all_imitated = max(tokens[in_rl].sum(), 1), max(imitated[in_demo].sum(), 1)
    rl = {
        "question": one_of_n / (questions * length_scale),
        "sequence": one_of_n / (questions * length),
        "token": np.full(len(at), 1 / rl_tokens),
        "paper": one_of_n,
        "official": np.full(len(at), 1 / length_scale),
    }[name]
    if name in ("token", "official"):
        demo = np.full(len(at), 1 / all_imitated)
    else:
        demo = one_of_k / demo_length / (1 if name == "paper" else questions)
    return rl * rl_share, demo_coef * demo * demo_share
