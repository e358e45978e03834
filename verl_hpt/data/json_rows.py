"""Rows of JSON files: one a line, in a list, or in objects over many lines; a chat alone is a row with `messages`."""

import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterator
from typing import Any

from verl_hpt.data.rows import BadRow, Skip, first_line, listed

MAX_ROW_BYTES = 64 * 2**20  # one row of text; anything larger is damage, not data
UNREADABLE = (OSError, EOFError, zlib.error)
_MAX_OBJECT_BYTES = 256 * 2**20  # one JSON object around all rows is read whole
_ASKING = ("prompt", "question", "problem", "query", "instruction", "input", "messages", "conversations")
_BETWEEN = re.compile(r"\s*,?\s*")  # what stands between the rows of a JSON list


def is_chat(value: Any) -> bool:
    """Whether the value is a list of messages."""
    wanted = ({"role", "content"}, {"from", "value"}, {"role", "tool_calls"})
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and any(keys <= message.keys() for keys in wanted) for message in value)
    )


def starts_with_a_chat(source: str) -> bool:
    """Whether the first line is one conversation, so that the file is one of lines and no list of rows."""
    try:
        with open_binary(source) as file:
            return is_chat(json.loads(file.readline(MAX_ROW_BYTES).decode("utf-8-sig")))
    except (ValueError, RecursionError, *UNREADABLE):  # whoever reads the rows says what is wrong
        return False


def jsonl_rows(source: str, bad_row: Skip) -> Iterator[tuple[int, dict]]:
    rows = _rows_of_objects(source)
    if rows is not None:
        yield from enumerate(rows, 1)
        return
    with open_binary(source) as file:
        number, whole = 0, True  # whole: the line before was read to its end
        while True:
            try:
                line = file.readline(MAX_ROW_BYTES + 1)
            except UNREADABLE as error:
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
        with open_binary(source) as file:
            line = file.readline(MAX_ROW_BYTES + 1)
            start = line.decode("utf-8-sig", "replace").rstrip()
            rest = file.readline(MAX_ROW_BYTES + 1)
    except UNREADABLE:
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
        with open_binary(source) as file:
            content = file.read(_MAX_OBJECT_BYTES + 1)
    except UNREADABLE as error:
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


def list_rows(source: str, bad_row: Skip) -> Iterator[tuple[int, dict]]:
    """Elements of one JSON list, decoded as they arrive."""
    decoder, number = json.JSONDecoder(), 0
    with open_binary(source) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8-sig")

        def more() -> str:
            try:
                return file.read(2**20)
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason}); convert the file to UTF-8"
            except UNREADABLE as error:
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


def open_binary(source: str):
    with open(source, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(source, "rb") if packed else open(source, "rb")
