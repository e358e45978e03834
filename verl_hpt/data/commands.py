"""`verl-hpt data`: convert datasets, check demonstrations before a GPU hour is spent, make evaluation sets."""

import argparse
import sys

from verl_hpt.errors import UserError


def main(argv: list[str]) -> int:
    """Run one of the commands; exit status 0: fine, 1: the check found harm, 2: wrong use, damaged input."""
    from verl_hpt.data.convert import add_convert, add_eval_set, run_convert, run_eval_set

    parser = argparse.ArgumentParser(prog="verl-hpt data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_convert(commands.add_parser("convert", help="to the parquet that verl reads, in a stream"))
    add_eval_set(commands.add_parser("eval-set", help="question/answer files to verl's validation parquet"))
    from verl_hpt.data.check import run_check
    from verl_hpt.data.options import add_check

    add_check(
        commands.add_parser("check", help="what would happen to every demonstration; exit 1 if training is harmed")
    )
    from verl_hpt.data.likelihood import add_likelihood, run_likelihood

    add_likelihood(commands.add_parser("likelihood", help="a column of log-likelihoods, for demo.select=likelihood"))
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    run = {"convert": run_convert, "eval-set": run_eval_set, "check": run_check, "likelihood": run_likelihood}
    try:
        return run[args.command](args)
    except UserError as error:
        print(f"verl-hpt data {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
