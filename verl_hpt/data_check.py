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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_hpt import demos as D
from verl_hpt.data_grade import load_reward
from verl_hpt.data_options import check_options, json_option
from verl_hpt.data_questions import Questions, form_problem
from verl_hpt.data_read import BadRow, count_rows, file_kind, read_rows
from verl_hpt.data_render import Renderer, difference
from verl_hpt.data_result import Finding, Result
from verl_hpt.data_rows import CHAT_KEYS, DEMO_KEYS, PROMPT_KEYS, Layout, Options, detect, opened, to_verl
from verl_hpt.demo_columns import Demo, DemoColumns, check_values, row_demos

_BATCH = 256  # rows graded and tokenised together
_AS_TEXT = {*CHAT_KEYS, *PROMPT_KEYS, *DEMO_KEYS, "reward_model"}  # fields that convert reads where they hold JSON text
_EXAMPLES = 5  # shown of each finding; the JSON has up to a hundred


def run_check(args: argparse.Namespace) -> int:
    """Check the file and report; 0 where nothing would hurt training, else 1. Raises `BadRow` or `UserError`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # without it, a warning at every grader process
    check_options(args)
    with contextlib.redirect_stdout(sys.stderr if args.json == "-" else sys.stdout):  # a grader may print
        result = check(args)
    from verl_hpt.data_report import as_json, draw, text

    if args.report:
        draw(result, args.report, args.max_response_length)
    if args.json:
        content = json.dumps(as_json(result), indent=1, ensure_ascii=False, allow_nan=False)
        if args.json == "-":
            print(content)
        else:
            Path(args.json).write_text(content + "\n", encoding="utf-8")
    if args.json != "-":
        print(text(result, args.max_response_length, _EXAMPLES))
        if args.report:
            print(f"picture: {args.report}")
    return 1 if any(f.harmful for f in result.findings.values()) else 0


def check(args: argparse.Namespace) -> Result:
    """The result of all checks that the arguments allow."""
    result = Result(args.file)
    render, kwargs = None, json_option("--template-kwargs", args.template_kwargs)
    if args.tokenizer or args.model:
        render = Renderer(
            args.tokenizer or args.model,
            option="--tokenizer" if args.tokenizer else "--model",
            eos=args.eos,
            max_length=args.max_response_length,
            kwargs=kwargs,
        )
        if render.eos_problem is not None:
            message = "demonstrations would end with a token at which rollouts do not stop"
            result.found("eos", message, 0, "eos", f"{render.eos_problem} (--eos)")
    elif args.token_weights_key or args.teacher_log_prob_key:
        result.notes.append("columns with a value a token are compared with its tokens only with --tokenizer")
    if args.reward not in (None, "shipped"):
        result.grader = args.reward
    grade = load_reward(args.reward, json_option("--reward-kwargs", args.reward_kwargs))
    columns = DemoColumns(
        reward=args.demo_reward_key,
        log_likelihood=args.log_likelihood_key,
        other_log_prob=args.other_log_prob_key,
        teacher_log_prob=args.teacher_log_prob_key,
        token_weights=args.token_weights_key,
        source=args.demo_source_key,
    )
    if render is not None:
        result.unit = "tokens"
    elif args.max_response_length is not None or args.max_prompt_length is not None:
        result.notes.append("lengths are in characters: --tokenizer is needed to compare them with a limit in tokens")
    questions = Questions()
    likely: list[tuple[list[int], D.EncodedDemo]] = []
    rows = _verl_rows(args, result, columns)
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as threads:
        while batch := list(itertools.islice(rows, _BATCH)):
            _check_batch(args, result, batch, columns, render, grade, threads, likely)
            questions.check(result, batch)
    for path in args.val:
        questions.check_leak(result, path, args.prompt_key or "prompt")
    if args.model:
        from verl_hpt.data_likelihood import Likelihood

        ask, beyond = Likelihood(args.model), 0
        for prompt, demo in likely:
            try:
                result.log_likelihoods.append(ask(prompt, demo))
            except D.Unusable:
                beyond += 1
        if beyond:
            result.notes.append(
                f"{beyond} demonstrations are longer than the {ask.positions} tokens that --model reads"
            )
    result.questions = len(questions.known)
    _judge(result, args)
    return result


def _verl_rows(args: argparse.Namespace, result: Result, columns: DemoColumns) -> Iterator[tuple[int, dict]]:
    """The file's rows in verl's form; those that cannot be brought to it are counted and left out."""
    from tqdm import tqdm

    layout: Layout | None = None
    prompt_key, demo_key = args.prompt_key or "prompt", args.demo_key or "target"
    rows = tqdm(read_rows(args.file), total=count_rows(args.file), unit=" rows", desc="check", disable=None)
    direct = False
    extra = list(columns.named().values())
    for number, row in itertools.islice(rows, args.limit):
        if result.rows == 0:
            missing = [c for c in extra if c not in row]
            if missing:
                there = ", ".join(f"`{k}`" for k in row)
                raise BadRow(args.file, number, missing[0], f"no such column; the file has {there}")
            asked = D.plain(row.get(prompt_key))  # a null is the row's own trouble
            direct = isinstance(asked, list | None) and ("reward_model" in row or "data_source" in row)
            direct = direct and prompt_key in row
            if not direct:
                layout = detect(args.file, row, args.prompt_key, args.demo_key, args.answer_key)
                note = f"not in verl's form yet (read as `{layout.format}`): `verl-hpt data convert` first"
                if file_kind(args.file) == "parquet":
                    result.found("form", note, number, layout.prompt or "prompt")
                else:
                    result.notes.append(note)
            elif demo_key not in row:
                there = ", ".join(f"`{k}`" for k in row)
                detail = f"the file has {there}"
                result.found(
                    "no column", "the demonstrations' column is not there (hpt.demo.key)", number, demo_key, detail
                )
        result.rows += 1
        try:
            if layout is not None:
                new = to_verl(args.file, number, opened(row, _AS_TEXT)[0], layout, Options())
                new.update({name: row[name] for name in extra if name in row})
                yield number, new
            else:
                problem = form_problem(row, prompt_key)
                if problem is not None:
                    raise BadRow(args.file, number, *problem)
                yield number, {**row, "prompt": D.plain(row[prompt_key]), "target": row.get(demo_key)}
        except BadRow as bad:
            result.found("schema", "rows that verl cannot train on", number, bad.field, bad.problem)


@dataclass
class _Item:
    """One demonstration on its way through a batch."""

    row: int
    values: dict
    demo: Demo | None
    text: str | None = None
    prompt: list[int] | None = None
    think_tail: str | None = None
    encoded: D.EncodedDemo | None = None


def _check_batch(args, result, batch, columns, render, grade, threads, likely) -> None:
    """Every demonstration of some rows: usable or why not, its length, its reward."""
    demo_key = args.demo_key or "target"
    items, prompts = [], {}
    if render is not None:
        prompts = _prompts(args, result, batch, render)
        batch = [(number, row) for number, row in batch if number in prompts]
    for number, row in batch:
        prompt = prompts.get(number)
        tail = None if prompt is None else D.open_think(prompt, render.tokenizer)
        try:
            found = row_demos(row, "target", columns)
        except D.Unusable as bad:
            result.demonstrations += len(D.demonstrations(row["target"]))
            _unusable(result, bad, number, demo_key)
            continue
        if not found or all(d.content is None for d in found):
            result.without += 1
            continue
        for demo in found:
            if demo.content is not None:
                items.append(_Item(number, row, demo, prompt=prompt, think_tail=tail))
                continue
            message = "nulls among a row's demonstrations (the others would be used)"
            result.found("null among", message, number, f"{demo_key}[{demo.index}]")
    result.demonstrations += len(items)
    ends = render.ends if render is not None else []
    for item in items:
        try:
            check_values(item.demo, columns)
            demo = D.plain(item.demo.content)
            item.text = D.single_text(demo)
            if item.text is not None and opened({demo_key: item.text}, {demo_key})[1]:
                message = "chat messages written as JSON text: they would be trained on literally"
                detail = "`verl-hpt data convert` reads them"
                result.found("json text", message, item.row, _place(demo_key, item), detail)
            if item.text is not None:
                item.text = D.clean_text(item.text, ends, item.think_tail)
                D.bound_characters(item.text, render.max_length if render is not None else None)
            elif render is not None:
                item.encoded = D.encode(
                    demo,
                    render.tokenizer,
                    render.eos_id,
                    max_length=render.max_length,
                    prompt_messages=item.values["prompt"],
                    template_kwargs=render.kwargs,
                )
        except D.Unusable as bad:
            _unusable(result, bad, item.row, _place(demo_key, item))
            item.demo = None
    items = [item for item in items if item.demo is not None]
    if render is not None:
        items = _tokenise(result, items, render, demo_key, columns)
    for item in items:
        if render is None:
            result.lengths.append(len(item.text if item.text is not None else _said(item.demo.content)))
    result.usable += len(items)
    if grade is not None:
        _grade(args, result, items, grade, threads)
    for item in items:
        if render is not None and len(result.rendered) < args.show:
            result.rendered.append(render.beside(item.row, item.prompt, item.encoded))
        if args.model and len(likely) < args.model_rows and item.encoded is not None:
            likely.append((item.prompt, item.encoded))


def _place(key: str, item: _Item) -> str:
    return key if item.demo is None or item.demo.index == 0 else f"{key}[{item.demo.index}]"


def _unusable(result: Result, bad: D.Unusable, row: int, name: str) -> None:
    result.reasons[bad.reason] += 1
    result.found(f"unusable: {bad.reason}", f"demonstrations: {D.REASONS[bad.reason]}", row, name, bad.detail)


def _tokenise(result: Result, items: list[_Item], render: Renderer, demo_key: str, columns) -> list[_Item]:
    """The items with their tokens; those that cannot be trained on are counted and left out."""
    singles = [item for item in items if item.encoded is None]
    result.lengths += [len(item.encoded.ids) for item in items if item.encoded is not None]
    for item, ids in zip(singles, render.tokens([i.text for i in singles]), strict=True):
        result.lengths.append(len(ids) + 1)
        try:
            ids = D.finish(ids, render.eos_id, render.max_length)
            item.encoded = D.EncodedDemo(ids, [1] * len(ids), D.think_warnings(item.text, item.think_tail))
        except D.Unusable as bad:
            _unusable(result, bad, item.row, _place(demo_key, item))
    items = [item for item in items if item.encoded is not None]
    for item, back in zip(items, render.texts([i.encoded.ids for i in items]), strict=True):
        if "think_unclosed" in item.encoded.warnings:
            message = "the prompt opens <think> and the demonstration never closes it"
            result.found("think", message, item.row, _place(demo_key, item), harmful=False)
        if item.text is not None and back != item.text and not render.special(item.text):
            message = "the tokenizer does not give the text back: it will be trained on as something else"
            detail = difference(item.text, back)
            result.found("round trip", message, item.row, _place(demo_key, item), detail, harmful=False)
    fitting = []
    for item in items:
        try:
            check_values(item.demo, columns, item.encoded)
            fitting.append(item)
        except D.Unusable as bad:
            _unusable(result, bad, item.row, _place(demo_key, item))
    return fitting


def _prompts(args, result, batch, render) -> dict[int, list[int]]:
    """The prompts' tokens by row, without those that the template refuses."""
    texts = {}
    for number, row in batch:
        try:
            texts[number] = render.prompt(row["prompt"])
        except D.Unusable as bad:
            result.found("prompt", "prompts that the chat template refuses", number, "prompt", bad.detail)
    prompts = dict(zip(texts, render.tokens([*texts.values()]), strict=True))
    if args.max_prompt_length is not None:
        for number, ids in prompts.items():
            result.prompt_lengths.append(len(ids))
            if len(ids) > args.max_prompt_length:
                message, detail = "prompts too long: verl drops them", f"{len(ids)} tokens"
                result.found("prompt length", message, number, "prompt", detail, harmful=False)
    return prompts


