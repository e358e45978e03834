"""`verl-hpt data convert` and `eval-set`: datasets of many forms to the parquet that verl reads, in a stream.

Memory is that of one row group (16 MiB of text), whatever the input's size. Output goes to `OUT.part` first, so that
what stands under the name asked for is whole.
"""

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_hpt.data_read import BadRow, count_rows, read_rows
from verl_hpt.data_rows import FORMATS, Layout, Options, as_messages, detect, in_validation, to_verl
from verl_hpt.errors import UserError

_GROUP_BYTES = 16 * 2**20
_PEEK = 500  # rows looked at before the columns' types are settled
_OPTIONAL = ("name", "tool_call_id", "reasoning_content")  # message fields of type text


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IN", help="parquet, JSONL, JSON, or owner/name[@config][:split]")
    parser.add_argument("out", metavar="OUT", help="parquet file to write")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="default: by the first row")
    parser.add_argument("--prompt-key", help="field of the question")
    parser.add_argument("--demo-key", help="field of the demonstrations (text, messages, or a list of either)")
    parser.add_argument("--answer-key", help="field of the expected answer, `a.b` for a nested one")
    parser.add_argument("--data-source", help="data_source of all rows; it chooses the grader")
    parser.add_argument("--ability", default="math")
    parser.add_argument("--system", help="system message to put before every prompt, in place of one that is there")
    parser.add_argument("--drop-system", action="store_true", help="drop the prompts' system messages")
    parser.add_argument("--suffix", default="", help="text to put after every question")
    parser.add_argument("--strip-calculator", action="store_true", help="drop GSM8K's <<48/2=24>> marks")
    parser.add_argument("--keep", action="append", default=[], metavar="COLUMN", help="carry a further column over")
    parser.add_argument("--several", action="store_true", help="a list of demonstrations in every row")
    parser.add_argument("--val", metavar="FILE", help="validation parquet: questions drawn by a hash of their text")
    parser.add_argument("--val-share", type=float, default=0.02, help="share of the questions that go there")
    parser.add_argument("--seed", type=int, default=0, help="seed of that draw")
    parser.add_argument("--limit", type=int, help="stop after so many rows")


def run_convert(args: argparse.Namespace) -> int:
    """Convert; 0 when every row was written. Raises `BadRow` or `UserError`."""
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share must lie between 0 and 1, got {args.val_share:g}")
    if len({os.path.realpath(p) for p in (*args.inputs, args.out, *([args.val] if args.val else []))}) != len(
        args.inputs
    ) + 1 + bool(args.val):
        raise UserError("inputs, OUT and --val must be different files")
    options = Options(
        args.data_source,
        args.system,
        args.drop_system,
        args.suffix,
        args.strip_calculator,
        args.ability,
        tuple(args.keep),
    )
    rows = _converted(args, options)
    if args.limit is not None:
        rows = itertools.islice(rows, args.limit)
    peeked = list(itertools.islice(rows, _PEEK))
    if not peeked:
        raise UserError("no rows to write (--limit 0?)")
    schema = schema_of(peeked, args.several, options.keep)
    counts, sources = Counter(), Counter()
    train = Writer(args.out, schema)
    validation = Writer(args.val, schema) if args.val else None
    try:
        for row in itertools.chain(peeked, rows):
            here = validation is not None and in_validation(row["prompt"], args.val_share, args.seed)
            row["extra_info"]["split"] = "val" if here else "train"
            counts["val" if here else "train"] += 1
            counts["demonstrations"] += sum(d is not None for d in row["target"])
            counts["without"] += not any(d is not None for d in row["target"])
            sources[row["data_source"]] += 1
            (validation if here else train).add(row)
        train.close()
        if validation is not None:
            validation.close()
    except BaseException:
        train.abandon()
        if validation is not None:
            validation.abandon()
        raise
    print(f"{args.out}: {counts['train']} rows" + (f"; {args.val}: {counts['val']} rows" if args.val else ""))
    print(f"{counts['demonstrations']} demonstrations; {counts['without']} questions without one")
    print("data_source: " + ", ".join(f"{name} {n}" for name, n in sources.most_common(20)))
    if counts["val"] == 0 and args.val:
        print(f"warning: no question fell to validation; raise --val-share ({args.val_share:g})", file=sys.stderr)
    return 0


