"""`verl-hpt data convert` and `eval-set`: datasets of many forms to the parquet that verl reads, in a stream.

Memory is that of one row group (16 MiB of text), whatever the input's size. Output goes to `OUT.part` first, so that
what stands under the name asked for is whole.
"""

import argparse
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from verl_hpt.data.keep import OURS, STANDARD, parse_keep
from verl_hpt.data.read import BadRow, count_rows, read_rows
from verl_hpt.data.rows import (
    CHAT_KEYS,
    DEMO_KEYS,
    FORMATS,
    PROMPT_KEYS,
    Layout,
    Options,
    detect,
    in_validation,
    not_carried,
    opened,
    to_verl,
    used_fields,
)
from verl_hpt.data.write import Writer, schema_of
from verl_hpt.demos.encode import plain
from verl_hpt.errors import UserError

_PEEK = 500  # rows looked at before the columns' types are settled
_NAMES = 1000  # names of fields, and kinds of bad rows, that are told apart
_OWN = object()  # key, in a converted row, of the extra_info that it had: no column can be called so
_REMEDIES = {  # for fields that --keep does not take, None where nothing does
    "prompt": "--prompt-key prompt",
    "target": "--demo-key target",
    "ability": "--ability",
    "data_source": "--data-source",
    "reward_model.ground_truth": "--answer-key reward_model.ground_truth",
    "extra_info.index": "--keep extra_info",
    "extra_info.split": "--keep extra_info",
    **dict.fromkeys(("extra_info", "extra_info.file", "extra_info.row", "reward_model", "reward_model.style")),
}


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IN", help="parquet, JSONL, JSON, or owner/name[@config][:split]")
    parser.add_argument("out", metavar="OUT", help="parquet file to write")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="default: by the first row")
    parser.add_argument("--prompt-key", help="field of the question")
    parser.add_argument("--demo-key", help="field of the demonstrations (text, messages, or a list of either)")
    parser.add_argument("--answer-key", help="field of the expected answer, `a.b` for a nested one")
    parser.add_argument("--data-source", help="data_source of all rows; it chooses the grader")
    parser.add_argument("--ability", help="ability of all rows; default: the row's own, else math")
    parser.add_argument("--system", help="system message to put before every prompt, in place of one that is there")
    parser.add_argument("--drop-system", action="store_true", help="drop the prompts' system messages")
    parser.add_argument("--suffix", default="", help="text to put after every question")
    parser.add_argument("--strip-calculator", action="store_true", help="drop GSM8K's <<48/2=24>> marks")
    keep = (
        "carry a further column over: COLUMN or COLUMN:TYPE (double, int64, string, list<double>, …; what is not text "
    )
    keep += "becomes JSON text under string); extra_info for its own keys, extra_info.KEY or reward_model.KEY for one"
    parser.add_argument("--keep", action="append", default=[], metavar="COLUMN", help=keep)
    parser.add_argument("--several", action="store_true", help="a list of demonstrations in every row")
    parser.add_argument("--val", metavar="FILE", help="validation parquet: questions drawn by a hash of their text")
    parser.add_argument("--val-share", type=float, default=0.02, help="share of the questions that go there")
    parser.add_argument("--seed", type=int, default=0, help="seed of that draw")
    parser.add_argument("--limit", type=int, help="stop after so many rows")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out and count them; default: stop")
    peek = f"rows looked at, and held, before the columns' types are settled (default {_PEEK})"
    parser.add_argument("--peek", type=int, default=_PEEK, metavar="ROWS", help=peek)


@dataclass
class _File:
    """What the rows of one input had; names are the keys of dicts, in order."""

    source: str
    fields: dict[str, None] = field(default_factory=dict)
    parsed: set[str] = field(default_factory=set)
    demonstrations: int = 0


