"""Rows of a data file, one at a time: parquet, JSON lines, a JSON list, or a Hugging Face dataset by name.

Memory is that of a batch of rows, whatever the file's size. Whatever is wrong with a file stops with a `BadRow` that
names the file, the row (from 1; the line of a JSONL file) and the field.
"""

import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from verl_hpt.errors import UserError

MAX_ROW_BYTES = 64 * 2**20  # one row of text; anything larger is damage, not data
_BATCH_BYTES = 8 * 2**20
_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".ndjson")
_MAX_OBJECT_BYTES = 256 * 2**20  # one JSON object around all rows is read whole
_ASKING = ("prompt", "question", "problem", "query", "instruction", "input", "messages", "conversations")
_CHAT_LINE = re.compile(rb'\s*\[\s*\{\s*"(?:role|content|from|value)"')
_BETWEEN = re.compile(r"\s*,?\s*")  # what stands between the rows of a JSON list
_UNREADABLE = (OSError, EOFError, zlib.error)
_HUB_NAME = re.compile(r"^\w[\w.-]*/[\w.-]+(?:@[\w.-]+)?(?::[\w\[\]:%+.-]+)?$")


class BadRow(UserError):
    """Something is wrong with one row, or with a whole file (row 0)."""

    def __init__(self, file: str, row: int, field: str, problem: str):
        where = f"row {row}" if row else "the file"
        super().__init__(f"{file}: {where}: field `{field}`: {problem}")
        self.file, self.row, self.field, self.problem = str(file), row, field, problem


