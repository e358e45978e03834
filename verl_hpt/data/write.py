"""Rows in verl's form to parquet: types that hold every row, and proof that each row reads back as it was meant.

Arrow writes 0.5 into a column of integers as 0 and drops keys that a struct lacks, both without a word. So the types
come from all rows, every table is compared with its rows before it is written, and the file with its tables after it.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl_hpt.data.rows import Row, first_line
from verl_hpt.errors import UserError

_GROUP_BYTES, _GROUP_ROWS = 8 * 2**20, 20_000
_COMPARED = 256  # rows of a table that are Python objects at once
_ERRORS = (pa.ArrowException, OverflowError, TypeError, ValueError)
_CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCALARS_BUT_TEXT = {int, float, bool, type(None)}
_SCALARS = {int, float, str, type(None)}  # a bool equals a number, so it is compared one by one


def groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of about 8 MiB, as they are held in memory and written."""
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += _size(row.values)
        if size >= _GROUP_BYTES or len(group) >= _GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _size(value: Any) -> int:
    """About the bytes of a value in Python."""
    size, parts = 0, [value]
    while parts:
        part = parts.pop()
        kind = type(part)
        if kind is str or kind is bytes:
            size += len(part)
        elif kind is dict:
            size += 16 * len(part)
            parts.extend(part.values())
        elif kind is list:
            size += 16 * len(part)
            if len(part) < 16 or not _SCALARS_BUT_TEXT.issuperset(map(type, part)):
                parts.extend(part)
    return size


def schema_of(batches: Iterable[list[dict]], several: bool) -> pa.Schema | None:
    """The columns of all rows, each of a type that holds them all; what fits none is left to `Writer.write` to name.

    `target` holds lists of demonstrations in the rows; in the schema it does where `several`, or where a row has two.
    None where there are no rows.
    """
    kinds: dict[str, pa.DataType] = {}
    for rows in batches:
        several = several or any(len(row["target"]) > 1 for row in rows)
        rows = [_with_index(row, 0, "") for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row):
            column = [row[name] for row in rows if name in row]
            known = kinds.setdefault(name, pa.list_(_CHAT) if name == "target" else pa.null())
            try:
                kinds[name] = _common(known, column)
            except _ERRORS:
                for value in column:
                    with contextlib.suppress(_ERRORS):
                        kinds[name] = _common(kinds[name], [value])
        rows = column = None  # before the next batch is made
    if not kinds:
        return None
    if not several:
        kinds["target"] = kinds["target"].value_type
    return pa.schema({name: _writable(kind) for name, kind in kinds.items()})


def _common(kind: pa.DataType, values: list) -> pa.DataType:
    both = [pa.schema({"": kind}), pa.schema({"": pa.array(values).type})]
    return pa.unify_schemas(both, promote_options="permissive").field(0).type