def _said(demo: Any) -> str:
    demo = D.plain(demo)
    if isinstance(demo, str):
        return demo
    return "\n".join(D.message_text(m) for m in demo if m.get("role", "assistant") == "assistant")


def _grade(args, result, items, grade, threads) -> None:
    """Rewards of a batch, in threads, as verl has it; the symbolic grader works in processes of its own."""

    def one(item: _Item) -> tuple[float | None, str, bool]:
        text = item.text
        if text is None:
            text = _said(item.demo.content)
        row = item.values
        info = {**(D.plain(row.get("extra_info")) or {}), "num_turns": 2, "rollout_reward_scores": {}}
        truth = row["reward_model"]["ground_truth"]
        return grade(row["data_source"], text, truth, info)

    for item, (score, problem, failed) in zip(items, threads.map(one, items), strict=True):
        source = item.values["data_source"]
        name = _place(args.demo_key or "target", item)
        graded = result.rewards.setdefault(source, [0, 0.0, 0])
        if score is None:
            result.found("reward", "the reward function fails, or gives no finite number", item.row, name, problem)
            continue
        if failed:
            result.found("grading", "the grader hit its limit, or broke", item.row, name, harmful=False)
        graded[0] += 1
        graded[1] += score
        if score < args.success:
            graded[2] += 1
            truth = item.values["reward_model"]["ground_truth"]
            detail = f"reward {score:g}; expected {str(truth)[:60]!r}, the text ends {_tail(item)!r}"
            result.found(
                "rejected", "demonstrations that the reward function does not count as solved", item.row, name, detail
            )


def _tail(item: _Item) -> str:
    text = item.text if item.text is not None else _said(item.demo.content)
    return text[-60:]


def _judge(result: Result, args: argparse.Namespace) -> None:
    """What is bearable in small numbers, and what no demonstration at all means."""
    for check in ("unusable: too_long", "rejected", "contradiction", "prompt length"):
        finding = result.findings.get(check)
        whole = result.rows if check in ("contradiction", "prompt length") else result.demonstrations
        if finding is not None:
            finding.harmful = finding.count > args.tolerance * max(whole, 1)
    if result.without:
        message = "questions without a demonstration keep their rollouts"
        finding = result.findings.setdefault("without", Finding("without", message, False))
        finding.count = result.without
        if result.without == result.rows:
            finding.harmful, finding.message = True, "no question has a demonstration"
            finding.examples = [{"file": result.file, "row": 0, "field": args.demo_key or "target", "detail": ""}]
    if result.rows and not result.usable and not any(f.harmful for f in result.findings.values()):
        result.found("nothing usable", "no demonstration can be trained on", 0, args.demo_key or "target")