def _converted(args: argparse.Namespace, options: Options) -> Iterator[dict]:
    from tqdm import tqdm

    for source in args.inputs:
        layout = None
        bar = tqdm(read_rows(source), total=count_rows(source), unit=" rows", desc=Path(source).name, disable=None)
        for number, row in bar:
            if layout is None:
                layout = _layout(args, source, number, row)
                print(_described(source, layout))
            yield to_verl(source, number, row, layout, options)


def _layout(args: argparse.Namespace, source: str, number: int, row: dict) -> Layout:
    try:
        layout = detect(source, row, args.prompt_key, args.demo_key, args.answer_key)
    except BadRow as bad:
        raise BadRow(source, number, bad.field, bad.problem) from None
    if args.format not in ("auto", layout.format):
        fields = ", ".join(f"`{k}`" for k in row)
        raise UserError(
            f"{source}: --format {args.format}, but its fields ({fields}) are those of `{layout.format}`; "
            "leave --format out, or name the fields: --prompt-key, --demo-key, --answer-key"
        )
    return layout


def _described(source: str, layout: Layout) -> str:
    demo = f"`{layout.demo}`" if layout.demo else "none"
    if layout.format == "messages" and not layout.demo:
        demo = "the messages after the last question"
    answer = f"`{layout.truth}`" if layout.truth else "from the demonstration (#### or the last box)"
    if layout.format == "gsm8k":
        answer = f"what follows #### in `{layout.truth}`"
    return (
        f"{source}: format {layout.format}: question `{layout.prompt}`, demonstrations {demo}, expected answer {answer}"
    )


def schema_of(rows: list[dict], several: bool, keep: tuple[str, ...] = ()):
    """The Arrow schema for rows like these: optional message fields only where they occur, a list level for several."""
    import pyarrow as pa

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
    columns = [
        ("data_source", pa.string()),
        ("prompt", chat if any(set(m) - {"role", "content"} for row in rows for m in row["prompt"]) else plain_chat),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct([("index", pa.int64()), ("split", pa.string()), ("file", pa.string()), ("row", pa.int64())]),
        ),
        ("target", pa.list_(chat) if several else chat),
    ]
    for name in keep:
        try:
            columns.append((name, pa.array([row[name] for row in rows]).type))
        except pa.ArrowException as error:
            raise UserError(f"--keep {name}: its rows have no one type: {str(error).splitlines()[0]}") from None
    return pa.schema(columns)


def _flat(target: list) -> Iterator[dict]:
    for demo in target:
        if isinstance(demo, list):
            yield from demo


