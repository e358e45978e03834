"""Mutation test: changes one place of a module at a time and asks whether the tests notice. Run by hand, not in CI.

    pip install -e '.[mutation]'
    python tests/mutation/run.py                         # 25 mutants of every module in pyproject.toml
    python tests/mutation/run.py gate mixing --all       # every mutant of two modules
    python tests/mutation/run.py gate --again            # the survivors in the log once more, after new tests

Mutants are cosmic-ray's, by the operators named in ``operators.py``, and a few of our own. cosmic-ray starts a process
for each, which costs ten seconds of imports here; so one warm process imports torch and verl, without the plugin, and
forks a child for each mutant. The child works in a copy of the tree in which one module is mutated, and runs the tests
that ``[tool.verl_hpt.mutation]`` in pyproject.toml names for it (and ``tests/test_<its name>.py``), up to the first
failure, those that run the changed line first. Before a module's first mutant they run once unmutated: they must pass,
and their time gives the limit.

Results go to a file of JSON lines (``--log``); what is in it for the same mutated source is not run again. Survivors
that are accepted stand with their reason in ``accepted.toml``; they are reported apart and never count as killed.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from operators import OPERATORS, evaluated

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
MEMORY = 8 << 30  # bytes of data that a child may have: a mutant may append for ever
CRASHED = 70  # status of a child that did not come to its tests
NO_ANSWER = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED, CRASHED)
WARM = (
    "hydra", "matplotlib.pyplot", "numpy", "omegaconf", "pyarrow.parquet", "pytest", "tensordict", "transformers",
    "transformers.models.auto.tokenization_auto", "math_verify", "verl", "verl.trainer.ppo.core_algos",
    "verl.workers.config", "verl.workers.utils.losses", "verl.trainer.ppo.utils", "verl.utils.config",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One module with one place changed: line (from 1), the text of the changed lines before and after."""

    module: str
    operator: str
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha1(f"{self.module}\0{self.source}".encode()).hexdigest()


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies go
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["verl_hpt"]["mutation"]
    modules = options.modules or list(settings["tests"])
    tests = {module: tests_of(module, settings["tests"]) for module in modules}
    sample = [m for module in modules for m in mutants(module, None if options.all else options.per_module, options)]
    print(f"{len(sample)} mutants of {len(modules)} modules", flush=True)
    known = {}
    if options.log.exists():
        known = {r["key"]: r for r in map(json.loads, options.log.read_text(encoding="utf-8").splitlines())}
    pending = [m for m in sample if m.key not in known or (options.again and known[m.key]["outcome"] == "survived")]
    if pending and not options.report:
        options.log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder, options.log.open("a", encoding="utf-8") as log:
            for record in run(pending, tests, Path(folder), options):
                known[record["key"]] = record
                print(json.dumps(record), file=log, flush=True)
    return report([known[m.key] | {"line": m.line} for m in sample if m.key in known], modules)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="of verl_hpt; all of pyproject.toml's by default")
    parser.add_argument("--per-module", type=int, default=25, help="mutants drawn of each module (25)")
    parser.add_argument("--all", action="store_true", help="every mutant")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=1, choices=(1, 2))
    parser.add_argument("--log", type=Path, default=ROOT / "outputs/mutants.jsonl")
    parser.add_argument(
        "--covering", action="store_true", help="only tests that run the line: quicker, but survivors want --again"
    )
    parser.add_argument("--again", action="store_true", help="run the log's survivors once more")
    parser.add_argument("--report", action="store_true", help="run nothing, print what the log says of this sample")
    return parser.parse_args()


def tests_of(module: str, table: dict[str, list[str]]) -> list[str]:
    own = f"tests/test_{Path(module).name}.py"
    return list(dict.fromkeys([*([own] if (ROOT / own).exists() else []), *table.get(module, [])]))


# --- which mutants -------------------------------------------------------------------------------------------------


def mutants(module: str, number: int | None, options: argparse.Namespace) -> list[Mutant]:
    """A draw without repetition from all places where an operator applies; what does not compile is no mutant."""
    source = (ROOT / f"verl_hpt/{module}.py").read_text(encoding="utf-8")
    tree, places = get_ast(source), []
    for name, operator in OPERATORS.items():
        wanted = (evaluated(node) for node in ast_nodes(tree) for _ in operator.mutation_positions(node))
        places += [(name, operator, occurrence) for occurrence, here in enumerate(wanted) if here]
    random.Random(f"{options.seed} {module}").shuffle(places)
    drawn = {}
    for name, operator, occurrence in places:
        if len(drawn) == number:
            break
        mutated = mutate_code(source, operator, occurrence)
        try:
            compile(mutated, module, "exec", dont_inherit=True)
        except SyntaxError:
            continue
        if mutated != source:
            drawn.setdefault(mutated, Mutant(module, name, *difference(source, mutated), mutated))
    return sorted(drawn.values(), key=lambda m: m.line)


