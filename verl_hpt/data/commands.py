"""`verl-hpt data`: convert datasets, check demonstrations before a GPU hour is spent, make evaluation sets."""

import argparse
import contextlib
import importlib
import json
import math
import sys

from verl_hpt.data.formats import FORMATS
from verl_hpt.demos.demonstration import COLUMNS
from verl_hpt.errors import UserError

# Numbers by option: the least that makes sense.
_LEAST = {"limit": 1, "repeat": 1, "max_response_length": 1, "max_prompt_length": 1, "model_rows": 1, "show": 0}


_GRADERS = "default: `shipped`, verl_hpt.reward; `verl`, what a run uses that names none"


def add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="parquet, JSONL, JSON, or owner/name[@config][:split]")
    add("out", metavar="OUT", help="parquet file to write")
    add("--format", choices=("auto", *FORMATS), default="auto", help="default: by the first row")
    add("--prompt-key", help="field of the question")
    add("--demo-key", help="field of the demonstrations (text, messages, or a list of either)")
    add("--answer-key", help="field of the expected answer, `a.b` for a nested one")
    add("--no-answer", action="store_true", help="write an empty expected answer where there is none: your own reward")
    add("--best-of-graded", action="store_true", help="of each row's demonstrations the first that the grader accepts")
    add("--reward", metavar="PATH[:FUNCTION]", help=f"the grader of --best-of-graded; {_GRADERS}")
    add("--data-source", help="data_source of all rows; it chooses the grader")
    add("--ability", help="ability of all rows; default: the row's own, else math")
    add("--system", help="system message to put before every prompt, in place of one that is there")
    add("--drop-system", action="store_true", help="drop the prompts' system messages")
    add("--suffix", default="", help="text to put after every question")
    add("--strip-calculator", action="store_true", help="drop GSM8K's <<48/2=24>> marks")
    add("--drop", action="append", default=[], metavar="NAME", help="leave a field out, `a.b` for a nested one")
    add("--as-text", action="append", default=[], metavar="NAME", help="write a field's values as JSON text")
    add("--several", action="store_true", help="a list of demonstrations in every row")
    add("--val", metavar="FILE", help="validation parquet: questions drawn by a hash of their text")
    add("--val-share", type=float, default=0.02, help="share of the questions that go there")
    add("--seed", type=int, default=0, help="seed of that draw")
    add("--limit", type=int, help="stop after so many rows")
    add("--skip-bad", action="store_true", help="leave bad rows out and count them; default: stop")
    instead = "every field is carried over by itself; --drop NAME leaves one out, --as-text NAME makes JSON text of one"
    add("--keep", type=_gone(instead), help=argparse.SUPPRESS)
    add("--peek", type=_gone("the columns' types come from all rows now: leave it out"), help=argparse.SUPPRESS)


def _gone(instead: str):
    def refuse(value: str):
        raise argparse.ArgumentTypeError(instead)

    return refuse


def add_eval_set(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT_DIR", help="folder for one parquet a file")
    add("inputs", nargs="+", metavar="FILE", help="JSON with `prompt` and `answer`, as in the paper's seven")
    add("--system", help="system message to put before every question")
    add("--suffix", help="text after every question (default: asks for \\boxed{}; '' for none)")
    add("--repeat", type=int, default=1, help="write every question so many times, for avg@k")


def add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="parquet or JSONL, as verl reads it or not yet converted")
    add("--tokenizer", metavar="PATH", help="render and tokenise as training does")
    reward = f"the run's reward function; {_GRADERS}; `none` to grade nothing"
    add("--reward", metavar="PATH[:FUNCTION]", help=reward)
    add("--reward-kwargs", type=_json_object, default={}, metavar="JSON", help="its reward_kwargs")
    add("--val", metavar="FILE", action="append", default=[], help="look for its questions in FILE")
    add("--max-prompt-length", type=int, help="tokens, as data.max_prompt_length")
    add("--model", metavar="PATH", help="mean log-likelihood of demonstrations under this model")
    add("--model-rows", type=int, default=64, help="of so many demonstrations")
    add("--prompt-key", help="default: prompt")
    add("--demo-key", help="default: target")
    for name, column in COLUMNS.items():
        option = name.replace("_", "-") if "_" in name else f"demo-{name}"  # "--reward" is the reward function
        add(f"--{option}-key", dest=f"column_{name}", metavar="COLUMN", help=column.meaning)
    add("--answer-key", help="field of the expected answer, for files not yet converted")
    _add_rendering(parser)
    add("--success", type=float, default=1.0, help="reward that counts as solved, as hpt.gate.success")
    tolerance = "share too long, rejected or contradicting that is only a warning"
    add("--tolerance", type=float, default=0.01, help=tolerance)
    add("--show", type=int, default=1, metavar="N", help="demonstrations to show token for token")
    add("--limit", type=int, help="check the first so many rows")
    add("--json", metavar="OUT", help="the whole result for machines; - for standard output")
    add("--report", metavar="PNG", help="the picture")


