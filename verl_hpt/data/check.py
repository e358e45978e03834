"""`verl-hpt data check`: what would happen to every demonstration of a file, before a GPU hour is spent.

The same functions decide here and in training (`verl_hpt.demos`, the run's reward function). A file that cannot be read
stops the check (exit 2, naming file, row and field); whatever is wrong with its rows is counted, shown by example, and
ends in exit 1 where it would hurt training.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl_hpt.data import report
from verl_hpt.data.advice import grader_overrides, left_out_text
from verl_hpt.data.chats import opened
from verl_hpt.data.convert import Options, to_verl
from verl_hpt.data.fields import JSON_FIELDS
from verl_hpt.data.formats import Layout, detect, left_out
from verl_hpt.data.grade import NOT_RUN, Grade, default_notes, load_reward
from verl_hpt.data.questions import Questions, check_form
from verl_hpt.data.read import count_rows, file_kind, read_rows
from verl_hpt.data.render import Renderer, difference, renderer
from verl_hpt.data.report import Result
from verl_hpt.data.rows import BadRow, Row
from verl_hpt.demos.demonstration import COLUMNS, Demonstration, Unusable, message_text, plain
from verl_hpt.demos.read import read
from verl_hpt.errors import UserError

_BATCH = 256  # rows graded and tokenised together
_TRIED = 8  # demonstrations of each data source that verl's default scorer is tried on
_BEARABLE = ("unusable: too_long", "rejected", "contradiction", "prompt length")  # up to --tolerance


@dataclass(frozen=True)
class Check:
    """What every step of the check reads, and the result that it adds to."""

    args: argparse.Namespace
    result: Result
    columns: dict[str, str]
    render: Renderer | None
    grade: Grade | None
    prompt_key: str
    demo_key: str
    samples: dict[str, list[tuple[str, Any, dict]]] = field(default_factory=dict)  # data source → what is tried

    @property
    def needs_answer(self) -> bool:
        """Whether the reward is one that compares with an expected answer; of the user's own nobody knows."""
        return self.args.reward in (None, "shipped", "verl")

    def place(self, demo: Demonstration) -> str:
        return f"{self.demo_key}[{demo.index}]" if demo.index else self.demo_key