def difference(source: str, mutated: str) -> tuple[int, str, str]:
    """First line that differs, from 1, and the differing lines of both, stripped."""
    old, new = source.splitlines(), mutated.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    return start + 1, *("\n".join(x.strip() for x in lines[start : len(lines) - end]) for lines in (old, new))


# --- running them --------------------------------------------------------------------------------------------------


def run(pending: list[Mutant], tests: dict[str, list[str]], folder: Path, options: argparse.Namespace):
    """Yields a record for each mutant, as they end."""
    warm_up()
    copies = [copy_tree(folder / f"worker{i}") for i in range(options.workers)]
    for module in dict.fromkeys(m.module for m in pending):
        started = time.monotonic()
        lines = Lines(copies[0] / f"verl_hpt/{module}.py")
        _, status, used = os.wait4(start(copies[0], tests[module], lines), 0)
        took, cpu = time.monotonic() - started, used.ru_utime + used.ru_stime
        if status != 0:
            print(f"{module}: left out, its tests fail unmutated ({status}):\n{said(copies[0])[-1000:]}", flush=True)
            continue
        print(f"{module}: unmutated tests take {cpu:.1f} s of CPU, {took:.1f} s: {' '.join(tests[module])}", flush=True)
        seen = {int(line): names for line, names in json.loads((copies[0].parent / "lines").read_text()).items()}
        own = [m for m in pending if m.module == module]
        jobs = [(m, *chosen(seen.get(m.line, []), tests[module], options.covering)) for m in own]
        yield from run_module(jobs, copies, int(3 * cpu) + 10, 10 * took + 60)
    gc.unfreeze()


def chosen(names: list[str], tests: list[str], covering: bool) -> tuple[list[str], "First"]:
    """Test files for a mutant, and in which order: of all tests of its module, or of those that run its line."""
    only = covering and bool(names)
    return list(dict.fromkeys(name.split("::")[0] for name in names)) if only else tests, First(names, only)


def run_module(pending: list[tuple], copies: list[Path], cpu_limit: int, limit: float):
    """The same for mutants of one module, each with its tests.

    Limits in seconds: of CPU time, and a wide one of time, since the machine may be busy.
    """
    free, running, queue = list(copies), {}, pending[::-1]
    while queue or running:
        while queue and free:
            (mutant, tests, order), copy = queue.pop(), free.pop()
            write(copy, mutant.module, mutant.source)
            running[start(copy, tests, order, cpu_limit)] = (mutant, copy, time.monotonic())
        time.sleep(0.02)
        for pid, (mutant, copy, started) in list(running.items()):
            took = time.monotonic() - started
            ended, status, used = os.wait4(pid, os.WNOHANG)
            if not ended and took < limit:
                continue
            try:  # its own group: what it started and left behind ends too
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                assert ended, "a child that runs has a group"
            if not ended:
                _, _, used = os.wait4(pid, 0)
            if ended and os.WIFEXITED(status) and os.WEXITSTATUS(status) in NO_ANSWER:
                sys.exit(f"{mutant}: no test ran:\n{said(copy)[-3000:]}")
            late = not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
            outcome = "timeout" if late else "survived" if status == 0 else "killed"
            write(copy, mutant.module, (ROOT / f"verl_hpt/{mutant.module}.py").read_text(encoding="utf-8"))
            del running[pid]
            free.append(copy)
            fields = ("key", "module", "operator", "line", "before", "after")
            by = next((x for x in said(copy).splitlines() if x.startswith(("FAILED", "ERROR"))), "")
            record = {name: getattr(mutant, name) for name in fields}
            yield record | {"outcome": outcome, "by": by[:160], "cpu": round(used.ru_utime + used.ru_stime, 2)}


def write(copy: Path, module: str, source: str) -> None:
    """The module's source, without what was compiled of another (compared by length and second only)."""
    target = copy / f"verl_hpt/{module}.py"
    target.write_text(source, encoding="utf-8")
    for compiled in target.parent.glob(f"__pycache__/{target.stem}.*"):
        compiled.unlink()


def warm_up() -> None:
    """Imports what is not under test, in this process, once; no thread may run when it forks."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "VERL_USE_EXTERNAL_PLUGINS": "none"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow
    for name in WARM:
        __import__(name)
    import torch

    torch.set_num_threads(1)
    del os.environ["VERL_USE_EXTERNAL_PLUGINS"]
    assert not any(name.split(".")[0] == "verl_hpt" for name in sys.modules), "the code under test is loaded already"
    threads = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")]
    assert len(threads) == 1, f"threads do not survive a fork: {threads}"
    gc.freeze()


def copy_tree(to: Path) -> Path:
    """The working tree's own files; what is ignored stays behind. Beside it ``shared``, where the checkout has one."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.split(b"\0")):
        source, target = ROOT / os.fsdecode(name), to / "tree" / os.fsdecode(name)
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if (ROOT.parent / "shared").exists():
        (to / "shared").symlink_to(ROOT.parent / "shared")
    return to / "tree"


