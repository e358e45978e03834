"""Random questions with tokens, and the rows of a plan over them as verl hands them to the actor.

Rows are written by the code that writes them in training (``rows.token_fields``, ``rows.row_columns``); only what a
model would have computed (log-probs) is drawn at random.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_hpt.host.rows import AddedRow, row_columns, token_fields
from verl_hpt.plan import DEMO, PADDING, ROLLOUT, Plan, PlanSettings, Question, plan

NONE, NO_TOKENS = np.zeros(0), np.zeros(0, dtype=int)
TOKENS = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask")


@dataclass
class Content:
    """One row's tokens and what models said about them. old, ref: log space, one number an answer's token."""

    prompt: list[int]
    answer: list[int]
    mask: list[int]
    old: list[float]
    ref: list[float]


@dataclass
class Case:
    """Questions for the plan, and the content of their rows by (question, kind, index).

    stream, buffer: what stands beside them, the buffer's a list for each of its optimizer steps; numbered on.
    """

    questions: list[Question]
    content: dict[tuple[int, int, int], Content]
    other: dict[tuple[int, int, int], float] = field(default_factory=dict)
    stream: list[Question] = field(default_factory=list)
    buffer: list[list[Question]] = field(default_factory=list)

    def planned(self, settings: PlanSettings) -> Plan:
        return plan(self.questions, settings, stream=self.stream, buffer=self.buffer)


def random_case(
    seed: int, groups: list[tuple], *, longest: int = 12, vocabulary: int = 64, level: float = -3.0, stream: int = 0,
    buffer: int = 0,
) -> Case:  # fmt: skip
    """Questions with the given rewards and numbers of demonstrations; answers of 1 to ``longest`` tokens.

    Some tokens in the middle of an answer are not the row's own (a tool's), so that masks are no prefixes.

    groups: (rewards, demonstrations) of each question, or (rewards, demonstrations, prefixes): how many tokens of one
    demonstration each rollout begins with. level: what old and reference log-probs are drawn around, ±0.8 (log space).
    stream, buffer: how many demonstrations stand beside the questions.
    """
    draw = random.Random(seed)
    questions, content, other = [], {}, {}
    for number, (rewards, demos, *_) in enumerate(groups):
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randint(2, 6))]
        lengths: dict[int, list[int]] = {ROLLOUT: [], DEMO: []}
        for kind, count in ((ROLLOUT, len(rewards)), (DEMO, demos)):
            for index in range(count):
                row = _content(draw, prompt, longest, vocabulary, level)
                content[number, kind, index] = row
                other[number, kind, index] = draw.uniform(-2.0, -0.1)
                lengths[kind].append(sum(row.mask))
        questions.append(
            Question(
                key=f"{seed}/{number}",
                rewards=np.array(rewards, dtype=np.float64),
                lengths=np.array(lengths[ROLLOUT], dtype=int),
                demo_lengths=np.array(lengths[DEMO], dtype=int),
                demo_rewards=np.ones(demos),
            )
        )
    for number, (_, _, *prefixes) in enumerate(groups):
        if any(map(any, prefixes)):
            questions[number] = _started(draw, questions[number], number, *prefixes, content, vocabulary, level)
    beside = []
    for number in range(len(groups), len(groups) + stream + buffer):
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randint(2, 6))]
        row = content[number, DEMO, 0] = _content(draw, prompt, longest, vocabulary, level)
        length = np.array([sum(row.mask)])
        beside.append(Question(f"{seed}/{number}", NONE, NO_TOKENS, demo_lengths=length, demo_rewards=np.ones(1)))
    return Case(questions, content, other, beside[:stream], [beside[stream:]] if buffer else [])


def _started(draw: random.Random, question: Question, number: int, prefixes, content, vocabulary, level) -> Question:
    """The question with rollouts that begin with the first tokens of one demonstration, as verl's rows have them: not
    among the tokens of the rollout's author."""
    given = [draw.randrange(vocabulary) for _ in range(max(prefixes))]
    for index, tokens in enumerate(prefixes):
        row = content[number, ROLLOUT, index]
        old, ref = ([level + draw.uniform(-0.8, 0.8) for _ in range(tokens)] for _ in range(2))
        content[number, ROLLOUT, index] = Content(
            row.prompt, given[:tokens] + row.answer, [0] * tokens + row.mask, old + row.old, ref + row.ref
        )
    return replace(question, prefixes=np.array(prefixes))