def run(args: argparse.Namespace) -> int:
    """Check the file and report; 0 where nothing would hurt training, else 1. Raises `BadRow` or `UserError`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # without it, a warning at every grader process
    check_outputs(args)
    with contextlib.redirect_stdout(sys.stderr if args.json == "-" else sys.stdout):  # a grader may print
        result = check(args)
    if args.report:
        report.draw(result, args.report, args.max_response_length)
    text = report.text(result, args.max_response_length) + (f"\npicture: {args.report}" if args.report else "")
    content = json.dumps(report.as_json(result), indent=1, ensure_ascii=False, allow_nan=False)
    if args.json and args.json != "-":
        Path(args.json).write_text(content + "\n", encoding="utf-8")
    print(content if args.json == "-" else text)
    return 1 if result.harmful() else 0


def check_outputs(args: argparse.Namespace) -> None:
    """Raise `UserError` for outputs that cannot be written or would overwrite an input, before any work."""
    inputs = {os.path.realpath(path) for path in (args.file, *args.val)}
    for option, path in (("--json", args.json), ("--report", args.report)):
        if path in (None, "-"):
            continue
        if os.path.isdir(path):
            raise UserError(f"{option} {path}: is a folder; name a file")
        if os.path.realpath(path) in inputs:
            raise UserError(f"{option} {path} would overwrite the data: name another file")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {path}: cannot be written: {error}") from None
    if args.report and Path(args.report).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--report {args.report}: call it something.png, .pdf or .svg")


def check(args: argparse.Namespace) -> Result:
    """The result of all checks that the arguments allow."""
    result, render = Result(args.file), renderer(args) if args.tokenizer or args.model else None
    columns = {name: column for name in COLUMNS if (column := getattr(args, f"column_{name}")) is not None}
    if render is not None:
        result.unit = "tokens"
        if render.eos_problem is not None:
            result.found("eos", 0, "eos", f"{render.eos_problem} (--eos)")
    elif columns.keys() & {"token_weights", "teacher_log_prob"}:
        result.notes.append("columns with a value a token are compared with its tokens only with --tokenizer")
    if render is None and (args.max_response_length is not None or args.max_prompt_length is not None):
        result.notes.append("lengths are in characters: --tokenizer is needed to compare them with a limit in tokens")
    if args.reward not in (None, "shipped"):
        result.grader = "verl's default scorer" if args.reward == "verl" else args.reward
    grade = load_reward(args.reward, args.reward_kwargs)
    checks = Check(args, result, columns, render, grade, args.prompt_key or "prompt", args.demo_key or "target")
    questions, rows = Questions(), _verl_rows(checks)
    likely: list[tuple[list[int], Demonstration]] = []
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as threads:
        while batch := list(itertools.islice(rows, _BATCH)):
            likely += _check_batch(checks, batch, threads)
            del likely[args.model_rows :]
            questions.check(result, batch)
    for path in args.val:
        questions.check_leak(result, path, checks.prompt_key)
    if args.reward in (None, "shipped") and checks.samples:
        result.notes += default_notes(checks.samples, args.success)
    elif args.reward == "verl" and "reward" in result.findings:
        result.notes.append("to grade with the shipped grader: " + " ".join(grader_overrides()))
    if args.model:
        _ask_model(args.model, likely, result)
    result.questions = len(questions.known)
    _judge(result, args.tolerance, checks.demo_key)
    return result


def _ask_model(path: str, demos: list[tuple[list[int], Demonstration]], result: Result) -> None:
    from verl_hpt.data.likelihood import Likelihood

    likelihood, too_long = Likelihood(path), 0
    for prompt, demo in demos:
        try:
            result.log_likelihoods.append(likelihood(prompt, demo))
        except Unusable:
            too_long += 1
    if too_long:
        limit = likelihood.positions
        result.notes.append(f"{too_long} demonstrations are longer than the {limit} tokens that --model reads")


def _verl_rows(checks: Check) -> Iterator[Row]:
    """The file's rows in verl's form; those that cannot be brought to it are counted and left out."""
    args, result, layout = checks.args, checks.result, None
    columns = checks.columns.values()
    rows = tqdm(read_rows(args.file), total=count_rows(args.file), unit=" rows", desc="check", disable=None)
    for row in itertools.islice(rows, args.limit):
        if result.rows == 0:
            layout = _layout(checks, row)
        result.rows += 1
        try:
            if layout is None:
                prompt, used = check_form(row, checks.prompt_key, checks.needs_answer), frozenset()
                made = {**row.values, "prompt": prompt, "target": row.values.get(checks.demo_key)}
            else:
                row = row._replace(values=opened(row.values, JSON_FIELDS)[0])
                made, used = to_verl(row, layout, Options())
                made |= {name: row.values[name] for name in columns if name in row.values}
            for name in left_out(row, used):
                result.found("left out", row.number, name, left_out_text(name))
            yield row._replace(values=made)
        except BadRow as bad:
            result.found("schema", row.number, bad.field, bad.problem)


def _layout(checks: Check, row: Row) -> Layout | None:
    """How the file's rows are to be read, by its first; None where they are in verl's form."""
    args, result, values = checks.args, checks.result, row.values
    for column in checks.columns.values():
        if column not in values:
            raise row.bad(column, f"no such column; the file has {row.fields()}")
    is_chat = checks.prompt_key in values and isinstance(plain(values[checks.prompt_key]), list | None)
    if is_chat and ("reward_model" in values or "data_source" in values):  # a null is the row's own trouble
        if checks.demo_key not in values:
            result.found("no column", row.number, checks.demo_key, f"the file has {row.fields()}")
        return None
    layout = detect(row, args.prompt_key, args.demo_key, args.answer_key)
    if file_kind(args.file) == "parquet":
        result.found("form", row.number, layout.prompt, f"read as `{layout.format}`")
    else:
        result.notes.append(f"not in verl's form yet (read as `{layout.format}`): `verl-hpt data convert` first")
    return replace(layout, no_answer=checks.grade is not None and not checks.needs_answer)


def _check_batch(checks: Check, batch: list[Row], threads) -> list[tuple[list[int], Demonstration]]:
    """Every demonstration of some rows: usable or why not, its length, its reward. The usable ones with prompts."""
    result, render, prompts, usable = checks.result, checks.render, {}, []
    if render is not None:
        prompts = _prompts(checks, batch)
        batch = [row for row in batch if row.number in prompts]
    rows = [(row.values, prompts.get(row.number), row.values["prompt"]) for row in batch]
    encoding = render.encoding if render else (None, None)
    for row, demos in zip(batch, read(rows, "target", checks.columns, *encoding), strict=True):
        result.without += all(demo.content is None for demo in demos)
        for demo in demos:
            if demo.content is not None:
                result.demonstrations += 1
                if _is_usable(checks, row.number, demo):
                    usable.append((row, demo))
            elif any(other.content is not None for other in demos):
                result.found("null among", row.number, f"{checks.demo_key}[{demo.index}]")
    result.usable += len(usable)
    if checks.grade is not None:
        _grade(checks, usable, threads)
    if render is None:
        result.lengths += [len(_answer(demo)) for _, demo in usable]
        return []
    texts = render.texts([demo.ids for _, demo in usable])
    for (row, demo), text in zip(usable, texts, strict=True):
        if demo.text is not None and text != demo.text and not render.special(demo.text):
            result.found("round trip", row.number, checks.place(demo), difference(demo.text, text))
        if len(result.rendered) < checks.args.show:
            result.rendered.append(render.beside(row.number, prompts[row.number], demo))
    return [(prompts[row.number], demo) for row, demo in usable]


def _is_usable(checks: Check, number: int, demo: Demonstration) -> bool:
    """Whether the demonstration can be trained on; what is wrong or odd about it goes into the result."""
    result, place = checks.result, checks.place(demo)
    if demo.length is not None:
        result.lengths.append(demo.length)
    if demo.text is not None and opened({checks.demo_key: demo.text}, {checks.demo_key})[1]:
        result.found("json text", number, place, "`verl-hpt data convert` reads them")
    if demo.unclosed_think:
        result.found("think", number, place)
    if demo.bad is not None:
        result.reasons[demo.bad.reason] += 1
        result.found(f"unusable: {demo.bad.reason}", number, place, demo.bad.detail)
    return demo.bad is None


def _prompts(checks: Check, batch: list[Row]) -> dict[int, list[int]]:
    """The prompts' tokens by row, without those that the template refuses."""
    result, limit, texts = checks.result, checks.args.max_prompt_length, {}
    for row in batch:
        try:
            texts[row.number] = checks.render.prompt(row.values["prompt"])
        except Unusable as bad:
            result.found("prompt", row.number, "prompt", bad.detail)
    prompts = dict(zip(texts, checks.render.tokens([*texts.values()]), strict=True))
    if limit is not None:
        result.prompt_lengths += map(len, prompts.values())
        for number, ids in prompts.items():
            if len(ids) > limit:
                result.found("prompt length", number, "prompt", f"{len(ids)} tokens")
    return prompts