@dataclass
class _Told:
    """What is said at the end: what was left out, and why."""

    skipping: bool
    files: list[_File] = field(default_factory=list)
    lost: dict[str, None] = field(default_factory=dict)
    bad: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def skip(self, bad: BadRow) -> None:
        """Count a bad row under --skip-bad, else raise it; so does what is wrong with a whole file."""
        if not self.skipping or not bad.row:
            raise bad
        problem = re.sub(r"\d+", "N", bad.problem.partition(", got ")[0])[:160]
        kind = f"`{re.sub(r'[0-9]+', '', bad.field)}`: {problem}"
        self.bad[kind if kind in self.bad or len(self.bad) < _NAMES else "(other problems)"] += 1
        if len(self.examples) < 5:
            self.examples.append(str(bad))

    def skipped(self) -> None:
        """Print the bad rows by kind, and the first few whole."""
        if self.bad:
            print(f"--skip-bad left out {self.bad.total()} bad rows:")
            for kind, count in self.bad.most_common(20):
                print(f"  {count} × {kind}")
            if len(self.bad) > 20:
                print(f"  and {len(self.bad) - 20} further kinds")
            for example in self.examples:
                print(f"  for example {example}")

    def carried(self, keep: dict) -> None:
        """Print which fields of the inputs are not in the output, and warn of files without demonstrations."""
        fields = [name for name in self.lost if "[]." not in name]
        if fields:
            remedies = ", ".join(self._remedies(fields, keep))
            print(f"not carried over: {_listed(fields)}" + (f"; to carry one over: {remedies}" if remedies else ""))
        fields = [name for name in self.lost if "[]." in name]
        if fields:
            print(f"not carried over, of messages: {_listed(fields)}")
        for file in self.files:
            if file.fields and not file.demonstrations:
                problem = f"no demonstration was found; its fields are {_listed(list(file.fields))}"
                print(f"warning: {file.source}: {problem}: --demo-key names theirs", file=sys.stderr)

    def _remedies(self, names: list[str], keep: dict) -> list[str]:
        """What would carry these fields over."""
        columns = {name for file in self.files for name in file.fields}
        found: dict[str | None, None] = {}
        nested = None
        for name in names:
            parent, _, key = name.partition(".")
            if name in _REMEDIES:
                found[None if "extra_info" in keep and parent == "extra_info" else _REMEDIES[name]] = None
            elif not key or name in columns:
                found = {"--keep NAME": None, **found}
            elif parent in OURS:
                nested = nested or f"nested ones as --keep {name}"
            else:
                found[f"--keep {parent}"] = None
        if nested:
            found[nested] = None
        return [remedy for remedy in found if remedy]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 40} more" if len(names) > 40 else ""
    return ", ".join(f"`{name}`" for name in names[:40]) + more


def run_convert(args: argparse.Namespace) -> int:
    """Convert; 0 when every row was written, or under --skip-bad any. Raises `BadRow` or `UserError`."""
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share must lie between 0 and 1, got {args.val_share:g}")
    if args.peek < 1:
        raise UserError(f"--peek must be 1 or more, got {args.peek}")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be 1 or more, got {args.limit}")
    outputs = [name for path in (args.out, args.val) if path for name in (path, f"{path}.part")]
    if len({os.path.realpath(p) for p in (*args.inputs, *outputs)}) != len(args.inputs) + len(outputs):
        raise UserError("inputs, OUT and --val must be different files, and none an output's name with .part after it")
    if hasattr(sys.stdout, "reconfigure"):  # names of fields may hold what the terminal has no letter for
        sys.stdout.reconfigure(errors="backslashreplace")
    keep = parse_keep(args.keep)
    options = Options(
        args.data_source, args.system, args.drop_system, args.suffix, args.strip_calculator, args.ability, keep
    )
    told = _Told(args.skip_bad)
    rows = _converted(args, options, told)
    if args.limit is not None:
        rows = itertools.islice(rows, args.limit)
    counts, sources = _write(args, rows, keep, told)
    told.skipped()
    if not counts["rows"]:
        raise UserError("no row was written: all are bad" if told.bad else "no rows to write")
    print(f"{args.out}: {counts['train']} rows" + (f"; {args.val}: {counts['val']} rows" if args.val else ""))
    print(f"{counts['demonstrations']} demonstrations; {counts['without']} questions without one")
    print("data_source: " + ", ".join(f"{name} {n}" for name, n in sources.most_common(20)))
    told.carried(keep)
    if args.val and not counts["val"]:
        print(f"warning: no question fell to validation; raise --val-share ({args.val_share:g})", file=sys.stderr)
    if args.val and not counts["train"]:
        problem = f"every question fell to validation, {args.out} has no rows"
        print(f"warning: {problem}; lower --val-share ({args.val_share:g})", file=sys.stderr)
    return 0


