"""Stands for Python and for launchers while `check-run` runs a launch script: notes each call and runs no trainer.

It is met in three ways, so that none is missed: as the program of that name that is first on PATH; as a bash function,
which a script's own PATH cannot hide; and as the `sitecustomize` of any Python that starts by another way (an absolute
path, a virtual environment, console scripts such as `torchrun`). Before each command bash puts the stand-ins first on
PATH and PYTHONPATH again, where the script has set them anew. Inline code (`python -c`, standard input) does run: a
script reads what it prints. So do the script's other commands, but for those that remove, move or end something.
Standard library only, and of Python 3.8, since the script's Python may be another.
"""

import json
import os
import sys

CALLS, PYTHON = "VERL_HPT_CALLS", "VERL_HPT_PYTHON"  # environment: the file of calls; the Python that runs inline code
OWN = (CALLS, PYTHON, "BASH_ENV")
PYTHONS = ("python", "python3")
LAUNCHERS = (
    "torchrun", "ray", "uv", "accelerate", "deepspeed", "mpirun", "srun", "sbatch", "docker", "ssh", "conda", "sudo",
    "pip", "pip3", "apt-get", "git", "wget", "curl", "hf", "huggingface-cli", "verl-hpt", "sleep",
    "rm", "rmdir", "mv", "ln", "dd", "truncate", "kill", "pkill", "killall", "scp", "rsync", "aws", "gsutil",
)  # fmt: skip
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


_LEAD = """set -o functrace
trap 'case "$PATH" in "{bin}":*) ;; *) PATH="{bin}:$PATH" ;; esac
case "${{PYTHONPATH-}}" in "{folder}"|"{folder}":*) ;; *) export PYTHONPATH="{folder}:${{PYTHONPATH-}}" ;; esac' DEBUG
"""


def runs_inline(arguments):
    """Whether Python with these arguments runs code of the command line or of standard input, or none at all."""
    rest = iter(arguments)
    for argument in rest:
        if argument in _WITH_VALUE:
            next(rest, None)
        elif argument.startswith("-m") or not argument.startswith("-"):
            return False
        elif argument == "-" or (argument.endswith("c") and not argument.startswith("--")):  # -c, -uc
            return True
    return True


def note(program, arguments):
    """Write the call down, with the folder and the environment that it would have run in."""
    call = {"argv": [program, *arguments], "cwd": os.getcwd(), "env": dict(os.environ)}
    with open(os.environ[CALLS], "a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def main(program, arguments):
    if program in PYTHONS and runs_inline(arguments):
        python = os.environ[PYTHON]
        os.execv(python, [python, *arguments])
    note(program, arguments)


def install(folder, calls, python, env):
    """Make the programs, the functions and the `sitecustomize` in a folder. -> what of env changes to lead to them."""
    os.makedirs(os.path.join(folder, "bin"))
    functions = []
    for name in (*PYTHONS, *LAUNCHERS):
        program = os.path.join(folder, "bin", name)
        with open(program, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\nexec "{python}" -S "{os.path.abspath(__file__)}" {name} "$@"\n')
        os.chmod(program, 0o755)
        functions.append(f'{name}() {{ "{program}" "$@"; }}\n')
    startup = env.get("BASH_ENV")
    with open(os.path.join(folder, "functions.sh"), "w", encoding="utf-8") as file:
        file.writelines([f'. "{startup}"\n'] if startup else [])
        file.writelines([*functions, "tee() { cat; }\n"])
        file.write("ulimit() { :; }\n")  # a limit that cannot be raised here ends many scripts
        file.write(_LEAD.format(bin=os.path.join(folder, "bin"), folder=folder))
    os.symlink(os.path.abspath(__file__), os.path.join(folder, "sitecustomize.py"))
    return {
        CALLS: calls,
        PYTHON: python,
        "PATH": os.pathsep.join([os.path.join(folder, "bin"), env.get("PATH", os.defpath)]),
        "BASH_ENV": os.path.join(folder, "functions.sh"),
        "PYTHONPATH": os.pathsep.join(filter(None, [folder, env.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
    }


def _of_this_process():
    """The arguments that this Python was started with, its own options included."""
    if hasattr(sys, "orig_argv"):
        return sys.orig_argv
    with open("/proc/self/cmdline", encoding="utf-8", errors="surrogateescape") as file:
        return file.read().split("\0")[:-1]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
elif __name__ == "sitecustomize" and CALLS in os.environ:
    _argv = _of_this_process()
    if not runs_inline(_argv[1:]):
        # A console script (torchrun, ray) is a file that Python runs: it is noted under its own name.
        _script = os.path.basename(_argv[1]) if len(_argv) > 1 else ""
        if _script in LAUNCHERS:
            note(_script, _argv[2:])
        else:
            note(_argv[0], _argv[1:])
        sys.stdout.flush()
        os._exit(0)
