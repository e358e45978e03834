"""Rows of a data file, one at a time: parquet, JSON lines, a JSON list, or a Hugging Face dataset by name.

Memory is that of a batch of rows, whatever the file's size. Whatever is wrong with a file stops with a `BadRow` that
names the file, the row (from 1; the line of a JSONL file) and the field.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl_hpt.data.json_rows import MAX_ROW_BYTES, UNREADABLE, jsonl_rows, list_rows, open_binary, starts_with_a_chat
from verl_hpt.data.rows import BadRow, Row, Skip, first_line, stop
from verl_hpt.errors import UserError

_BATCH_BYTES = 8 * 2**20
_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".ndjson")
_CHAT_LINE = re.compile(rb'\s*\[\s*\{\s*"(?:role|content|from|value)"')
_HUB_NAME = re.compile(r"^\w[\w.-]*/[\w.-]+(?:@[\w.-]+)?(?::[\w\[\]:%+.-]+)?$")


def read_rows(source: str, skip: Skip = stop) -> Iterator[Row]:
    """The rows of a file, or of a dataset `owner/name[@config][:split]`; raises `BadRow`.

    A row that cannot be read goes to `skip`, and reading goes on; not so where nobody could tell how many rows the
    damage took.
    """
    path, found = Path(source), False
    if path.exists():
        if path.is_dir():
            raise BadRow(source, 0, "(file)", "is a folder; name the files in it")
        if path.stat().st_size == 0:
            raise BadRow(source, 0, "(file)", "is empty")
        reader = {"parquet": _parquet_rows, "jsonl": jsonl_rows, "json": list_rows}[file_kind(source)]
    elif source.startswith("hf:") or (_HUB_NAME.match(source) and not source.lower().endswith(_SUFFIXES)):
        reader = _hub_rows
    else:
        raise BadRow(source, 0, "(file)", "no such file")

    def bad_row(bad: BadRow) -> None:
        nonlocal found
        found = True
        skip(bad)

    for number, values in reader(source, bad_row):
        found = True
        yield Row(source, number, values)
    if not found:
        raise BadRow(source, 0, "(file)", "has no rows")


def count_rows(source: str) -> int | None:
    """How many rows a parquet file says it has; None where only reading would tell."""
    if not Path(source).is_file() or file_kind(source) != "parquet":
        return None
    return open_parquet(source).metadata.num_rows


def file_kind(source: str) -> str:
    """`parquet`, `jsonl` or `json`, by the file's first bytes; its name decides only what the bytes leave open."""
    name = source.lower()
    try:
        with open_binary(source) as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf")
    except UNREADABLE as error:
        raise BadRow(source, 0, "(file)", f"cannot be read: {error}") from None
    if head[:4] == b"PAR1":
        return "parquet"
    if name.endswith(".parquet"):
        raise BadRow(source, 0, "(file)", "is called .parquet but does not begin as one (damaged, or another format)")
    if head.lstrip()[:1] == b"[":
        return "jsonl" if _CHAT_LINE.match(head) and starts_with_a_chat(source) else "json"
    if head.lstrip()[:1] == b"{" or name.endswith(_SUFFIXES):
        return "jsonl"
    if name.endswith((".csv", ".tsv", ".csv.gz", ".tsv.gz")):
        tab = ", sep='\\t'" if ".tsv" in name else ""
        frame = f"pd.read_csv({source!r}{tab}, dtype=str, keep_default_na=False)"  # 007 and NA are text
        code = f"{frame}.to_json('rows.jsonl', orient='records', lines=True)"
        raise BadRow(source, 0, "(file)", f'is CSV or TSV; make JSONL of it: python -c "import pandas as pd; {code}"')
    raise BadRow(source, 0, "(file)", f"is neither parquet nor JSON; known: {', '.join(_SUFFIXES)}")


def open_parquet(source: str) -> pq.ParquetFile:
    try:
        # Buffered column streams: a file of one huge row group is read page by page, not held whole.
        return pq.ParquetFile(source, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadRow(source, 0, "(file)", f"is not a whole parquet file: {first_line(error)}") from None


def _parquet_rows(source: str, bad_row: Skip) -> Iterator[tuple[int, dict]]:
    file, number = open_parquet(source), 0
    try:
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        batch_rows = max(1, min(1024, _BATCH_BYTES * max(file.metadata.num_rows, 1) // max(size, 1)))
        for batch in file.iter_batches(batch_size=int(batch_rows)):
            for i in range(batch.num_rows):
                number += 1
                try:
                    row = _parquet_row(source, number, batch, i)
                except BadRow as bad:
                    bad_row(bad)
                    continue
                yield number, row
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise BadRow(source, number + 1, "(row)", f"cannot be read, damaged here: {first_line(error)}") from None


def _parquet_row(source: str, number: int, batch: pa.RecordBatch, i: int) -> dict:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = row[name] = column[i].as_py()
        except UnicodeDecodeError as error:
            raise BadRow(source, number, name, f"is not UTF-8: {error.reason}") from None
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise BadRow(source, number, name, f"cannot be read: {first_line(error)}") from None
        if isinstance(value, str | bytes) and len(value) > MAX_ROW_BYTES:
            problem = f"has {len(value)} characters; no row may have more than {MAX_ROW_BYTES}"
            raise BadRow(source, number, name, problem)
    return row


def _hub_rows(source: str, bad_row: Skip) -> Iterator[tuple[int, dict]]:
    """A dataset by name (or a local dataset folder, `hf:FOLDER`), streamed by the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} is no file, and reading it as a Hugging Face dataset needs `datasets`") from None
    name, config, split = re.match(r"^(?:hf:)?(.+?)(?:@([\w.-]+))?(?::([\w\[\]:%+.-]+))?$", source).groups("")
    number = 0
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield number, dict(row)
    except Exception as error:  # the hub's client raises from many libraries; the user needs its first line
        where = number + 1 if number else 0
        raise BadRow(source, where, "(dataset)", f"cannot be read: {first_line(error)}") from None