def add_likelihood(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="IN", help="parquet as verl reads it (`data convert` makes it)")
    add("out", metavar="OUT", help="parquet file to write: IN and one more column")
    add("--model", metavar="PATH", required=True, help="frozen model; GRAPE: the one to be trained")
    add("--tokenizer", metavar="PATH", help="default: the model's")
    add("--column", default="log_likelihood", help="name of the column, as hpt.demo.log_likelihood")
    add("--prompt-key", default="prompt")
    add("--demo-key", default="target")
    _add_rendering(parser)
    add("--device", help="torch device; default: the GPU where there is one")


def _add_rendering(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-response-length", type=int, help="tokens, as data.max_response_length")
    kwargs = "data.apply_chat_template_kwargs"
    add("--template-kwargs", type=_json_object, default={}, metavar="JSON", help=kwargs)
    add("--eos", help="id or text of the EOS token, as hpt.demo.eos; default: the tokenizer's")


def _json_object(text: str) -> dict:
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"must be a JSON object, got {text[:80]!r}")


# name: its module's `run`, its options, what it does
COMMANDS = {
    "convert": ("convert", add_convert, "to the parquet that verl reads, in a stream"),
    "eval-set": ("evalset", add_eval_set, "question/answer files to verl's validation parquet"),
    "check": ("check", add_check, "what would happen to every demonstration; exit 1 if training is harmed"),
    "likelihood": ("likelihood", add_likelihood, "a column of log-likelihoods, for demo.select=likelihood"),
}


def main(argv: list[str]) -> int:
    """Run one of the commands; exit status 0: fine, 1: the check found harm, 2: wrong use, damaged input."""
    parser = argparse.ArgumentParser(prog="verl-hpt data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, add_options, what) in COMMANDS.items():
        add_options(commands.add_parser(name, help=what))
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    for stream in (sys.stdout, sys.stderr):  # names of fields may hold what the terminal has no letter for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_numbers(args)
        return importlib.import_module(f"verl_hpt.data.{COMMANDS[args.command][0]}").run(args)
    except UserError as error:
        print(f"verl-hpt data {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def check_numbers(args: argparse.Namespace) -> None:
    """Raise `UserError` for numbers that make no sense, all of them at once."""
    values, problems = {name: value for name, value in vars(args).items() if value is not None}, []
    for name, least in _LEAST.items():
        if values.get(name, least) < least:
            problems.append(f"--{name.replace('_', '-')} must be {least} or more, got {values[name]}")
    if not 0 < values.get("val_share", 0.5) < 1:
        problems.append(f"--val-share must lie between 0 and 1, got {args.val_share:g}")
    if not 0 <= values.get("tolerance", 0) <= 1:
        problems.append(f"--tolerance is a share, from 0 to 1, got {args.tolerance:g}")
    if not math.isfinite(values.get("success", 0)):
        problems.append(f"--success must be a finite number, got {args.success}")
    if problems:
        raise UserError("; ".join(problems))
