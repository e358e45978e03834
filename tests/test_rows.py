"""Rows of our own against what verl's engine reads: layout, types, positions, masks, and verl's own padding."""

import numpy as np
import pytest
import torch
from engine.batches import jagged
from tensordict import TensorDict
from verl.workers.utils.padding import (
    build_attention_mask_from_nested,
    no_padding_2_padding,
    response_from_nested,
    response_to_nested,
)

from verl_hpt.host.rows import ENGINE_FIELDS, PADDING_PROMPT, AddedRow, padding_row, token_fields

ROWS = [AddedRow([5, 6, 7], [8, 9], [1, 1]), AddedRow([4], [3, 2, 1, 0], [1, 0, 0, 1]), padding_row(99)]
INTEGERS = dict.fromkeys(ENGINE_FIELDS, torch.int64)


def lists(column) -> list[list]:
    return [row.tolist() for row in column.unbind()]


def test_every_field_by_value():
    fields = token_fields(ROWS, INTEGERS)
    assert {name: lists(column) for name, column in fields.items()} == {
        "prompts": [[5, 6, 7], [4], [99]],
        "responses": [[8, 9], [3, 2, 1, 0], [99]],
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, 2, 1, 0], [99, 99]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1]],
        "response_mask": [[1, 1], [1, 0, 0, 1], [0]],
        "loss_mask": [[1, 1], [1, 0, 0, 1], [0]],
    }


def test_a_padding_row_has_a_prompt_and_one_token_that_does_not_learn():
    assert padding_row(7) == AddedRow([7] * PADDING_PROMPT, [7], [0], None) and PADDING_PROMPT >= 1


def test_columns_are_jagged_along_their_tokens():
    for name, column in token_fields(ROWS, INTEGERS).items():
        assert column.is_nested and column.layout == torch.jagged and column.dim() == 2, name
        lengths = [2, 4, 1] if name in ("responses", "response_mask", "loss_mask") else None
        lengths = {"prompts": [3, 1, 1], "input_ids": [5, 5, 2], "position_ids": [5, 5, 2]}.get(name, lengths)
        assert column.offsets().diff().tolist() == lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_column_has_the_type_that_the_rollouts_has(dtype):
    dtypes = INTEGERS | {"response_mask": torch.int32, "old_log_probs": dtype, "ref_log_prob": torch.float32}
    fields = token_fields(ROWS, dtypes)
    assert {name: column.dtype for name, column in fields.items()} == dtypes


def test_what_the_loss_reads_beside_tokens_is_zero_and_weights_of_rollouts_are_one():
    names = ("old_log_probs", "ref_log_prob", "advantages", "rollout_log_probs", "rollout_is_weights")
    fields = token_fields(ROWS, INTEGERS | dict.fromkeys(names, torch.bfloat16))
    for name in names:
        blank = 1.0 if name == "rollout_is_weights" else 0.0
        assert lists(fields[name]) == [[blank] * 2, [blank] * 4, [blank]], name
    assert set(fields) == {*ENGINE_FIELDS, *names}, "nothing that the rollouts lack"


def test_verls_engine_cuts_the_answers_out_of_its_own_output():
    """verl gives a log-prob to each token's predecessor; its padding reads prompts, responses and whole sequences."""
    batch = TensorDict(token_fields(ROWS, INTEGERS), batch_size=3)
    of_next = jagged([torch.roll(row, -1).float() for row in batch["input_ids"].unbind()])
    padded = no_padding_2_padding(of_next, batch)
    assert padded.tolist() == [[8, 9, 0, 0], [3, 2, 1, 0], [99, 0, 0, 0]]
    cut = response_from_nested(of_next, batch["response_mask"])
    assert lists(cut) == lists(batch["responses"])
    assert lists(response_to_nested(padded, batch["response_mask"])) == lists(cut)
    assert build_attention_mask_from_nested(batch["input_ids"]).tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]
    assert batch.select("response_mask").to_padded_tensor()["response_mask"].tolist() == [
        [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0],
    ]  # fmt: skip


def test_prompts_may_come_as_arrays_and_are_not_changed():
    prompt = np.array([5, 6], dtype=np.int32)
    fields = token_fields([AddedRow(prompt, [7], [1])], INTEGERS)
    assert lists(fields["input_ids"]) == [[5, 6, 7]] and fields["input_ids"].dtype == torch.int64
    assert prompt.tolist() == [5, 6]