def _answer(demo: Demonstration) -> str:
    """What the assistant says, as the reward function reads it."""
    if demo.text is not None:
        return demo.text
    return "\n".join(message_text(m) for m in plain(demo.content) if m.get("role", "assistant") == "assistant")


def _grade(checks: Check, demos: list[tuple[Row, Demonstration]], threads) -> None:
    """Rewards of a batch, in threads, as verl has it; the symbolic grader works in processes of its own."""

    def one(item: tuple[Row, Demonstration]) -> tuple[float | None, str, bool]:
        values = item[0].values
        info = {**(plain(values.get("extra_info")) or {}), "num_turns": 2, "rollout_reward_scores": {}}
        return checks.grade(values["data_source"], _answer(item[1]), values["reward_model"]["ground_truth"], info)

    result = checks.result
    for (row, demo), (score, problem, failed) in zip(demos, threads.map(one, demos), strict=True):
        number, place = row.number, checks.place(demo)
        graded = result.rewards.setdefault(row.values["data_source"], [0, 0.0, 0])
        if score is None:
            if problem != NOT_RUN:
                result.found("reward", number, place, problem)
            elif (note := f"{row.values['data_source']}: not graded, {NOT_RUN}") not in result.notes:
                result.notes.append(note)
            continue
        if failed:
            result.found("grading", number, place)
        samples = checks.samples.setdefault(row.values["data_source"], [])
        if len(samples) < _TRIED:
            info = plain(row.values.get("extra_info")) or {}
            samples.append((_answer(demo), row.values["reward_model"]["ground_truth"], info))
        graded[0] += 1
        graded[1] += score
        if score < checks.args.success:
            graded[2] += 1
            truth = str(row.values["reward_model"]["ground_truth"])[:60]
            detail = f"reward {score:g}; expected {truth!r}, the text ends {_answer(demo)[-60:]!r}"
            result.found("rejected", number, place, detail)


def _judge(result: Result, tolerance: float, demo_key: str) -> None:
    """What is bearable in small numbers, and what no demonstration at all means."""
    for name in _BEARABLE:
        whole = result.rows if name in ("contradiction", "prompt length") else result.demonstrations
        if finding := result.findings.get(name):
            finding.harmful = finding.count > tolerance * max(whole, 1)
    if result.without:
        result.found("without", 0, demo_key)
        finding = result.findings["without"]
        finding.count = result.without
        if result.without == result.rows:
            finding.harmful, finding.message = True, "no question has a demonstration"
        else:
            finding.examples.clear()
    if result.rows and not result.usable and not result.harmful():
        result.found("nothing usable", 0, demo_key)