class Writer:
    """A parquet file written row group by row group under a provisional name."""

    def __init__(self, path: str, schema):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.part, self.schema = path, f"{path}.part", schema
        self.several = pa.types.is_list(schema.field("target").type.value_type)
        self.rows: list[dict] = []
        self.size, self.count = 0, 0
        if not path.endswith(".parquet"):
            raise UserError(f"{path}: verl reads parquet by its name; call the output something.parquet")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = pq.ParquetWriter(self.part, schema, compression="zstd", write_page_checksum=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error}") from None

    def add(self, row: dict) -> None:
        target = [as_messages(d) for d in row["target"]]
        if not self.several and len(target) > 1:
            info = row["extra_info"]
            problem = f"{len(target)} demonstrations, earlier rows had one: convert again with --several"
            raise BadRow(info["file"], info["row"], "target", problem)
        row = {**row, "target": target if self.several else (target[0] if target else None)}
        row["extra_info"]["index"] = self.count
        for messages in (row["prompt"], *target):
            for message in messages or []:
                self.size += len(message["content"])
                if "tool_calls" in message:
                    message["tool_calls"] = [_call(c) for c in message["tool_calls"]]
        self.count += 1
        self.rows.append(row)
        if self.size >= _GROUP_BYTES or len(self.rows) >= 20_000:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.rows:
            try:
                self._check_fields()
                self.file.write_table(pa.Table.from_pylist(self.rows, self.schema))
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                self._blame(error)
        self.rows, self.size = [], 0

    def _check_fields(self) -> None:
        """Arrow drops struct fields that its schema lacks without a word; a late tool call must not vanish so."""
        names = {
            "prompt": {f.name for f in self.schema.field("prompt").type.value_type},
            "target": {f.name for f in _innermost(self.schema.field("target").type)},
        }
        for row in self.rows:
            target = _flat(row["target"] or []) if self.several else (row["target"] or [])
            for key, messages in (("prompt", row["prompt"]), ("target", target)):
                for message in messages:
                    extra = set(message) - names[key]
                    if extra:
                        info, name = row["extra_info"], sorted(extra)[0]
                        problem = (
                            f"appears first here, after {_PEEK} rows without it; move this file or row to the front"
                        )
                        raise BadRow(info["file"], info["row"], f"{key}.{name}", problem)

    def _blame(self, error: Exception) -> None:
        """Find the row that Arrow does not take."""
        import pyarrow as pa

        for row in self.rows:
            for field in self.schema:
                try:
                    pa.array([row.get(field.name)], field.type)
                except (pa.ArrowException, TypeError, ValueError, OverflowError) as reason:
                    info = row["extra_info"]
                    raise BadRow(info["file"], info["row"], field.name, str(reason).splitlines()[0][:200]) from None
        raise UserError(f"{self.path}: {error}") from None

    def close(self) -> None:
        """Write what is left and give the file its name."""
        self._flush()
        self.file.close()
        os.replace(self.part, self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        Path(self.part).unlink(missing_ok=True)


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
        arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
    outer = call if isinstance(call, dict) else {}
    return {
        "id": outer.get("id"),
        "type": outer.get("type") or "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def add_eval_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT_DIR", help="folder for one parquet a file")
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE", help="JSON with `prompt` and `answer`, as in the paper's seven"
    )
    parser.add_argument("--system", help="system message to put before every question")
    parser.add_argument("--suffix", help="text after every question (default: asks for \\boxed{}; '' for none)")
    parser.add_argument("--repeat", type=int, default=1, help="write every question so many times, for avg@k")


_BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_LETTER = "\n\nPlease reason step by step, and put the letter of your choice within \\boxed{}."


def run_eval_set(args: argparse.Namespace) -> int:
    """One validation parquet for each file, its data_source the file's name. Raises `BadRow` or `UserError`."""
    if args.repeat < 1:
        raise UserError(f"--repeat must be 1 or more, got {args.repeat}")
    written = []
    for source in args.inputs:
        name = Path(source).name.split(".")[0]
        default = _LETTER if "gpqa" in name.lower() else _BOXED
        suffix = default if args.suffix is None else args.suffix
        options = Options(data_source=name, system=args.system, suffix=suffix, ability="math")
        layout, rows = None, []
        for number, row in read_rows(source):
            row = {k: v for k, v in row.items() if k != "data_source"}
            if layout is None:
                layout = detect(source, row)
                if layout.truth is None:
                    raise BadRow(source, number, "answer", "no expected answer found")
            rows += [to_verl(source, number, row, layout, options, "test") for _ in range(args.repeat)]
        for row in rows:
            row["target"] = []
        out = str(Path(args.out) / f"{name}.parquet")
        if out in written:
            raise UserError(f"two inputs are called {name}; give them different names")
        writer = Writer(out, schema_of(rows[:_PEEK], False))
        try:
            for row in rows:
                writer.add(row)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        written.append(out)
        print(f"{out}: {len(rows)} rows, data_source {name}")
    print("data.val_files=[" + ",".join(written) + "]")
    return 0