class Lines:
    """A pytest plugin: which tests run which lines of one file, written to the file ``lines`` beside the copy."""

    def __init__(self, file: Path):
        self.file, self.tests = file, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        lines = set()

        def line(frame, event, _):
            lines.add(frame.f_lineno)
            return line

        def call(frame, event, _):
            return line(frame, event, _) if frame.f_code.co_filename == str(self.file) else None

        threading.settrace(call)
        sys.settrace(call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            for number in lines:
                self.tests.setdefault(number, []).append(item.nodeid)

    def pytest_sessionfinish(self):
        package = next(folder for folder in self.file.parents if folder.name == "verl_hpt")
        (package.parents[1] / "lines").write_text(json.dumps(self.tests))


class First:
    """A pytest plugin: the tests that run the mutant's line first; with ``only``, they alone where there are any."""

    def __init__(self, names: list[str], only: bool):
        self.names, self.only = set(names), only

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: item.nodeid not in self.names)
        if self.only:  # a mutant may rename them all
            items[:] = [item for item in items if item.nodeid in self.names] or items


def start(copy: Path, tests: list[str], plugin: Lines | First, cpu_limit: int | None = None) -> int:
    """A child of this process that runs the tests in the copy. -> its pid, which is its process group too"""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive its parent
            for kind, limit in ((resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_CPU, cpu_limit)):
                if limit is not None:
                    resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
            child(copy, tests, plugin)
        finally:
            os._exit(CRASHED)  # never back into the parent's code
    return pid


def child(copy: Path, tests: list[str], plugin: Lines | First) -> None:
    log = os.open(copy.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if p != str(HERE))]
    try:
        import verl_hpt.plugin  # noqa: F401, verl would have loaded it
    except Exception as error:  # swallowed by verl as well
        print(f"the plugin does not load: {error!r}")
    loaded = Path(sys.modules["verl_hpt"].__file__)
    assert loaded.is_relative_to(copy), f"{loaded} is not the copy's"
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", f"--basetemp={copy.parent / 'tmp'}"]
    code = pytest.main([*options, *tests], plugins=[plugin])
    sys.stdout.flush()
    os._exit(int(code))


def said(copy: Path) -> str:
    return (copy.parent / "said").read_text(encoding="utf-8", errors="replace")


# --- what came out -------------------------------------------------------------------------------------------------


def report(records: list[dict], modules: list[str]) -> int:
    """Prints the table and the survivors. -> 0 where none survived without a reason"""
    accepted = tomllib.loads((HERE / "accepted.toml").read_text(encoding="utf-8")).get("accepted", [])
    reasons = {(a["module"], a["before"].strip(), a["after"].strip()): a["reason"] for a in accepted}
    for r in records:
        if r["outcome"] == "survived" and (r["module"], r["before"].strip(), r["after"].strip()) in reasons:
            r["outcome"] = "accepted"
    print(f"\n{'module':14} mutants  killed  timeout  survived  accepted  killed of all  of those not accepted")
    for name in [*modules, "all"]:
        count = Counter(r["outcome"] for r in records if name in (r["module"], "all"))
        dead, total = count["killed"] + count["timeout"], count.total()
        if total:
            rest = f"{dead / (total - count['accepted']):22.1%}" if total > count["accepted"] else f"{'–':>22}"
            print(f"{name:14} {total:7} {count['killed']:7} {count['timeout']:8} {count['survived']:9} "
                  f"{count['accepted']:9} {dead / total:14.1%} {rest}")  # fmt: skip
    for outcome in ("accepted", "survived"):
        found = [r for r in records if r["outcome"] == outcome]
        print(f"\n{outcome}: {len(found)}")
        for r in found:
            reason = reasons.get((r["module"], r["before"].strip(), r["after"].strip()), "")
            print(f"  verl_hpt/{r['module']}.py:{r['line']} {r['operator']}{': ' + reason if reason else ''}")
            print("".join(f"    {mark} {x}\n" for mark, text in (("-", r["before"]), ("+", r["after"]))
                          for x in text.splitlines()), end="")  # fmt: skip
    print(f"\n{sum(r['cpu'] for r in records) / 60:.1f} min of CPU time")
    return int(any(r["outcome"] == "survived" for r in records))


if __name__ == "__main__":
    sys.exit(main())
