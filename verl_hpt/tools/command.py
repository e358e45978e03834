"""From the user's command to the trainings that it starts: read directly, or by running a launch script.

A script runs with stand-ins for Python and for launchers (`stand_in.py`), which note every call and run no trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from verl_hpt.errors import UserError
from verl_hpt.tools import stand_in

MAIN = "verl.trainer.main_ppo"
LIMIT = 60  # seconds that a launch script gets
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_OVERRIDE = re.compile(r"[+~]{0,2}(actor_rollout_ref|algorithm|critic|data|hpt|reward|reward_model|trainer)\.[\w.]+=?")
_PASSES_ON = re.compile(r"\$[@*]|\$\{[@*]|^\s*(source|\.)\s", re.MULTILINE)  # what it sources may pass them on
_SHELLS = ("bash", "sh", "zsh", "dash")


@dataclass(frozen=True)
class Call:
    """A training that would be started: its entry point (a module, or a file), its arguments, and where."""

    entry: str
    arguments: list[str]
    cwd: str
    env: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Launch:
    """What a command would start. others: calls that were noted and not run; notes: what the script itself did."""

    calls: list[Call]
    others: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    script: str | None = None


def read(command: Sequence[str], limit: float = LIMIT) -> Launch:
    """The trainings that a command would start.

    Raises:
        UserError: no command, no training of verl's in it, or a script that cannot be run or starts none.
    """
    if not command:
        raise UserError("no command; write it after `--`: verl-hpt check-run -- python -m verl.trainer.main_ppo ...")
    env, command = dict(os.environ), list(command)
    while command and (_ASSIGNMENT.match(command[0]) or command[0] == "env"):  # (env) NAME=value python -m ...
        name, assigned, value = command.pop(0).partition("=")
        env |= {name: value} if assigned else {}
    found = training(command)
    if found is not None:
        return Launch([Call(*found, os.getcwd(), env)])
    script = _script(command)
    if script is None:
        raise UserError(
            f"`{shlex.join(command)}` starts no training of verl's: give the command itself (python -m {MAIN} ...) or "
            "a launch script (bash run.sh ...)"
        )
    return _run(command, script, env, limit)


def training(argv: Sequence[str]) -> tuple[str, list[str]] | None:
    """Entry point and arguments of the training in a command, however it is wrapped (torchrun, ray job submit, uv)."""
    modules = [i + 1 for i, word in enumerate(argv[:-1]) if word == "-m"]
    files = [i for i, word in enumerate(argv) if word.endswith(".py") and "=" not in word]
    for at in sorted(modules, key=lambda at: argv[at] != MAIN) + files:
        entry, rest = argv[at], list(argv[at + 1 :])
        if entry.endswith("verl/trainer/main_ppo.py"):
            entry = MAIN
        if entry == MAIN or any(map(_OVERRIDE.match, rest)):
            # quickstart_task.py run DIR -- python -m verl.trainer.main_ppo: the training is the inner command
            return training(rest) or (entry, rest) if entry != MAIN else (entry, rest)
    for word in argv:  # bash -c "python -m verl.trainer.main_ppo ..." within ssh, srun or ray job submit
        if " " in word and "verl" in word:
            try:
                return training(shlex.split(word))
            except ValueError:
                continue
    return None


def _script(command: Sequence[str]) -> str | None:
    """The file of a command that runs a shell script; None for any other command."""
    words = iter(command)
    if Path(command[0]).name in _SHELLS:
        next(words)
    for word in words:
        if word == "-c" and Path(command[0]).name in _SHELLS:
            return word
        if word.startswith("-"):
            continue
        if not Path(word).is_file():
            raise UserError(f"{word}: no such file, and no command that starts a training of verl's")
        return word if command[0] != word or os.access(word, os.X_OK) or word.endswith(".sh") else None
    return None


def _run(command: list[str], script: str, env: dict[str, str], limit: float) -> Launch:
    """Run a launch script with stand-ins; what it would have started."""
    if command[0] == script:
        command = [os.path.abspath(script), *command[1:]]
        command = command if os.access(script, os.X_OK) else ["bash", *command]
    notes = []
    with tempfile.TemporaryDirectory(prefix="verl_hpt_check_run_") as folder:
        calls, output = Path(folder, "calls.jsonl"), Path(folder, "output")
        calls.touch()
        env |= stand_in.install(os.path.join(folder, "stand_ins"), str(calls), sys.executable, env)
        with open(output, "w") as file:
            try:
                process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            except OSError as error:
                raise UserError(f"{command[0]}: cannot be run: {error.strerror}") from None
            try:
                status = process.wait(limit)
                if status:
                    notes.append(f"{script} ended with status {status}")
            except subprocess.TimeoutExpired:
                notes.append(f"{script} did not end within {limit:g} s and was stopped")
            finally:  # what the script left in the background too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        noted = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]
        last = output.read_text(errors="replace").strip().splitlines()[-5:]
    found, others = [], []
    for call in noted:
        inner = training(call["argv"])
        if inner is None:
            others.append(shlex.join(call["argv"]))
        else:
            found.append(Call(*inner, call["cwd"], _without(folder, call["env"])))
    if not found:
        raise UserError(
            "\n  ".join(
                [f"{script} starts no training of verl's, run with stand-ins for Python and launchers"]
                + [*notes, *(f"not run: {other[:300]}" for other in others)]
                + [f"its last lines: {last[0]}", *last[1:]] * bool(last)
            )
        )
    if notes:
        notes[0] += ", after the training that is checked here: what follows needs what a real one leaves behind"
    return Launch(found, others, notes, script)


def _without(folder: str, env: Mapping[str, str]) -> dict[str, str]:
    """The environment as the script set it, without what leads to the stand-ins."""
    env = {name: value for name, value in env.items() if name not in stand_in.OWN}
    for name in ("PATH", "PYTHONPATH"):
        parts = [part for part in env.get(name, "").split(os.pathsep) if part and not part.startswith(folder)]
        env[name] = os.pathsep.join(parts)
    return env


def lost(launch: Launch, command: Sequence[str]) -> tuple[str | None, str | None]:
    """How a launch script does not hand its arguments on to verl. -> (overrides lost, that none would arrive)"""
    if launch.script is None or launch.script == "-c":
        return None, None
    after = list(command)[list(command).index(launch.script) + 1 :]
    overrides = [word for word in after if _OVERRIDE.match(word)]
    gone = [word for word in overrides if not any(word in call.arguments for call in launch.calls)]
    where = f'{launch.script}: add "$@" at the end of its `python -m {MAIN} ...`, or write the overrides there'
    if gone:
        return (
            f"{shlex.join(gone)} {'is' if len(gone) == 1 else 'are'} lost: not in the command that is run. {where}",
            None,
        )
    if not overrides and not _PASSES_ON.search(Path(launch.script).read_text(errors="replace")):
        return None, f"arguments of the script do not reach verl. To add overrides, edit {where}"
    return None, None
