"""``verl-hpt check-run -- COMMAND``: what a verl command would do under hpt, before a GPU hour is spent.

COMMAND starts the run: ``python -m verl.trainer.main_ppo ...``, or a launch script with its arguments. Its config
is composed and validated as verl does, refusals and banner are those of training, then come the options that are dead
or mean something else under hpt, then ``verl-hpt data check`` on the run's own files. A launch script is run, with
stand-ins for Python and for launchers, so that nothing is trained, installed or downloaded. No GPU, no model weights.

Exit status: 0 fine, 1 something would hurt training, 2 refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Iterator

from verl_hpt.errors import UserError
from verl_hpt.tools import command


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="verl-hpt check-run",
        description=__doc__,
        usage="verl-hpt check-run [OPTIONS] -- COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--no-data", action="store_true", help="leave the run's files alone")
    parser.add_argument("--limit", type=int, help="check the first so many rows of each file")
    parser.add_argument("--tokenizer", metavar="PATH", help="in place of the run's model.path")
    parser.add_argument("--reward", metavar="PATH[:FUNCTION]", help="in place of the run's reward function; or `none`")
    parser.add_argument(
        "--timeout", type=float, default=command.LIMIT, metavar="S", help="seconds that a launch script gets"
    )
    try:
        options = parser.parse_args(argv[:split])
    except SystemExit as stop:
        return int(stop.code or 0)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be 1 or more, got {options.limit}")
    words = argv[split + 1 :]
    launch = command.read(words, options.timeout)
    lost, closed = command.lost(launch, words)
    if lost is not None:
        print(f"HARM: {lost}")
    for text in [*launch.notes, *([] if closed is None else [closed])]:
        print(f"note: {text}")
    for other in launch.others:
        print(f"not run: {textwrap.shorten(other, 200)}")
    worst = 0 if lost is None else 1
    for number, call in enumerate(launch.calls, start=1):
        if len(launch.calls) > 1:
            print(f"\n=== training {number} of {len(launch.calls)} ===")
        with _as_if_started(call):
            worst = max(worst, _checked(call, launch, options))
    return worst


@contextlib.contextmanager
def _as_if_started(call: command.Call) -> Iterator[None]:
    """The folder, the environment and the import path that the training would have; nothing is downloaded."""
    before, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    try:
        os.environ.clear()
        os.environ.update({**call.env, "HF_HUB_OFFLINE": "1"})
        os.chdir(call.cwd)
        sys.path[:0] = [call.cwd, *filter(None, call.env.get("PYTHONPATH", "").split(os.pathsep))]
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(folder)
        sys.path[:] = path


def _checked(call: command.Call, launch: command.Launch, options: argparse.Namespace) -> int:
    """Check one training and tell; the exit status that it alone would have."""
    try:
        harms = list(_told(call, launch, options))
    except UserError as error:
        sys.stdout.flush()
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(harms)} thing(s) here would hurt training" if harms else "\nnothing here would hurt training")
    return 1 if harms else 0


def _told(call: command.Call, launch: command.Launch, options: argparse.Namespace) -> Iterator[str]:
    """Print what becomes of the training; yields what would hurt it."""
    from verl_hpt.host import launch as host  # imports verl, which takes seconds
    from verl_hpt.host.changes import changes

    problem = host.entry_problem(call.entry)
    if problem is not None:
        raise UserError(problem)
    config, base = host.compose(call.arguments), host.base_config(call.arguments)
    estimator = config.algorithm.adv_estimator
    if config.trainer.val_only:
        print("trainer.val_only=True: nothing is trained, and hpt takes no part")
        return
    if estimator != "hpt":
        print(f"{host.ESTIMATOR} is {estimator}: hpt takes no part in this command. It is checked as if {host.SWITCH}")
        print("were added to it.")
        config.algorithm.adv_estimator = "hpt"
    fatal, misspelt = host.added(call.arguments, base)
    run, banner, notes = host.build(config, fatal)
    print(banner)
    harms = [f"{text}; nothing reads it as it is" for text in misspelt]
    table = list(changes(config, base, run, estimator))
    if any(not change.harm for change in table):
        print("\nUnder hpt:")
    for change in (change for change in table if not change.harm):
        print(f"  {change.option}")
        print(f"      {change.meaning}")
    harms += [f"{change.option}: {change.meaning}" for change in table if change.harm]
    harms += _data(config, run, launch, options)
    print()
    for text in harms:
        print(f"HARM: {text}")
        yield text
    for text in notes:
        print(f"note: {text}")


def _data(config, run, launch: command.Launch, options: argparse.Namespace) -> list[str]:
    """Print `data check` of the run's files; what of it would hurt training."""
    from verl_hpt.tools import run_data

    if options.no_data:
        return []
    harms, made = [], [other for other in launch.others if not other.startswith(("ray ", "sleep "))]
    for key, file in run_data.missing_files(config, run):
        if made or "://" in file:
            print(f"\nnot checked: {key}: {file} is not on this machine")
        else:
            harms.append(f"{key}: {file}: no such file on this machine (--no-data leaves files alone)")
    for text, hurts in run_data.check_data(config, run, options):
        print(f"\n{text}")
        harms += ["the training data, see above"] if hurts else []
    return harms