class Row(NamedTuple):
    """A row of a file; number from 1, the line of a JSONL file."""

    file: str
    number: int
    values: dict[str, Any]

    def bad(self, field: str, problem: str) -> BadRow:
        return BadRow(self.file, self.number, field, problem)

    def fields(self) -> str:
        return listed(self.values) or "no fields"

    def get(self, path: str | None) -> Any:
        """The value at `a` or `a.b`, None where a part is missing."""
        value = self.values
        for part in (path or "").split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def listed(names: Iterable[str]) -> str:
    """The names for a message, no more than can be read in it."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(f"`{name[:60]}`" for name in names[:20]) + more


Skip = Callable[[BadRow], None]  # what to do with a row that cannot be read: count it, or raise


def stop(bad: BadRow) -> None:
    raise bad


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
        reader = {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "json": _json_rows}[file_kind(source)]
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
        with _open_binary(source) as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf")
    except _UNREADABLE as error:
        raise BadRow(source, 0, "(file)", f"cannot be read: {error}") from None
    if head[:4] == b"PAR1":
        return "parquet"
    if name.endswith(".parquet"):
        raise BadRow(source, 0, "(file)", "is called .parquet but does not begin as one (damaged, or another format)")
    if head.lstrip()[:1] == b"[":
        return "jsonl" if _CHAT_LINE.match(head) and _starts_with_a_chat(source) else "json"
    if head.lstrip()[:1] == b"{" or name.endswith(_SUFFIXES):
        return "jsonl"
    if name.endswith((".csv", ".tsv", ".csv.gz", ".tsv.gz")):
        tab = ", sep='\\t'" if ".tsv" in name else ""
        code = f"pd.read_csv({source!r}{tab}).to_json('rows.jsonl', orient='records', lines=True)"
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


def is_chat(value: Any) -> bool:
    """Whether the value is a list of messages."""
    wanted = ({"role", "content"}, {"from", "value"}, {"role", "tool_calls"})
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and any(keys <= message.keys() for keys in wanted) for message in value)
    )


def _starts_with_a_chat(source: str) -> bool:
    """Whether the first line is one conversation, so that the file is one of lines and no list of rows."""
    try:
        with _open_binary(source) as file:
            return is_chat(json.loads(file.readline(MAX_ROW_BYTES).decode("utf-8-sig")))
    except (ValueError, RecursionError, *_UNREADABLE):  # whoever reads the rows says what is wrong
        return False


def _jsonl_rows(source: str, bad_row: Skip) -> Iterator[tuple[int, dict]]:
    rows = _rows_of_objects(source)
    if rows is not None:
        yield from enumerate(rows, 1)
        return
    with _open_binary(source) as file:
        number, whole = 0, True  # whole: the line before was read to its end
        while True:
            try:
                line = file.readline(MAX_ROW_BYTES + 1)
            except _UNREADABLE as error:
                raise BadRow(source, number + 1, "(line)", f"cannot be read: {first_line(error)}") from None
            if not line:
                return
            begins, whole = whole, line.endswith(b"\n")
            if not begins:  # what is left of a line that was too long
                continue
            number += 1
            if len(line) <= MAX_ROW_BYTES and not line.strip():
                continue
            try:
                row = _parsed(source, number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except BadRow as bad:
                bad_row(bad)
                continue
            yield number, row


def _parsed(source: str, number: int, line: bytes) -> dict:
    if len(line) > MAX_ROW_BYTES:
        raise BadRow(source, number, "(line)", f"is longer than {MAX_ROW_BYTES} bytes")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8 (0x{line[error.start]:02x}); convert the file to UTF-8"
        names = re.findall(rb'"([^"\\]{1,60})"\s*:', line[: error.start]) or [b"(line)"]  # the last is the field
        raise BadRow(source, number, names[-1].decode("utf-8", "replace"), problem) from None
    except json.JSONDecodeError as error:
        hint = "" if line.endswith(b"\n") else "; the last line has no end: the file looks cut off"
        raise BadRow(source, number, "(line)", f"is not JSON: {error.msg} at character {error.pos}{hint}") from None
    except (RecursionError, ValueError) as error:
        raise BadRow(source, number, "(line)", f"is not usable JSON: {first_line(error)}") from None
    if is_chat(row):
        return {"messages": row}
    if not isinstance(row, dict):
        raise BadRow(source, number, "(line)", f"must be an object with named fields, got {type(row).__name__}")
    return row


def _rows_of_objects(source: str) -> list[dict] | None:
    """The rows of a file that is one JSON object, or several that span lines; None: each line is a row."""
    try:
        with _open_binary(source) as file:
            line = file.readline(MAX_ROW_BYTES + 1)
            start = line.decode("utf-8-sig", "replace").rstrip()
            rest = file.readline(MAX_ROW_BYTES + 1)
    except _UNREADABLE:
        return None
    try:
        first = json.loads(start)
        return None if rest.strip() or not isinstance(first, dict) else _rows_in(source, first)
    except json.JSONDecodeError as error:
        if error.pos < len(start) or not rest:  # broken within the line, not going on in the next
            return None
    except (RecursionError, ValueError):
        return None
    objects = _objects(source)
    return _rows_in(source, objects[0]) or objects if len(objects) == 1 else objects


def _objects(source: str) -> list[dict]:
    """Objects one after another, each on as many lines as it likes."""
    try:
        with _open_binary(source) as file:
            content = file.read(_MAX_OBJECT_BYTES + 1)
    except _UNREADABLE as error:
        raise BadRow(source, 0, "(file)", f"cannot be read: {first_line(error)}") from None
    if len(content) > _MAX_OBJECT_BYTES:
        problem = f"is JSON over many lines and longer than {_MAX_OBJECT_BYTES} bytes; write JSONL, one row a line"
        raise BadRow(source, 0, "(file)", problem)
    decoder, objects, at = json.JSONDecoder(), [], 0
    try:
        text = content.decode("utf-8-sig")
        while (at := _BETWEEN.match(text, at).end()) < len(text):
            row, at = decoder.raw_decode(text, at)
            if not isinstance(row, dict):
                problem = f"must be an object with named fields, got {type(row).__name__}"
                raise BadRow(source, len(objects) + 1, "(row)", problem)
            objects.append(row)
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} in line {error.lineno} of the file"
        raise BadRow(source, len(objects) + 1, "(row)", problem) from None
    except UnicodeDecodeError as error:
        raise BadRow(source, len(objects) + 1, "(row)", f"not UTF-8 ({error.reason}); convert the file") from None
    except (RecursionError, ValueError) as error:
        raise BadRow(source, len(objects) + 1, "(row)", f"is not usable JSON: {first_line(error)}") from None
    return objects


def _rows_in(source: str, whole: dict) -> list[dict] | None:
    """The rows that one object holds: in a list, by id, or column by column; None: it is a row itself."""
    values = list(whole.values())
    if not values or any(map(is_chat, values)) or any(isinstance(whole.get(key), str) for key in _ASKING):
        return None
    lists = [key for key, value in whole.items() if isinstance(value, list) and value]
    of_rows = [key for key in lists if all(isinstance(item, dict) for item in whole[key]) and _asks(whole[key][0])]
    if len(of_rows) > 1:
        problem = f"has several lists of rows, {listed(of_rows)}{unwrap_hint(source, of_rows[0])}"
        raise BadRow(source, 0, "(file)", problem)
    if of_rows:
        return whole[of_rows[0]]
    if all(isinstance(value, dict) and value for value in values):
        keys = list(values[0])
        if _asks(whole) and all(list(value) == keys for value in values):  # pandas' to_json
            return [{name: column[key] for name, column in whole.items()} for key in keys]
        return [{"id": key, **row} for key, row in whole.items()] if _asks(values[0]) else None
    if _asks(whole) and len(lists) == len(values) > 1 and len({len(value) for value in values}) == 1:
        return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
    return None


def _asks(row: dict) -> bool:
    """Whether a field has a name under which a question is looked for."""
    return any(name.lower() in _ASKING for name in row)


def unwrap_hint(source: str, key: str) -> str:
    """How to make a file of rows of one whose field `key` holds them."""
    opener = "gzip.open" if source.endswith(".gz") else "open"
    code = f"json.dump(json.load({opener}({source!r}))[{key!r}], open('rows.json', 'w'))"
    return f"; if `{key}` holds the rows, write that list alone: python -c {shlex.quote(f'import gzip, json; {code}')}"


def _json_rows(source: str, bad_row: Skip) -> Iterator[tuple[int, dict]]:
    """Elements of one JSON list, decoded as they arrive."""
    decoder, number = json.JSONDecoder(), 0
    with _open_binary(source) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8-sig")

        def more() -> str:
            try:
                return file.read(2**20)
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason}); convert the file to UTF-8"
            except _UNREADABLE as error:
                problem = f"cannot be read: {first_line(error)}"
            raise BadRow(source, number + 1, "(row)", problem)

        buffer = more()
        at = buffer.index("[") + 1
        while True:
            at = _BETWEEN.match(buffer, at).end()
            if buffer.startswith("]", at):
                if (buffer[at + 1 :] + more()).strip():
                    raise BadRow(source, number + 1, "(file)", "has text after the end of its list")
                return
            try:
                row, at = decoder.raw_decode(buffer, at)
            except (RecursionError, ValueError):
                chunk = more()
                buffer, at = buffer[at:] + chunk, 0
                if not chunk:
                    raise BadRow(source, number + 1, "(row)", "is not JSON, or the file is cut off here") from None
                if len(buffer) > MAX_ROW_BYTES:
                    problem = f"is longer than {MAX_ROW_BYTES} characters, or broken"
                    raise BadRow(source, number + 1, "(row)", problem) from None
                continue
            number += 1
            if isinstance(row, dict):
                yield number, row
            elif is_chat(row):
                yield number, {"messages": row}
            else:
                problem = f"must be an object with named fields, got {type(row).__name__}"
                bad_row(BadRow(source, number, "(row)", problem))


def _open_binary(source: str):
    with open(source, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(source, "rb") if packed else open(source, "rb")


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


def first_line(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
