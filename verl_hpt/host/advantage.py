"""The advantage estimator ``hpt`` in verl's registry: Â of the rollouts, as the method's row of the table says.

verl's metrics, critic and dumps read it; the plan makes its own, over rollouts and demonstrations where a method wants
that. It works only under our trainer: the legacy trainers would otherwise run plain Dr. GRPO without a word.
"""

from __future__ import annotations

import numpy as np
import torch

from verl_hpt.estimator import Method
from verl_hpt.parts import center

_method: Method | None = None
OTHER_TRAINER = (
    "algorithm.adv_estimator=hpt needs verl-hpt's trainer, and another one is running: it would train plain Dr. GRPO "
    "without demonstrations. Set trainer.use_v1=True and run `python -m verl.trainer.main_ppo`; `verl-hpt doctor` "
    "tells whether the plugin is found."
)


def switch_on(method: Method) -> None:
    """Called by our trainer when it is built."""
    global _method
    _method = method


def hpt_advantage(token_level_rewards, response_mask, index, config=None, **_):
    """verl's estimator protocol.

    Args:
        token_level_rewards: (rows, response_len). response_mask: (rows, response_len). index: (rows,) uid of the group.

    Returns:
        advantages, returns: (rows, response_len), the row's Â on each token.

    Raises:
        RuntimeError: the trainer that runs is not ours.
    """
    if _method is None:
        raise RuntimeError(OTHER_TRAINER)
    estimator = _method.rollouts
    over_group = estimator.advantage.over_group if estimator is not None else None
    score = token_level_rewards.sum(-1).double().cpu().numpy()
    advantage = np.zeros_like(score)
    _, group = np.unique(np.asarray(index, dtype=str), return_inverse=True)
    order = np.argsort(group, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        advantage[rows] = (over_group or center)(score[rows])
    advantage = torch.as_tensor(advantage, dtype=token_level_rewards.dtype, device=token_level_rewards.device)
    advantage = advantage.unsqueeze(-1) * response_mask
    return advantage, advantage