def learning_tokens(case: Case, plan: Plan, layout: np.ndarray) -> list[list[int]]:
    """1 on the tokens of each row of a layout that the loss reads: its author's, and a prefix that learns."""
    masks = [row.mask for row in contents(case, plan, layout)]
    given = [0 if row == PADDING else plan.prefix[row] for row in layout]
    return [[1] * tokens + mask[tokens:] for tokens, mask in zip(given, masks, strict=True)]


def _content(draw: random.Random, prompt: list[int], longest: int, vocabulary: int, level: float) -> Content:
    length = draw.randint(1, longest)
    mask = [1] + [int(draw.random() > 0.15) for _ in range(length - 1)]
    return Content(
        prompt,
        [draw.randrange(vocabulary) for _ in range(length)],
        mask,
        [level + draw.uniform(-0.8, 0.8) for _ in range(length)],
        [level + draw.uniform(-0.8, 0.8) for _ in range(length)],
    )


def contents(case: Case, plan: Plan, layout: np.ndarray) -> list[Content]:
    """Content of the rows of a layout; padding as the trainer writes it."""
    padding = Content([0], [0], [0], [0.0], [0.0])
    return [
        padding if row == PADDING else case.content[plan.question[row], plan.kind[row], plan.index[row]]
        for row in layout
    ]


def row_batch(
    case: Case,
    plan: Plan,
    layout: np.ndarray,
    dtype: torch.dtype = torch.float32,
    *,
    ref: bool = False,
    temperature: float = 1.0,
) -> TensorDict:
    """The rows of a layout, jagged, as one rank's worker gets them.

    ref: with ``ref_log_prob``. temperature: of the rollouts; other than 1, rows bring their own.
    """
    rows = contents(case, plan, layout)
    names = ("old_log_probs", *(["ref_log_prob"] if ref else []))
    dtypes = {name: torch.int64 for name in TOKENS} | {name: dtype for name in names}
    columns = token_fields([AddedRow(row.prompt, row.answer, row.mask) for row in rows], dtypes)
    for name, numbers in (("old_log_probs", "old"), ("ref_log_prob", "ref")):
        if name in columns:
            columns[name] = jagged([torch.tensor(getattr(row, numbers), dtype=dtype) for row in rows])
    other = np.array(
        [case.other.get((q, k, i), 0.0) for q, k, i in zip(plan.question, plan.kind, plan.index, strict=True)]
    )
    return TensorDict(
        {**columns, **row_columns(plan, layout, other, None if temperature == 1.0 else temperature)},
        batch_size=len(rows),
    )


def jagged(rows) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def model_output(batch: TensorDict, leaf: torch.Tensor, entropy: torch.Tensor | None = None) -> dict:
    """What verl's engine hands to the loss: log-probs of whole sequences, in the order of the rows.

    leaf, entropy: (tokens of all sequences,).
    """
    offsets = batch["input_ids"].offsets()
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, offsets)}
    if entropy is not None:
        output["entropy"] = torch.nested.nested_tensor_from_jagged(entropy, offsets)
    return output


def whole(rows: list[Content], answers: list[list[float]], dtype: torch.dtype, blank: float = -0.7) -> torch.Tensor:
    """Numbers of answers' tokens where verl's model output has them: one place to the left, ``blank`` elsewhere."""
    parts = []
    for row, numbers in zip(rows, answers, strict=True):
        parts += [blank] * (len(row.prompt) - 1) + list(numbers) + [blank]
    return torch.tensor(parts, dtype=dtype)


def announce(batch: TensorDict, *, dp_size: int = 1, tokens: int | None = None, rows: int | None = None) -> TensorDict:
    """What verl's engine writes on a micro-batch before it calls the loss; in place."""
    counted = int(batch["loss_mask"].values().sum())
    tu.assign_non_tensor(
        batch,
        dp_size=dp_size,
        batch_num_tokens=counted if tokens is None else tokens,
        global_batch_size=len(batch) if rows is None else rows,
    )
    return batch
