"""The command line ``verl-hpt``. Each command is a module's ``main(argv)``, imported when it is called."""

from __future__ import annotations

import gc
import importlib
import sys

from verl_hpt import __version__
from verl_hpt.errors import UserError

COMMANDS = {
    "explain": ("tools.explain", "CASE.json: what a method does to a small batch, with no model"),
    "methods": ("tools.methods", "the table of methods with formulas and sources; --plot FILE draws weights"),
    "settings": ("tools.settings", "every key of hpt.*: default, meaning, what it may be; --json for machines"),
    "check-run": (
        "tools.check_run",
        "-- COMMAND: what a verl command or launch script would do under hpt, with no GPU",
    ),
    "doctor": ("tools.doctor", "check the installation; --ray also looks into a worker process"),
    "data": ("data.commands", "convert, check, likelihood, eval-set: demonstrations before a GPU hour"),
    "history": ("tools.history", "CHECKPOINT: questions taught, graduated, forgotten, never solved"),
    "report": ("tools.report", "RUN_DIR...: table, picture and summary of one or several runs"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([f"verl-hpt {__version__}", "usage: verl-hpt COMMAND ...", *lines, "verl-hpt COMMAND --help"])


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, what the command says, or 2 after a message for the user."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "--version"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"verl-hpt: unknown command {argv[0]!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        gc.disable()  # what imports make stays, and looking through it for garbage takes a fifth of their time
        command = importlib.import_module(f"verl_hpt.{COMMANDS[argv[0]][0]}").main
        gc.enable()
        return command(argv[1:]) or 0
    except UserError as error:
        print(f"verl-hpt {argv[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print(f"verl-hpt {argv[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
