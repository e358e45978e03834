"""Rows in verl's form to parquet: the schema by the first rows, and a writer that lets nothing vanish or change."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from verl_hpt.data.keep import OURS, STANDARD, kept_columns, misfit, misfit_problem
from verl_hpt.data.read import BadRow
from verl_hpt.data.rows import as_messages
from verl_hpt.errors import UserError

_GROUP_BYTES = 16 * 2**20
_OPTIONAL = ("name", "tool_call_id", "reasoning_content")  # message fields of type text


def stop_at(bad: BadRow) -> None:
    """What to do with a bad row unless the user says otherwise."""
    raise bad


def schema_of(rows: list[dict], several: bool, keep: dict[str, Any] | None = None, skip: Callable = stop_at):
    """The Arrow schema for rows like these: optional message fields only where they occur, a list level for several."""
    import pyarrow as pa

    further, extra, reward = kept_columns(rows, keep or {}, skip)
    messages = [m for row in rows for m in (*row["prompt"], *_flat(row["target"]))]
    fields = [("role", pa.string()), ("content", pa.string())]
    fields += [(name, pa.string()) for name in _OPTIONAL if any(name in m for m in messages)]
    if any("tool_calls" in m for m in messages):
        function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
        call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
        fields.append(("tool_calls", pa.list_(call)))
    chat = pa.list_(pa.struct(fields))
    plain_chat = pa.list_(pa.struct(fields[:2]))
    several = several or any(len(row["target"]) > 1 for row in rows)
    info = [("index", pa.int64()), ("split", pa.string()), ("file", pa.string()), ("row", pa.int64())]
    columns = [
        ("data_source", pa.string()),
        ("prompt", chat if any(set(m) - {"role", "content"} for row in rows for m in row["prompt"]) else plain_chat),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string()), *reward])),
        ("extra_info", pa.struct([*info, *extra])),
        ("target", pa.list_(chat) if several else chat),
    ]
    return pa.schema([*columns, *further])


def _flat(target: list) -> Iterator[dict]:
    for demo in target:
        if isinstance(demo, list):
            yield from demo


class Writer:
    """A parquet file written row group by row group under a provisional name.

    `careful` tries every row by itself, so that a row that Arrow refuses can be left out before anything counts it;
    `peeked` is the number of rows that settled the schema.
    """

    def __init__(self, path: str, schema, keep: dict[str, Any] | None = None, careful: bool = False, peeked: int = 0):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.part, self.schema = path, f"{path}.part", schema
        self.keep, self.careful, self.peeked = keep or {}, careful, peeked
        self.several = pa.types.is_list(schema.field("target").type.value_type)
        self.checked = [f for f in schema if f.name not in (*STANDARD, "extra_info")]
        for name, ours in OURS.items():  # a later row may bring the first key of its own
            if name in self.keep or schema.field(name).type.num_fields > len(ours):
                self.checked.append(schema.field(name))
        self.names = {
            "prompt": {f.name for f in schema.field("prompt").type.value_type},
            "target": {f.name for f in _innermost(schema.field("target").type)},
        }
        self.rows: list[dict] = []
        self.size, self.count = 0, 0
        if not path.endswith(".parquet"):
            raise UserError(f"{path}: verl reads parquet by its name; call the output something.parquet")
        if Path(path).is_dir():
            raise UserError(f"{path}: cannot be written: it is a folder")
        try:
            with self._writing():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self.file = pq.ParquetWriter(self.part, schema, compression="zstd", write_page_checksum=True)
        except UserError:
            with contextlib.suppress(OSError):
                Path(self.part).unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: cannot be written: {error}") from None

    def add(self, row: dict, seen: int) -> None:
        """Take a row, the `seen` + 1st of the conversion; raises `BadRow` where it would lose something."""
        target = [as_messages(d) for d in row["target"]]
        info = row["extra_info"]
        if not self.several and len(target) > 1:
            problem = f"{len(target)} demonstrations, earlier rows had one: convert again with --several"
            raise BadRow(info["file"], info["row"], "target", problem)
        self._check_messages(info, "prompt", row["prompt"], seen)
        self._check_messages(info, "target", _flat(target), seen)
        self._check_kept(row, seen)
        if info["index"] is None:
            info["index"] = self.count
        row = {**row, "target": target if self.several else (target[0] if target else None)}
        for messages in (row["prompt"], *target):
            for message in messages or []:
                if "tool_calls" in message:
                    message["tool_calls"] = [_call(c) for c in message["tool_calls"]]
        if self.careful:
            self._check_arrow([row])
        self.size += _size(row)
        self.count += 1
        self.rows.append(row)
        if self.size >= _GROUP_BYTES or len(self.rows) >= 20_000:
            self._flush()

    def _check_messages(self, info: dict, key: str, messages, seen: int) -> None:
        """Arrow drops struct fields that its schema lacks without a word; a late tool call must not vanish so."""
        for message in messages:
            extra = set(message) - self.names[key]
            if extra:
                problem = f"appears first here, after {seen} rows without it: convert again with --peek {seen + 1}"
                raise BadRow(info["file"], info["row"], f"{key}.{min(extra)}", problem)

    def _check_kept(self, row: dict, seen: int) -> None:
        for field in self.checked:
            bad = misfit(row.get(field.name), field.type, field.name)
            if bad is not None:
                info = row["extra_info"]
                raise BadRow(
                    info["file"], info["row"], bad[0], misfit_problem(bad, field, self.keep, seen, self.peeked)
                )

    def _flush(self) -> None:
        if self.rows:
            table = self._check_arrow(self.rows)
            with self._writing():
                self.file.write_table(table)
        self.rows, self.size = [], 0

    def _check_arrow(self, rows: list[dict]):
        """The rows as a table; raises `BadRow` for the first that Arrow does not take."""
        import pyarrow as pa

        errors = (pa.ArrowException, TypeError, ValueError, OverflowError)
        try:
            return pa.Table.from_pylist(rows, self.schema)
        except errors as error:
            for row in rows:
                for field in self.schema:
                    try:
                        pa.array([row.get(field.name)], field.type)
                    except errors as reason:
                        info = row["extra_info"]
                        problem = str(reason).splitlines()[0][:200]
                        if "too large to convert to C long" in problem:
                            problem = "has an integer beyond 64 bits"
                        if field in self.checked:
                            key = ".KEY" if field.name in OURS else ""
                            problem += f": --keep {field.name}{key}:string writes it as JSON text"
                        raise BadRow(info["file"], info["row"], field.name, problem) from None
            raise UserError(f"{self.path}: {error}") from None

    def close(self) -> None:
        """Write what is left and give the file its name."""
        self._flush()
        with self._writing():
            self.file.close()
            os.replace(self.part, self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(UserError), self._writing():
            self.file.close()
        self.file.is_open = False  # else it tries once more when it is collected, and prints what it raises
        with contextlib.suppress(OSError):
            Path(self.part).unlink(missing_ok=True)


def _size(value: Any) -> int:
    """About the bytes of a value in Python."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    deeper = value if {str, bytes, dict, list}.intersection(map(type, value)) else ()
    return 32 * len(value) + sum(map(_size, deeper))


def _innermost(kind):
    import pyarrow as pa

    while pa.types.is_list(kind):
        kind = kind.value_type
    return kind


def _call(call: Any) -> dict:
    """A tool call with its arguments as JSON text, the one form that every row can share."""
    function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False, default=str)
    outer = call if isinstance(call, dict) else {}
    return {
        "id": outer.get("id"),
        "type": outer.get("type") or "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }
