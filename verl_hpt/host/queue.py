"""Rows in verl's TransferQueue: read, written, copied, cleared. The only file that imports it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.transferqueue_utils import kv_batch_meta2batch_meta

from verl_hpt.errors import UserError


def read(keys: Sequence[str], partition: str, names: Sequence[str]) -> TensorDict:
    """These columns of the rows with these keys, in order."""
    return tq.kv_batch_get(list(keys), partition, select_fields=list(names))


def put(keys: Sequence[str], partition: str, columns: dict[str, torch.Tensor]) -> None:
    """Write columns of rows; rows that are new bring all that the engine reads, their tokens among it."""
    if keys:
        tags = [{"status": "success"} for _ in keys] if "input_ids" in columns else None
        tq.kv_batch_put(list(keys), partition, fields=TensorDict(columns, batch_size=len(keys)), tags=tags)


def clear(keys: Sequence[str], partition: str) -> None:
    if keys:
        tq.kv_clear(keys=list(keys), partition_id=partition)


def new_keys(count: int) -> list[str]:
    """Keys that no other row has, of the form that verl's have: ``{uid}_{session}_{output}``."""
    mark = uuid.uuid4().hex
    return [f"hpt{mark}_{number}_0" for number in range(count)]


def meta(keys: Sequence[str], partition: str, fields: list[str] | None = None, extra_info: dict | None = None):
    """A batch of these rows, as verl passes it around."""
    extra_info = {} if extra_info is None else extra_info
    return KVBatchMeta(
        partition_id=partition, keys=list(keys), tags=[{} for _ in keys], fields=fields, extra_info=extra_info
    )


def fields_of(keys: Sequence[str], partition: str) -> set[str]:
    """Columns that these rows have."""
    return set(kv_batch_meta2batch_meta(meta(keys, partition)).field_names)


def real_rows(batch: KVBatchMeta) -> list[bool]:
    """Which rows of verl's batch are not its own padding."""
    return [not tag.get("is_padding", False) for tag in batch.tags]


def dtypes(batch: KVBatchMeta, names: Sequence[str]) -> dict[str, torch.dtype]:
    """The dtypes that these columns have on the rollouts."""
    like = read([batch.keys[real_rows(batch).index(True)]], batch.partition_id, names)
    if "position_ids" in names and like["position_ids"].dim() != 2:
        raise UserError("multi-modal position ids are not supported yet: they have several axes a row")
    return {name: like[name].dtype for name in like.keys()}


def check_fields(batch: KVBatchMeta, written: dict[str, torch.Tensor]) -> None:
    """Raise RuntimeError where a field of the batch would not arrive.

    written: columns of rows that stand beside others', by name. One in another dtype than theirs can vanish, and others
    with it.
    """
    schema = kv_batch_meta2batch_meta(batch).field_schema
    bent = [name for name in schema.keys() & written.keys() if schema[name]["dtype"] != written[name].dtype]
    if wrong := [name for name in batch.fields if name not in schema or name in bent]:
        raise RuntimeError(
            f"the update's rows lack the field(s) {', '.join(wrong)} in TransferQueue, or bring them in two "
            "dtypes; a field written in another dtype than the rollouts' can vanish, and others with it. "
            "Please report this with the run's config"
        )


def copies(key: str, count: int, partition: str) -> list[str]:
    """Copies of one row, so that a pass divides by ranks and micro-batches. Returns their keys."""
    if count == 0:
        return []
    row = tq.kv_batch_get([key], partition)
    columns = {
        name: torch.nested.as_nested_tensor([row[name][0]] * count, layout=torch.jagged)
        if row[name].is_nested
        else row[name].expand(count, *row[name].shape[1:]).clone()
        for name in row.keys()
        if isinstance(row[name], torch.Tensor)
    }
    keys = new_keys(count)
    tq.kv_batch_put(keys, partition, fields=TensorDict(columns, batch_size=count), tags=[{} for _ in keys])
    return keys
