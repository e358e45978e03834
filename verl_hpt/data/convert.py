"""`verl-hpt data convert`: datasets of many forms to the parquet that verl reads, every field carried over.

verl's row: `data_source`, `prompt` (chat messages), `ability`, `reward_model` {style, ground_truth}, `extra_info`
{index, split}; ours: `target`, the demonstrations. The input is read twice: for the columns' types, then to write.
Memory is that of one row group (8 MiB of text). Output goes to `OUT.part` first: what has the name OUT is whole.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl_hpt.data.advice import Seen, ending
from verl_hpt.data.chats import encodable, opened
from verl_hpt.data.fields import JSON_FIELDS, OPTIONS, wrongly_graded
from verl_hpt.data.formats import FORMATS, Layout, detect, left_out, read
from verl_hpt.data.grade import Grade, load_reward
from verl_hpt.data.questions import question_text
from verl_hpt.data.read import count_rows, read_rows
from verl_hpt.data.rows import BadRow, Row, Skip, listed, stop
from verl_hpt.data.write import Writer, groups, schema_of
from verl_hpt.demos.demonstration import plain
from verl_hpt.demos.select import stable_hash
from verl_hpt.errors import UserError
from verl_hpt.host.contract import reserved

_NAMES = 1000  # names of fields, and kinds of bad rows, that are told apart
_READ_BY = {"prompt": "--prompt-key", "target": "--demo-key", "reward_model.ground_truth": "--answer-key"}
_MARKS = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Options:
    """What the user asked of the rows; see `verl-hpt data convert --help`."""

    data_source: str | None = None
    ability: str | None = None
    system: str | None = None
    drop_system: bool = False
    suffix: str = ""
    strip_calculator: bool = False


@dataclass
class Best:
    """The demonstration that --best-of-graded takes of each row: graded once, though the rows are read twice."""

    grade: Grade
    taken: dict[tuple[str, int], int | None] = field(default_factory=dict)  # file and row → index, None: none is right
    problems: Counter = field(default_factory=Counter)  # why the grader gave no number

    def choose(self, made: dict, row: Row) -> None:
        """Leave the first demonstration that the grader accepts, or none."""
        key = (row.file, row.number)
        if key not in self.taken:
            self.taken[key] = next((i for i, demo in enumerate(made["target"]) if self._is_right(made, demo)), None)
        index = self.taken[key]
        made["target"] = [] if index is None else [made["target"][index]]

    def _is_right(self, made: dict, demo: list[dict] | None) -> bool:
        if demo is None:
            return False
        text = "\n".join(message["content"] for message in demo if message["role"] == "assistant")
        truth = made["reward_model"]["ground_truth"]
        score, problem, _ = self.grade(made["data_source"], text, truth, made["extra_info"])
        if score is None:
            self.problems[problem] += 1
        return score is not None and score >= 1

    def warnings(self) -> Iterator[str]:
        """What the grader did not accept, or could not grade."""
        if wrong := sum(index is None for index in self.taken.values()):
            yield f"--best-of-graded: the grader accepts no demonstration of {wrong} questions: they are left without"
        for problem, count in self.problems.most_common(3):
            yield f"--best-of-graded: the grader fails on {count} demonstrations: {problem}"


def to_verl(row: Row, layout: Layout, options: Options) -> tuple[dict[str, Any], frozenset[str]]:
    """The row in verl's form, and the names of its further fields that the prompt has; raises `BadRow`."""
    prompt, demos, truth, used = read(row, layout)
    if options.drop_system or options.system is not None:
        prompt = [message for message in prompt if message["role"] != "system"]
    if options.system is not None:
        prompt = [{"role": "system", "content": options.system}, *prompt]
    if options.suffix:
        prompt = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + options.suffix}]
    demos = [[{"role": "assistant", "content": demo}] if isinstance(demo, str) else demo for demo in demos]
    if options.strip_calculator:
        demos = [demo and [{**m, "content": _MARKS.sub("", m["content"])} for m in demo] for demo in demos]
    name = row.file.replace("\\", "/").split("/")[-1]
    source = options.data_source or plain(row.get("data_source"))
    if source is not None and (isinstance(source, bool) or not isinstance(source, str | int)):
        raise row.bad("data_source", f"must be text, got {type(source).__name__}")
    ability, style = row.get("ability"), row.get("reward_model.style")
    made = {
        "data_source": str(source or FORMATS[layout.format].data_source or name.split(".")[0]),
        "prompt": prompt,
        "ability": options.ability or (ability if isinstance(ability, str) else "math"),
        "reward_model": {"style": style if style and isinstance(style, str) else "rule", "ground_truth": truth},
        "extra_info": {"file": name, "row": row.number},
        "target": demos,
    }
    return made, used


def carry(made: dict, row: Row, layout: Layout, options: Options, used: frozenset[str]) -> None:
    """Put all that the row has beside its question into the row made; what has no place there raises `BadRow`."""
    read_whole = {layout.prompt, layout.demo, layout.truth, layout.context, "data_source", *used}
    if options.drop_system or options.system is not None:
        read_whole.add(layout.system)
    for name, value in row.values.items():
        encodable(row, name, name)
        value, taken = plain(value), []
        if name in read_whole or (name in made and not value):
            continue
        if reserved(name):
            problem = "verl's rows or its agent loop have a field of that name, whose place the column would take"
            raise UserError(f"{row.file}: field `{name}`: {problem}; --drop {name} leaves it out")
        if name in ("extra_info", "reward_model") and not isinstance(value, dict):
            problem = f"must be an object with named fields, got {type(value).__name__}"
            raise row.bad(name, f"{problem}; --drop {name} leaves it out")
        if name == "extra_info":
            made[name] |= value
        elif name == "reward_model":
            taken = [
                f"{name}.{key}" for key, of_ours in made[name].items() if value.get(key) not in (None, "", of_ours)
            ]
            made[name] = {**value, **made[name]}
        elif name == "ability":
            taken = [] if isinstance(value, str) or options.ability else [name]
        elif name in made:
            taken = [f"{name}.{key}" for key in value] if isinstance(value, dict) else [name]
        else:
            made[name] = value
        for path in taken:
            if path not in read_whole:
                remedy = f"{_READ_BY[path]} {path} reads this one, " if path in _READ_BY else ""
                problem = f"convert writes that field itself, not {str(row.get(path))[:80]!r}"
                raise row.bad(path, f"{problem}: {remedy}--drop {path} leaves it out")


@dataclass
class Log:
    """What was seen of the inputs, and which rows were left out."""

    skipping: bool
    layouts: dict[str, Layout] = field(default_factory=dict)  # by file
    fields: dict[str, dict[str, None]] = field(default_factory=dict)  # by file, in order
    parsed: dict[str, set[str]] = field(default_factory=dict)  # by file: fields that held JSON text
    edited: set[str] = field(default_factory=set)  # names of --drop and --as-text that a row had
    bad: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # by kind
    seen: Seen = field(default_factory=Seen)

    def look(self, row: Row, made: dict, used: frozenset[str], args: argparse.Namespace) -> None:
        """Count what the user should know of a row that is written."""
        seen = self.seen
        seen.rows += 1
        seen.unanswered += not made["reward_model"]["ground_truth"]
        seen.letters += any(name.lower() in OPTIONS for name in used)
        for name in left_out(row, used):
            seen.left_out.setdefault(row.file, Counter())[name] += 1
        if made["target"] and not args.best_of_graded and (name := wrongly_graded(row.values, len(made["target"]))):
            seen.graded.setdefault(row.file, Counter())[name] += 1

    def skip(self, bad: BadRow) -> None:
        """Count a bad row under --skip-bad, else raise it; so does what is wrong with a whole file."""
        if not self.skipping or not bad.row:
            raise bad
        problem = re.sub(r"\d+", "N", bad.problem.partition(", got ")[0])[:160]
        kind = f"`{re.sub(r'[0-9]+', '', bad.field)}`: {problem}"
        kind = kind if kind in self.bad or len(self.bad) < _NAMES else "(other problems)"
        self.bad[kind] += 1
        if len(self.examples) < 5:
            self.examples.setdefault(kind, str(bad))

    def print_skipped(self) -> None:
        """Print the bad rows by kind, and the first of some kinds whole."""
        if self.bad:
            print(f"--skip-bad left out {self.bad.total()} bad rows:")
            for kind, count in self.bad.most_common(20):
                print(f"  {count} × {kind}")
            if len(self.bad) > 20:
                print(f"  and {len(self.bad) - 20} further kinds")
            for example in self.examples.values():
                print(f"  for example {example}")


def run(args: argparse.Namespace) -> int:
    """Convert; 0 when every row was written, or under --skip-bad any. Raises `BadRow` or `UserError`."""
    outputs = [name for path in (args.out, args.val) if path for name in (path, f"{path}.part")]
    if len({os.path.realpath(p) for p in (*args.inputs, *outputs)}) != len(args.inputs) + len(outputs):
        raise UserError("inputs, OUT and --val must be different files, and none an output's name with .part after it")
    if args.reward is not None and (not args.best_of_graded or args.reward == "none"):
        raise UserError("--reward names the grader of --best-of-graded, which needs one; leave it out")
    log = Log(args.skip_bad)
    best = Best(load_reward(args.reward, {})) if args.best_of_graded else None
    rows = itertools.islice(_rows(args, log, log.skip, best), args.limit)
    schema = schema_of(_values(groups(rows)), args.several)
    for option, names in (("--drop", args.drop), ("--as-text", args.as_text)):
        if missing := [name for name in names if name not in log.edited]:
            known = listed([*{name: None for names in log.fields.values() for name in names}])
            raise UserError(f"{option} {', '.join(missing)}: no row has such a field; they have {known}")
    try:
        log.seen = Seen()
        rows = itertools.islice(_rows(args, log, (lambda bad: None) if args.skip_bad else stop, best), args.limit)
        counts, sources, demos = _write(args, rows, schema, log) if schema is not None else ({}, {}, {})
    finally:
        log.print_skipped()
    if not sources:
        raise UserError("no row was written: all are bad" if log.bad else "no rows to write")
    print(f"{args.out}: {counts['train']} rows" + (f"; {args.val}: {counts['val']} rows" if args.val else ""))
    print(f"{demos.total()} demonstrations; {counts['without']} questions without one")
    print("data_source: " + ", ".join(f"{name} {n}" for name, n in sources.most_common(20)))
    for source, names in log.fields.items():
        if names and not demos[source]:
            problem = f"no demonstration was found; its fields are {listed([*names])}"
            print(f"warning: {source}: {problem}: --demo-key names theirs", file=sys.stderr)
    if args.val and not counts["val"]:
        print(f"warning: no question fell to validation; raise --val-share ({args.val_share:g})", file=sys.stderr)
    if args.val and not counts["train"]:
        problem = f"every question fell to validation, {args.out} has no rows"
        print(f"warning: {problem}; lower --val-share ({args.val_share:g})", file=sys.stderr)
    for warning in (*log.seen.warnings(), *(best.warnings() if best else ())):
        print(warning, file=sys.stderr)
    print(*ending(args.out, args.val, log.seen, demos.total() > 0), sep="\n")
    return 0


def _values(batches: Iterator[list[Row]]) -> Iterator[list[dict]]:
    """The rows' values, of one batch at a time in memory."""
    for batch in batches:
        values = [row.values for row in batch]
        batch.clear()
        yield values
        values.clear()


def _write(args: argparse.Namespace, rows: Iterator[Row], schema, log: Log) -> tuple[Counter, Counter, Counter]:
    """Write the rows; without any, no file. Counts of rows, of rows by data_source, of demonstrations by file."""
    counts, sources, demos = Counter(), Counter(), Counter()
    with contextlib.ExitStack() as stack:
        paths = {"train": args.out, "val": args.val}
        writers = {split: stack.enter_context(Writer(path, schema)) for split, path in paths.items() if path}
        for group in groups(rows):
            parts: dict[str, list[Row]] = {split: [] for split in writers}
            for row in group:
                val = args.val and in_validation(row.values["prompt"], args.val_share, args.seed)
                parts["val" if val else "train"].append(row)
            for split, part in parts.items():
                while part and (changed := writers[split].write([row.values for row in part], split)):
                    for position, path, problem in changed:
                        log.skip(_changed(part[position], log.layouts[part[position].file], path, problem))
                    positions = {position for position, *_ in changed}
                    part = [row for i, row in enumerate(part) if i not in positions]
                counts[split] += len(part)
                for row in part:
                    count = sum(demo is not None for demo in row.values["target"])
                    demos[row.file] += count
                    counts["without"] += not count
                    sources[row.values["data_source"]] += 1
            group.clear()  # before the next is made
            parts.clear()
        if not sources:
            stack.pop_all().__exit__(UserError, None, None)  # no file for no rows
    return counts, sources, demos


def _changed(row: Row, layout: Layout, path: str, problem: str) -> BadRow:
    """What is wrong at `path` in the row made, as a problem of a field of the file."""
    root, dot, rest = path.partition(".")
    root = {"prompt": layout.prompt, "target": layout.demo or layout.prompt}.get(root, root)
    name, remedy = f"{root}{dot}{rest}", ""
    if not re.search("surrogate|binary", problem):  # JSON text would not help
        remedy = f"--as-text {name} writes it as JSON text, "
    return row.bad(name, f"{problem}: {remedy}--drop {name} leaves it out")


def _rows(args: argparse.Namespace, log: Log, skip: Skip, best: Best | None) -> Iterator[Row]:
    """The inputs' rows, converted; bad ones go to `skip`."""
    options = Options(**{f.name: getattr(args, f.name) for f in fields(Options)})
    known = JSON_FIELDS | {key for key in (args.prompt_key, args.demo_key) if key}
    for source in args.inputs:
        names, total, name = log.fields.setdefault(source, {}), count_rows(source), Path(source).name
        for row in tqdm(read_rows(source, skip), total=total, unit=" rows", desc=name, disable=None):
            if len(names) < _NAMES:
                names.update(dict.fromkeys(row.values))
            values, parsed = opened(row.values, known)
            for name in sorted({*parsed} - log.parsed.setdefault(source, set())):
                print(f"{source}: `{name}` holds its messages or fields as JSON text: parsed")
                log.parsed[source].add(name)
            row = row._replace(values=values)
            try:
                _edit(args, row, log.edited)
                layout = log.layouts.get(source) or _layout(args, row)
                log.layouts[source] = layout
                made, used = to_verl(row, layout, options)
                log.look(row, made, used, args)
                carry(made, row, layout, options, used)
                if best is not None:
                    best.choose(made, row)
            except BadRow as bad:
                skip(bad)
                continue
            yield row._replace(values=made)


def _layout(args: argparse.Namespace, row: Row) -> Layout:
    layout = detect(row, args.prompt_key, args.demo_key, args.answer_key, args.no_answer)
    if args.format not in ("auto", layout.format):
        raise UserError(
            f"{row.file}: --format {args.format}, but its fields ({row.fields()}) are those of `{layout.format}`; "
            "leave --format out, or name the fields: --prompt-key, --demo-key, --answer-key"
        )
    print(f"{row.file}: {layout}")
    return layout


def _edit(args: argparse.Namespace, row: Row, edited: set[str]) -> None:
    """Do what --drop and --as-text say."""
    for name in args.drop:
        for holder, key in _holders(row.values, name):
            del holder[key]
            edited.add(name)
    for name in args.as_text:
        for holder, key in _holders(row.values, name):
            edited.add(name)
            if holder[key] is not None and not isinstance(holder[key], str):
                try:
                    holder[key] = json.dumps(plain(holder[key]), ensure_ascii=False)
                except TypeError as error:
                    problem = f"cannot be written as JSON text ({error}): --drop {name} leaves it out"
                    raise row.bad(name, problem) from None


def _holders(value: Any, path: str) -> list[tuple[dict, str]]:
    """The objects, those in lists too, that have the field `a.b`, each with the name of it there."""
    if isinstance(value, list):
        return [found for item in value for found in _holders(item, path)]
    if not isinstance(value, dict) or path in value:
        return [(value, path)] if isinstance(value, dict) else []
    name, _, rest = path.partition(".")
    return _holders(value.get(name), rest) if rest else []


def in_validation(prompt: Any, share: float, seed: int) -> bool:
    """Whether a question goes to validation: by its text alone, so that its duplicates go with it."""
    return stable_hash("validation", seed, question_text(prompt)) < share * 2**64