def _write(args: argparse.Namespace, rows: Iterator[dict], keep: dict, told: _Told) -> tuple[Counter, Counter]:
    """Write the rows; without any, no file. Counts of rows and demonstrations, and of rows by data_source."""
    counts, sources = Counter(), Counter()
    peeked = list(itertools.islice(rows, args.peek))
    if not peeked:
        return counts, sources
    looked = len(peeked)
    schema = schema_of(peeked, args.several, keep, told.skip)
    writers = {"train": Writer(args.out, schema, keep, args.skip_bad, looked)}
    try:
        if args.val:
            writers["val"] = Writer(args.val, schema, keep, args.skip_bad, looked)
        for seen, row in enumerate(itertools.chain(peeked, rows), start=looked - len(peeked)):
            own = row.pop(_OWN)
            here = "val" if args.val and in_validation(row["prompt"], args.val_share, args.seed) else "train"
            if row["extra_info"]["split"] is None:
                row["extra_info"]["split"] = here
            try:
                writers[here].add(row, seen)
            except BadRow as bad:
                told.skip(bad)
                continue
            told.lost.update({f"extra_info.{k}": None for k, v in own.items() if row["extra_info"][k] != v})
            counts["rows"] += 1
            counts[here] += 1
            counts["demonstrations"] += sum(d is not None for d in row["target"])
            counts["without"] += not any(d is not None for d in row["target"])
            sources[row["data_source"]] += 1
        for writer in writers.values():
            writer.close() if counts["rows"] else writer.abandon()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    return counts, sources


def _converted(args: argparse.Namespace, options: Options, told: _Told) -> Iterator[dict]:
    from tqdm import tqdm

    known = {*CHAT_KEYS, *PROMPT_KEYS, *DEMO_KEYS, "reward_model"}
    known |= {key for key in (args.prompt_key, args.demo_key) if key}
    for source in args.inputs:
        layout, used, file = None, set(), _File(source)
        told.files.append(file)
        rows = read_rows(source, told.skip)
        for number, row in tqdm(rows, total=count_rows(source), unit=" rows", desc=Path(source).name, disable=None):
            if len(file.fields) < _NAMES:
                file.fields.update(dict.fromkeys(row))
            row, parsed = opened(row, known)
            for name in sorted({*parsed} - file.parsed):
                print(f"{source}: `{name}` holds its messages or fields as JSON text: parsed")
                file.parsed.add(name)
            try:
                if layout is None:
                    layout = _layout(args, source, number, row)
                    used = used_fields(layout, options.keep)
                    print(_described(source, layout))
                made = to_verl(source, number, row, layout, options, None)
            except BadRow as bad:
                told.skip(bad)
                continue
            if len(told.lost) < _NAMES:
                told.lost.update(dict.fromkeys(not_carried(row, made, layout, options, used)))
            file.demonstrations += sum(d is not None for d in made["target"])
            yield {**made, _OWN: _own(row)}


def _own(row: dict) -> dict:
    """What a row has under the names in extra_info that are ours; not which file a converted row came from."""
    info = plain(row.get("extra_info"))
    if not isinstance(info, dict):
        return {}
    names = OURS["extra_info"]
    if tuple(info)[: len(names)] == names and {*STANDARD} <= row.keys():
        names = ("index", "split")
    return {name: info[name] for name in names if name in info}


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
    elif layout.truth is None and layout.demo is None and layout.format != "messages":
        answer = "none"
    question = f"`{layout.prompt}`" + (f" and, where it is not empty, `{layout.context}`" if layout.context else "")
    return f"{source}: format {layout.format}: question {question}, demonstrations {demo}, expected answer {answer}"


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
        options = Options(data_source=name, system=args.system, suffix=suffix)
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
        writer = Writer(out, schema_of(rows, False))
        try:
            for seen, row in enumerate(rows):
                writer.add(row, seen)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        written.append(out)
        print(f"{out}: {len(rows)} rows, data_source {name}")
    print("data.val_files=[" + ",".join(written) + "]")
    return 0
