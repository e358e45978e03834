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

from verl_hpt.data.grade import load_reward
from verl_hpt.data.options import check_options, json_option
from verl_hpt.data.questions import Questions, form_problem
from verl_hpt.data.read import BadRow, count_rows, file_kind, read_rows
from verl_hpt.data.render import Renderer, difference
from verl_hpt.data.result import Finding, Result
from verl_hpt.data.rows import CHAT_KEYS, DEMO_KEYS, PROMPT_KEYS, Layout, Options, detect, opened, to_verl
from verl_hpt.demos import encode as D
from verl_hpt.demos.read import read

_BATCH = 256  # rows graded and tokenised together
_AS_TEXT = {*CHAT_KEYS, *PROMPT_KEYS, *DEMO_KEYS, "reward_model"}  # fields that convert reads where they hold JSON text
_EXAMPLES = 5  # shown of each finding; the JSON has up to a hundred


def run_check(args: argparse.Namespace) -> int:
    """Check the file and report; 0 where nothing would hurt training, else 1. Raises `BadRow` or `UserError`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # without it, a warning at every grader process
    check_options(args)
    with contextlib.redirect_stdout(sys.stderr if args.json == "-" else sys.stdout):  # a grader may print
        result = check(args)
    from verl_hpt.data.report import as_json, draw, text

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
        from verl_hpt.data.likelihood import Likelihood

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
    """One demonstration on its way through a batch, with its row and the tokens of its prompt."""

    row: int
    values: dict
    demo: D.Demo
    prompt: list[int] | None


def _check_batch(args, result, batch, columns, render, grade, threads, likely) -> None:
    """Every demonstration of some rows: usable or why not, its length, its reward."""
    demo_key, encoding, prompts = args.demo_key or "target", (None, None), {}
    if render is not None:
        encoding, prompts = render.encoding, _prompts(args, result, batch, render)
        batch = [(number, row) for number, row in batch if number in prompts]
    rows = [(row, prompts.get(number), row["prompt"]) for number, row in batch]
    items = []
    for (number, row), found in zip(batch, read(rows, "target", columns, *encoding), strict=True):
        if all(demo.content is None for demo in found):
            result.without += 1
            continue
        for demo in found:
            if demo.content is None:
                message = "nulls among a row's demonstrations (the others would be used)"
                result.found("null among", message, number, f"{demo_key}[{demo.index}]")
            else:
                items.append(_Item(number, row, demo, prompts.get(number)))
    result.demonstrations += len(items)
    usable = [item for item in items if _told(result, item, demo_key)]
    result.usable += len(usable)
    if render is None:
        result.lengths += [len(_said(item.demo)) for item in usable]
    else:
        _round_trips(result, usable, render, demo_key)
    if grade is not None:
        _grade(args, result, usable, grade, threads)
    for item in usable:
        if render is not None and len(result.rendered) < args.show:
            result.rendered.append(render.beside(item.row, item.prompt, item.demo.encoded))
        if args.model and len(likely) < args.model_rows:
            likely.append((item.prompt, item.demo.encoded))


def _told(result: Result, item: _Item, key: str) -> bool:
    """Whether the demonstration can be trained on; what there is to say of it is said."""
    demo = item.demo
    if demo.length is not None:
        result.lengths.append(demo.length)
    if demo.text is not None and opened({key: demo.text}, {key})[1]:
        message = "chat messages written as JSON text: they would be trained on literally"
        result.found("json text", message, item.row, _place(key, item), "`verl-hpt data convert` reads them")
    if demo.encoded is not None and "think_unclosed" in demo.encoded.warnings:
        message = "the prompt opens <think> and the demonstration never closes it"
        result.found("think", message, item.row, _place(key, item), harmful=False)
    if demo.bad is None:
        return True
    result.reasons[demo.bad.reason] += 1
    message = f"demonstrations: {D.REASONS[demo.bad.reason]}"
    result.found(f"unusable: {demo.bad.reason}", message, item.row, _place(key, item), demo.bad.detail)
    return False


def _place(key: str, item: _Item) -> str:
    return key if item.demo.index == 0 else f"{key}[{item.demo.index}]"


def _round_trips(result: Result, items: list[_Item], render: Renderer, key: str) -> None:
    for item, back in zip(items, render.texts([i.demo.encoded.ids for i in items]), strict=True):
        text = item.demo.text
        if text is not None and back != text and not render.special(text):
            message = "the tokenizer does not give the text back: it will be trained on as something else"
            result.found("round trip", message, item.row, _place(key, item), difference(text, back), harmful=False)


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


def _said(demo: D.Demo) -> str:
    """What the assistant says, as the reward function reads it."""
    if demo.text is not None:
        return demo.text
    return "\n".join(D.message_text(m) for m in D.plain(demo.content) if m.get("role", "assistant") == "assistant")


def _grade(args, result, items, grade, threads) -> None:
    """Rewards of a batch, in threads, as verl has it; the symbolic grader works in processes of its own."""

    def one(item: _Item) -> tuple[float | None, str, bool]:
        row = item.values
        info = {**(D.plain(row.get("extra_info")) or {}), "num_turns": 2, "rollout_reward_scores": {}}
        truth = row["reward_model"]["ground_truth"]
        return grade(row["data_source"], _said(item.demo), truth, info)

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
            detail = f"reward {score:g}; expected {str(truth)[:60]!r}, the text ends {_said(item.demo)[-60:]!r}"
            result.found(
                "rejected", "demonstrations that the reward function does not count as solved", item.row, name, detail
            )


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
