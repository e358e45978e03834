"""The options of `verl-hpt data check`, and what is wrong with them before any work is done."""

import argparse
import json
import math
import os
from pathlib import Path

from verl_hpt.errors import UserError


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="parquet or JSONL, as verl reads it or not yet converted")
    parser.add_argument("--tokenizer", metavar="PATH", help="render and tokenise as training does")
    parser.add_argument(
        "--reward",
        metavar="PATH[:FUNCTION]",
        help="the run's reward function; default: `shipped`, verl_hpt.reward; `none` to grade nothing",
    )
    parser.add_argument("--reward-kwargs", default="{}", metavar="JSON", help="its reward_kwargs")
    parser.add_argument("--val", metavar="FILE", action="append", default=[], help="look for its questions in FILE")
    parser.add_argument("--max-response-length", type=int, help="tokens, as data.max_response_length")
    parser.add_argument("--max-prompt-length", type=int, help="tokens, as data.max_prompt_length")
    parser.add_argument("--model", metavar="PATH", help="mean log-likelihood of demonstrations under this model")
    parser.add_argument("--model-rows", type=int, default=64, help="of so many demonstrations")
    parser.add_argument("--prompt-key", help="default: prompt")
    parser.add_argument("--demo-key", help="default: target")
    parser.add_argument("--demo-reward-key", help="column with each demonstration's own reward")
    parser.add_argument("--teacher-log-prob-key", help="column with a teacher's log-prob for each token")
    parser.add_argument("--token-weights-key", help="column with a weight for each token")
    parser.add_argument("--log-likelihood-key", help="column with each demonstration's mean log-likelihood")
    parser.add_argument("--other-log-prob-key", help="column with the same under other models, as method poft reads")
    parser.add_argument("--demo-source-key", help="column with each demonstration's own source")
    parser.add_argument("--answer-key", help="field of the expected answer, for files not yet converted")
    parser.add_argument("--template-kwargs", default="{}", metavar="JSON", help="data.apply_chat_template_kwargs")
    parser.add_argument("--eos", help="id or text of the EOS token, as hpt.demo.eos; default: the tokenizer's")
    parser.add_argument("--success", type=float, default=1.0, help="reward that counts as solved, as hpt.gate.success")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="share too long, rejected or contradicting that is only a warning"
    )
    parser.add_argument("--show", type=int, default=1, metavar="N", help="demonstrations to show token for token")
    parser.add_argument("--limit", type=int, help="check the first so many rows")
    parser.add_argument("--json", metavar="OUT", help="the whole result for machines; - for standard output")
    parser.add_argument("--report", metavar="PNG", help="the picture")


def check_options(args: argparse.Namespace) -> None:
    """Numbers that make no sense, and outputs that cannot be written or would overwrite an input, before any work."""
    for name in ("limit", "max_response_length", "max_prompt_length", "model_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if args.show < 0:
        raise UserError(f"--show must be 0 or more, got {args.show}")
    if not 0 <= args.tolerance <= 1:
        raise UserError(f"--tolerance is a share, from 0 to 1, got {args.tolerance:g}")
    if not math.isfinite(args.success):
        raise UserError(f"--success must be a finite number, got {args.success}")
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


def json_option(name: str, text: str) -> dict:
    """A JSON object given on the command line; raises `UserError` for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} must be a JSON object, got {text[:80]!r}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object, got {text[:80]!r}")
    return value
