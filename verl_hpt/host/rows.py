"""Rows of our own as verl's engine reads them, and our columns on every row of an update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from verl_hpt.demos.demonstration import COLUMNS, Demonstration
from verl_hpt.demos.stored import Entry
from verl_hpt.host.batch import Group, Scored
from verl_hpt.loss import ROW_COLUMNS, ROW_FIELD, TOKEN_FIELDS
from verl_hpt.plan import DEMO, PADDING, Plan, Question

# What the engine reads of a row, beside the loss's own fields.
ENGINE_FIELDS = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask")
PADDING_PROMPT = 1  # tokens of a padding row's prompt; verl wants one at least. Its response has one more.


class AddedRow(NamedTuple):
    """A row of ours: tokens of prompt and answer, which of the latter learn, and their log π_old where it is kept."""

    prompt: Sequence[int]
    answer: Sequence[int]
    mask: Sequence[int]
    old_log_probs: Sequence[float] | None = None


@dataclass
class Step:
    """What one update is made of.

    demos: (questions, those shown). scored: of the batch's rows. beside: what is not of the batch's questions, in the
    plan's order. rescored: rollouts that are trained on another prompt than they were sampled with, by row of the plan.
    """

    groups: list[Group]
    questions: list[Question]
    demos: list[list[Demonstration]]
    counts: Counter
    scored: Scored
    plan: Plan
    beside: list[Entry] = field(default_factory=list)
    rescored: dict[int, AddedRow] = field(default_factory=dict)

    def demo(self, row: int) -> Demonstration | Entry | None:
        """The demonstration that stands in a row of the plan, None where a rollout or padding does."""
        if row == PADDING or self.plan.kind[row] != DEMO:
            return None
        question = self.plan.question[row] - len(self.groups)
        return self.beside[question] if question >= 0 else self.demos[question][self.plan.index[row]]

    def rollout(self, row: int) -> int:
        """The row of verl's batch that stands in a row of the plan."""
        return self.groups[self.plan.question[row]].rows[self.plan.index[row]]

    def added(self, layout: np.ndarray) -> np.ndarray:
        """Which rows of a layout are ours: demonstrations, padding, and rollouts on another prompt. -> (rows,) bool"""
        ours = np.append(self.plan.kind, DEMO) == DEMO
        ours[list(self.rescored)] = True
        return (layout == PADDING) | ours[layout]

    def added_row(self, row: int, eos: int) -> AddedRow:
        """A row that is ours."""
        if row == PADDING:
            return padding_row(eos)
        if row in self.rescored:
            return self.rescored[row]
        demo = self.demo(row)
        if isinstance(demo, Entry):
            return AddedRow(demo.prompt, demo.ids, demo.mask, demo.old_log_probs)
        return AddedRow(self.groups[self.plan.question[row]].prompt, demo.ids, demo.mask)

    def columns(self, layout: np.ndarray, token_columns: Sequence[str], temperature: float | None):
        """Our columns for the rows of a layout."""
        other = np.zeros(len(self.plan))
        for row in np.flatnonzero(self.plan.kind == DEMO):
            other[row] = self.demo(row).values.get("other_log_prob", 0.0)
        sampled = self.plan.kind != DEMO  # by the policy, at its temperature
        for row in np.flatnonzero(~sampled):
            sampled[row] = getattr(self.demo(row), "old_log_probs", None) is not None
        columns = row_columns(self.plan, layout, other, temperature, sampled)
        if token_columns:
            demos = [self.demo(row) for row in layout]
            lengths = [
                len(demo.ids) if demo is not None else 1 if row == PADDING else self.scored.lengths[self.rollout(row)]
                for row, demo in zip(layout, demos, strict=True)
            ]
            columns |= columns_of_tokens(token_columns, lengths, [demo and demo.values for demo in demos])
        return columns


def padding_row(eos: int) -> AddedRow:
    """Two tokens that carry nothing."""
    return AddedRow([eos] * PADDING_PROMPT, [eos], [0])


def token_fields(rows: Sequence[AddedRow], dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Columns of the rows that are ours, jagged, each in the dtype that the rollouts' column has.

    What the loss reads beside tokens has no meaning on a demonstration: log-probs (but those that are kept) and
    advantages are 0, rollout correction's weights 1.
    """
    answers = [torch.as_tensor(np.asarray(row.answer)) for row in rows]
    masks = [torch.as_tensor(np.asarray(row.mask)) for row in rows]
    prompts = [torch.as_tensor(np.asarray(row.prompt)) for row in rows]
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
        if name == "old_log_probs":
            kept = [row.old_log_probs for row in rows]
            columns[name] = [
                blank if own is None else torch.as_tensor(np.asarray(own))
                for blank, own in zip(columns[name], kept, strict=True)
            ]
    return {name: jagged(x.to(dtypes[name]) for x in column) for name, column in columns.items()}


def row_columns(
    plan: Plan,
    layout: np.ndarray,
    other_log_prob: np.ndarray,
    temperature: float | None = None,
    sampled: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    """The loss's numbers of each row of a layout, and its temperature where rows differ in it.

    other_log_prob: (rows of the plan,) mean log-prob under other models, 0 where there is none. temperature: of the
    rollouts, where demonstrations have another (1), else None. sampled: (rows of the plan,) bool, what the policy
    wrote; None: its rollouts.
    """
    if not len(layout):
        return {}
    values = {
        "is_demo": plan.kind == DEMO,
        "advantage": np.nan_to_num(plan.advantage),
        "demo_advantage": np.nan_to_num(plan.demo_advantage),
        "other_log_prob": other_log_prob,
    }
    numbers = [values[name] if name in values else getattr(plan, name) for name in ROW_COLUMNS]
    table = np.stack([np.append(column.astype(np.float64), 0.0) for column in numbers], axis=1)  # last: padding
    table[-1, 0] = 1.0  # padding is marked is_demo with an empty mask, which excludes it from every RL term
    rows = torch.tensor(table[layout], dtype=torch.float32)
    columns = {ROW_FIELD: jagged(rows)}
    if temperature is not None:
        own = np.append(plan.kind != DEMO if sampled is None else sampled, False)[layout]
        columns["temperature"] = torch.where(torch.as_tensor(own), temperature, 1.0)
    return columns


def columns_of_tokens(
    names: Sequence[str], lengths: Sequence[int], values: Sequence[Mapping | None]
) -> dict[str, torch.Tensor]:
    """Columns of demonstrations with a number a token, jagged, for rows in order.

    lengths: tokens of each row's response. values: a demonstration's, by name; None on every other row, which has the
    column's blank.
    """
    columns = {}
    for name in names if len(lengths) else ():
        rows = [
            torch.as_tensor(np.asarray(of[name]), dtype=torch.float32)
            if of is not None and name in of
            else torch.full((int(length),), COLUMNS[name].blank)
            for length, of in zip(lengths, values, strict=True)
        ]
        columns[TOKEN_FIELDS[name]] = jagged(rows)
    return columns


def jagged(rows) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
