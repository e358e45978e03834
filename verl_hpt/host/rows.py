"""Rows of our own as verl's engine reads them: demonstrations, and two-token padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# What the engine reads of a row, beside the loss's own fields.
ENGINE_FIELDS = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask")
PADDING_PROMPT = 1  # tokens of a padding row's prompt; verl wants one at least. Its response has one more.

OwnRow = tuple[Sequence[int], Sequence[int], Sequence[int]]  # prompt, answer and the answer's mask


def padding_row(eos: int) -> OwnRow:
    """Two tokens that carry nothing."""
    return [eos] * PADDING_PROMPT, [eos], [0]


def token_fields(rows: Sequence[OwnRow], dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Columns of the rows that are ours, jagged, each in the dtype that the rollouts' column has.

    What the loss reads beside tokens has no meaning on a demonstration: log-probs and advantages are 0, rollout
    correction's weights 1.
    """
    answers = [torch.tensor(answer) for _, answer, _ in rows]
    masks = [torch.tensor(mask) for _, _, mask in rows]
    prompts = [torch.as_tensor(np.asarray(prompt)) for prompt, _, _ in rows]
    whole = [torch.cat([p, a]) for p, a in zip(prompts, answers, strict=True)]
    columns = {
        "prompts": prompts,
        "responses": answers,
        "input_ids": whole,
        "position_ids": [torch.arange(len(ids)) for ids in whole],
        "response_mask": masks,
        "loss_mask": masks,
    }
    for name in dtypes:
        if name not in columns:
            blank = torch.ones_like if name == "rollout_is_weights" else torch.zeros_like
            columns[name] = [blank(answer) for answer in answers]
    return {
        name: torch.nested.as_nested_tensor([x.to(dtypes[name]) for x in column], layout=torch.jagged)
        for name, column in columns.items()
    }