def _writable(kind: pa.DataType) -> pa.DataType:
    """The type with null in place of objects that are always empty, which parquet cannot hold."""
    if pa.types.is_list(kind):
        return pa.list_(_writable(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct({f.name: _writable(f.type) for f in kind}) if kind.num_fields else pa.null()
    return kind


def _short(kind: pa.DataType) -> str:
    """The type for a message: one of objects may have hundreds of names."""
    text = str(kind)
    return text if len(text) <= 200 else f"{text[:200]}…"


def misfit(value: Any, kind: pa.DataType, path: str = "") -> tuple[str, str] | None:
    """(path, problem) of the first part of a value that the type would drop, change or refuse; None: there is none."""
    try:
        pa.array([value])  # what no type holds says so by itself
        written = pa.array([value], kind)[0].as_py()
        if _same(value, written):
            return None
        problem = f"{value!r:.80} would become {written!r:.80}: its column is {_short(kind)}"
    except OverflowError:
        problem = f"is an integer beyond 64 bits, got {value!r:.80}"
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is half of a surrogate pair"
    except _ERRORS as error:
        rest = f"which have {_short(kind)}, got {value!r:.80} ({first_line(error)})"
        problem = f"fits no one type with the rows before it, {rest}"
        problem = "is always an empty object, which parquet cannot hold" if value in ({}, [{}]) else problem
    parts = []
    if isinstance(value, dict) and pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        parts = [(value[key], kinds[key], f"{path}.{key}") for key in value if key in kinds]
        for key in value.keys() - kinds.keys():
            path, problem = f"{path}.{key}", f"would be dropped, its column is {_short(kind)}"
    elif isinstance(value, list) and pa.types.is_list(kind):
        parts = [(item, kind.value_type, path) for item in value]
    return next(filter(None, (misfit(*part) for part in parts)), (path, problem))


def _same(meant: Any, written: Any) -> bool:
    """Whether a value came back: an integer may have become the same double, a missing key null."""
    kind = type(meant)
    if kind is str:
        return meant == written  # text equals nothing else
    if kind is dict and type(written) is dict and meant.keys() == written.keys():
        return all([_same(value, written[key]) for key, value in meant.items()])
    if isinstance(meant, dict) and isinstance(written, dict):
        return all(_same(meant.get(key), written.get(key)) for key in {**meant, **written})
    if isinstance(meant, list) and isinstance(written, list) and len(meant) == len(written):
        return (_SCALARS.issuperset(map(type, meant)) and meant == written) or all(map(_same, meant, written))
    if meant == written:
        return isinstance(meant, bool) == isinstance(written, bool)
    return meant != meant and written != written


def _holds(table: pa.Table, rows: list[dict]) -> bool:
    """Whether the table gives the rows back; some rows at a time, so that they are not in memory twice."""
    starts = range(0, len(rows), _COMPARED)
    return all(all(map(_same, rows[i : i + _COMPARED], table.slice(i, _COMPARED).to_pylist())) for i in starts)


def digest_of(table: pa.Table) -> bytes:
    """A hash of every value of a table, however its buffers lie in memory."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in table.column_names:
        hashed.update(repr(name).encode())
        array = table[name].combine_chunks()
        for part in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
            _hash(part, hashed)
    return hashed.digest()


def _hash(array: pa.Array, hashed: Any) -> None:
    """Add an array's values, and which of them are null, to the hash."""
    kind = array.type
    shape = [part.name for part in kind] if pa.types.is_struct(kind) else "" if pa.types.is_list(kind) else str(kind)
    hashed.update(repr((shape, len(array), array.null_count)).encode())
    if array.null_count:
        hashed.update(_bytes(pc.is_null(array)))
    if array.null_count == len(array):
        return
    if pa.types.is_struct(kind):
        for part in array.flatten():  # a part of a null is null
            _hash(part, hashed)
    elif pa.types.is_list(kind):
        hashed.update(_bytes(pc.fill_null(pc.list_value_length(array), 0)))
        _hash(array.flatten(), hashed)  # without what lies under nulls
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        array = pc.fill_null(array, "" if pa.types.is_string(kind) else b"")
        hashed.update(_bytes(pc.binary_length(array)))
        offsets = memoryview(array.buffers()[1]).cast("i")
        start, end = offsets[array.offset], offsets[array.offset + len(array)]
        hashed.update(memoryview(array.buffers()[2])[start:end] if end > start else b"")
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        hashed.update(_bytes(pc.fill_null(array, 0)))
    else:
        hashed.update(repr(array.to_pylist()).encode("utf-8", "surrogatepass"))


def _bytes(array: pa.Array) -> bytes:
    return array.to_numpy(zero_copy_only=False).tobytes()


class Writer:
    """A parquet file under a provisional name: leaving the `with` proves and names it, an exception removes it."""

    def __init__(self, path: str, schema: pa.Schema):
        self.path, self.part, self.schema, self.count = path, f"{path}.part", schema, 0
        self.digests: list[bytes | None] = []  # of each row group
        if not path.endswith(".parquet"):
            raise UserError(f"{path}: verl reads parquet by its name; call the output something.parquet")
        if Path(path).is_dir():
            raise UserError(f"{path}: cannot be written: it is a folder")
        with self._writing():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = pq.ParquetWriter(self.part, schema, compression="zstd", write_page_checksum=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            self._remove()
            raise UserError(f"{self.path}: cannot be written: {error}") from None

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            Path(self.part).unlink(missing_ok=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                with contextlib.suppress(OSError, pa.ArrowException):
                    self.file.close()
        finally:
            self.file.is_open = False  # else it tries once more when it is collected, and prints what it raises
            self._remove()

    def _finish(self) -> None:
        """Read back what was written, then give the file its name."""
        with self._writing():
            self.file.close()
            file = pq.ParquetFile(self.part, page_checksum_verification=True)
            for group, digest in enumerate(self.digests):
                if digest is not None and digest_of(file.read_row_group(group)) != digest:
                    raise UserError(f"{self.path}: row group {group + 1} does not read back as it was written")
            os.replace(self.part, self.path)

    def write(self, rows: list[dict], split: str) -> list[tuple[int, str, str]]:
        """Write rows as one group. Where some would change: write none, return the position, path and problem of each.

        `extra_info` gets an index, counted in this file, and a split where the row has none of its own.
        """
        rows = [self._final(row, index, split) for index, row in enumerate(rows, self.count)]
        table = None
        with contextlib.suppress(*_ERRORS):
            table = pa.Table.from_pylist(rows, self.schema)
        if table is not None and _holds(table, rows):
            rows.clear()
            self.write_table(table, digest_of(table))
            return []
        kind = pa.struct(self.schema)
        changed = [(i, bad[0][1:], bad[1]) for i, row in enumerate(rows) if (bad := misfit(row, kind)) is not None]
        if not changed:
            raise UserError(f"{self.path}: rows {self.count + 1} on cannot be written, though each alone can")
        return changed

    def write_table(self, table: pa.Table, digest: bytes | None = None) -> None:
        """Write a table as one group; `digest` of its rows, None: it is not read back."""
        self.digests.append(digest)
        with self._writing():
            self.file.write_table(table)
        self.count += len(table)

    def _final(self, row: dict, index: int, split: str) -> dict:
        several = pa.types.is_list(self.schema.field("target").type.value_type)
        target = row["target"] if several else next(iter(row["target"]), None)
        return {**_with_index(row, index, split), "target": target}


def _with_index(row: dict, index: int, split: str) -> dict:
    return {**row, "extra_info": {"index": index, "split": split, **row["extra_info"]}}
