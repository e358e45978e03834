"""Grader processes: what they are asked and answer, what ends them, who replaces them, and what long solutions keep."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from verl_hpt import reward, reward_worker

GREETING = "import json, os, signal, sys, time\nprint(json.dumps({'ready': True}), flush=True)\n"
ECHO = GREETING + "for line in sys.stdin:\n    print(json.dumps({'score': 1.0, 'pid': os.getpid()}), flush=True)\n"
# In place of math-verify, which takes seconds to import: does what the solution says.
PRETENDER = """
import os, sys
class LatexExtractionConfig:
    def __init__(self, **settings): pass
ExprExtractionConfig = LatexExtractionConfig
parsed = []
def verify(gold, answer, **settings):
    return gold == answer
def parse(text, *args, **settings):
    if "warm" in text and not parsed: raise KeyError
    parsed.append(text)
    print("noise"); os.write(1, b"noise")
    for error in (MemoryError, RecursionError, ZeroDivisionError):
        if error.__name__ in text: raise error("told to")
    if "read" in text and sys.stdin.read(): raise EOFError
    if "config" in text: import config
    while "hang" in text: pass
    return [text.removeprefix("\\\\boxed{").removesuffix("}")]
"""


@pytest.fixture
def started(monkeypatch):
    """The processes that are started; the test ends those that it leaves."""
    popen, processes = reward.subprocess.Popen, []

    def start(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(reward.subprocess, "Popen", start)
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def stand_in(tmp_path, monkeypatch, started):
    """Puts another script in the place of the worker's."""
    monkeypatch.setattr(reward, "__file__", str(tmp_path / "reward.py"))
    return lambda code: (tmp_path / "reward_worker.py").write_text(code, encoding="utf-8")


@pytest.fixture
def pretended(tmp_path, monkeypatch, started):
    """A pool of one real worker process over a pretended math-verify."""
    (tmp_path / "math_verify.py").write_text(PRETENDER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return reward.Pool(1, 1000)


def ended(process) -> bool:
    return process.poll() is not None and process.stdin.closed and process.stdout.closed


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time\ntime.sleep(60)", "no answer within 0.4 s"),
        ("import sys\nsys.exit(3)", "the process ended"),
        ("print('Welcome!', flush=True)\nimport time\ntime.sleep(60)", "it wrote b'Welcome!' instead of an answer"),
    ],
)
def test_a_process_that_does_not_start_is_ended_and_the_error_says_what_to_check(
    code, why, stand_in, started, monkeypatch
):
    stand_in(code)
    monkeypatch.setattr(reward, "_START_TIMEOUT", 0.4 if "0.4" in why else 30.0)
    pool = reward.Pool(1, 321)
    for attempt in (1, 2):
        with pytest.raises(RuntimeError) as caught:
            pool.grade("5", "5", 30.0)
        assert str(caught.value) == (
            "the grader process does not start: check that `python -c 'import math_verify'` works "
            f"with {sys.executable}, and that 321 MB are enough ({why})"
        )
        assert len(started) == attempt and all(ended(process) for process in started) and not pool._idle
    stand_in(ECHO)
    monkeypatch.setattr(reward, "_START_TIMEOUT", 30.0)
    assert pool.grade("5", "5", 30.0)["score"] == 1.0


def test_a_start_may_take_minutes():
    assert reward._START_TIMEOUT == 300.0


def test_whatever_else_goes_wrong_at_the_start_ends_the_process_too(stand_in, started, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    stand_in("import time\ntime.sleep(60)")
    monkeypatch.setattr(reward._Worker, "_exchange", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reward.Pool(1, 100).grade("5", "5", 30.0)
    assert [ended(process) for process in started] == [True]


def test_the_request_the_limits_and_the_environment_reach_the_process(stand_in, started, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setenv("REWARD_TEST", "kept")
    names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "REWARD_TEST"
    stand_in(
        f"{GREETING}\nfor line in sys.stdin:\n"
        "    print('x' * 10**6, file=sys.stderr)\n"  # nobody reads it: it must not fill a pipe
        f"    told = sys.argv[1:], json.loads(line), [os.environ[n] for n in {names}]\n"
        "    print(json.dumps(told), flush=True)\n"
    )
    told = reward.Pool(1, 321).grade("so\n½ \ud800", "½", 2.5)
    assert told == [["321"], {"solution": "so\n½ \ud800", "truth": "½", "limit": 2.5}, ["1", "1", "kept"]]


def test_long_requests_and_answers_in_pieces_come_whole(stand_in):
    stand_in(
        f"{GREETING}\nfor line in sys.stdin:\n"
        "    answer = json.dumps({'score': 0.0, 'length': len(json.loads(line)['solution']), 'back': 'b' * 10**6})\n"
        "    print(answer[:7], end='', flush=True); time.sleep(0.1); print(answer[7:], flush=True)\n"
    )
    pool = reward.Pool(1, 100)
    for size in (10**6, 3):
        assert pool.grade("a" * size, "1", 30.0) == {"score": 0.0, "length": size, "back": "b" * 10**6}


@pytest.mark.parametrize(
    ("work", "why"),
    [
        ("time.sleep(60)", "no answer within 1.05 s"),
        ("sys.exit(0)", "the process ended"),
        ("print('nonsense', flush=True)", "it wrote b'nonsense' instead of an answer"),
        ("sys.stdin.close(); os.close(0); time.sleep(60)", "no answer within 1.05 s"),
    ],
)
def test_a_process_that_fails_at_work_is_ended_told_and_replaced(work, why, stand_in, started):
    pool = reward.Pool(1, 100)
    stand_in(f"{GREETING}\nfor line in sys.stdin:\n    {work}")
    assert pool.grade("5", "5", 0.05) == {"score": 0.0, "error": why}
    assert [ended(process) for process in started] == [True]
    stand_in(ECHO)
    assert pool.grade("5", "5", 30.0) == {"score": 1.0, "pid": started[1].pid}


def test_the_limit_holds_while_a_process_reads_nothing(stand_in, started):
    stand_in(GREETING + "time.sleep(20)")
    reply = reward.Pool(1, 100).grade("a" * 10**6, "5", 0.05)  # more than a pipe holds
    assert reply == {"score": 0.0, "error": "no answer within 1.05 s"}
    assert started[0].returncode == -signal.SIGKILL  # it has not come to its own end
    stand_in(GREETING + "os.close(0); time.sleep(5)")
    worker = reward._Worker(100)
    time.sleep(0.3)
    with pytest.raises(reward._Died, match=r"^the process ended$"):
        worker.grade("a" * 10**6, "5", 0.05)


def test_a_process_has_a_second_on_top_of_the_limit_to_end_itself(stand_in):
    stand_in(f"{GREETING}\nfor line in sys.stdin:\n    time.sleep(0.3)\n    print('[5]', flush=True)")
    assert reward.Pool(1, 100).grade("5", "5", 0.05) == [5]


def test_an_interrupted_call_ends_its_process_and_frees_its_place(stand_in, started, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    stand_in(ECHO)
    pool = reward.Pool(1, 100)
    with monkeypatch.context() as patch:
        patch.setattr(reward._Worker, "grade", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.grade("5", "5", 30.0)
    assert [ended(process) for process in started] == [True]
    assert pool.grade("5", "5", 30.0) == {"score": 1.0, "pid": started[1].pid}


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_processes_than_workers_and_idle_ones_are_used_again(workers, stand_in, started):
    stand_in(ECHO.replace("    print(", "    time.sleep(0.05)\n    print("))
    pool = reward.Pool(workers, 100)
    with ThreadPoolExecutor(6) as threads:
        told = list(threads.map(lambda _: pool.grade("5", "5", 30.0)["pid"], range(12)))
    assert {process.pid for process in started} == set(told) and len(started) == len(pool._idle) == workers
    pool.close()
    assert all(ended(process) for process in started) and not pool._idle


def test_a_process_killed_while_idle_is_replaced_and_its_pipes_are_closed(stand_in, started):
    stand_in(ECHO)
    pool = reward.Pool(1, 100)
    pool.grade("5", "5", 30.0)
    os.kill(started[0].pid, signal.SIGKILL)
    os.waitid(os.P_PID, started[0].pid, os.WEXITED | os.WNOWAIT)
    assert pool.grade("5", "5", 30.0) == {"score": 1.0, "pid": started[1].pid} and ended(started[0])


def test_a_pool_for_each_process_and_size_and_a_childs_end_leaves_the_parents_alone(stand_in, started, monkeypatch):
    at_exit = []
    monkeypatch.setattr(reward.atexit, "register", at_exit.append)
    monkeypatch.setattr(reward, "_pools", {})
    stand_in(ECHO)
    mine = reward.pool(2, 100)
    assert mine is reward.pool(2, 100) and reward.pool() is reward.pool(2, 2048) is not mine
    assert len({id(pool) for pool in (mine, reward.pool(1, 100), reward.pool(2, 101))}) == 3
    mine.grade("5", "5", 30.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert reward.pool(2, 100) is not mine
        mine.close()  # as at a forked child's end
    assert started[0].poll() is None and len(mine._idle) == 1
    assert at_exit[0] == mine.close and len(at_exit) == 5
    mine.close()
    assert ended(started[0])


# --- the worker's own side --------------------------------------------------------------------------------------------


def test_errors_are_answered_by_name_and_only_an_empty_memory_ends_the_process(pretended, started):
    def grade(solution):
        return pretended.grade(solution, "5", 30.0)

    assert grade("5") == {"score": 1.0} and grade("6") == {"score": 0.0}
    assert grade("RecursionError") == {"score": 0.0, "error": "nested too deeply"}
    assert grade("ZeroDivisionError") == {"score": 0.0, "error": "ZeroDivisionError"}
    assert grade("read") == {"score": 0.0}  # no library waits for a request of ours
    assert grade("config") == {"score": 0.0, "error": "ModuleNotFoundError"}  # our folder shadows nobody's modules
    os.kill(started[0].pid, signal.SIGINT)  # Ctrl-C goes to the whole group; the parent decides
    assert grade("5") == {"score": 1.0} and len(started) == 1
    assert grade("MemoryError") == {"score": 0.0, "error": "out of memory"}
    assert started[0].wait(30) == 0
    assert grade("5") == {"score": 1.0} and len(started) == 2


def test_an_alarm_ends_the_process_at_the_limit_and_none_outlives_its_request(pretended, started):
    assert pretended.grade("5", "5", 0.2) == {"score": 1.0}
    with pytest.raises(reward.subprocess.TimeoutExpired):
        started[0].wait(0.5)
    assert pretended.grade("5", "5", 30.0) == {"score": 1.0} and len(started) == 1
    worker = pretended._idle[0]
    assert pretended.grade("hang", "5", 0.2) == {"score": 0.0, "error": "the process ended"}
    assert worker.process.returncode == -signal.SIGALRM


def test_the_alarm_works_where_the_parent_ignores_it(pretended, started):
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)  # a child inherits that
    try:
        assert pretended.grade("hang", "5", 0.2) == {"score": 0.0, "error": "the process ended"}
    finally:
        signal.signal(signal.SIGALRM, before)
    assert started[0].returncode == -signal.SIGALRM


def test_the_first_request_finds_everything_imported(pretended):
    assert pretended.grade("warm", "warm", 30.0) == {"score": 1.0}


def test_platforms_without_limits_go_without(monkeypatch):
    def refuse(which, limits):
        asked.append((which, limits))
        raise errors.pop()

    import resource

    asked, errors = [], [ValueError("above the hard limit"), OSError("not allowed")]
    monkeypatch.setattr(resource, "setrlimit", refuse)
    reward_worker._limit_memory(3)
    reward_worker._limit_memory(3)
    assert asked == [(resource.RLIMIT_AS, (3 * 2**20, 3 * 2**20))] * 2
    monkeypatch.setitem(sys.modules, "resource", None)
    reward_worker._limit_memory(3)
    assert len(asked) == 2


def test_memory_and_core_files_are_limited(pretended, started):
    pretended.grade("5", "5", 30.0)
    limits = Path(f"/proc/{started[0].pid}/limits").read_text(encoding="ascii")
    found = {line[:25].strip(): line[25:].split()[:2] for line in limits.splitlines()}
    assert found["Max address space"] == [str(1000 * 2**20)] * 2 and found["Max core file size"] == ["0", "0"]


def test_the_process_ends_with_its_parents_end_of_the_pipe(pretended, started):
    pretended.grade("5", "5", 30.0)
    pretended._idle[0].process.stdin.close()
    assert started[0].wait(30) == 0


# --- math-verify itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solution", "truth", "expected"),
    [
        ("so \\boxed{62.5\\%}", "62.5", 1.0),
        ("so \\boxed{62.5}", "62.5 \\%", 1.0),
        ("so \\boxed{\\frac{1}{2}\\%}", "0.5%", 1.0),
        ("so \\boxed{62.5\\%}", "62.4", 0.0),
        ("so \\boxed{5\\%}", "50", 0.0),
        ("\\boxed{3} and then 4", "3", 1.0),
        ("\\boxed{3} and then 4", "4", 0.0),
        ("it is 4", "4", 1.0),
        ("$\\frac{2}{4}$", "0.5", 1.0),
        ("\\boxed{\\frac{2}{4}}", "$0.5$", 1.0),
        ("nothing", "5", 0.0),
        ("", "5", 0.0),
        ("\\boxed{5}", "", 0.0),
    ],
)
def test_math_verifys_verdict(solution, truth, expected):
    assert reward_worker.grade(solution, truth) == expected


@pytest.mark.parametrize(
    ("given", "truth"),
    [
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("x+1", "1+x"),
        ("(1,2)", "(1, 2)"),
        ("\\pi", "\\pi"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("[0,1)", "[0, 1)"),
        ("y=2x+1", "y = 1+2x"),
    ],
)
def test_an_expected_answer_is_read_as_latex_though_no_dollars_stand_around_it(given, truth):
    """As the numbers alone that stand in it, every one of these would be wrong."""
    assert reward_worker.grade(f"so \\boxed{{{given}}}", truth) == 1.0
    assert reward_worker.grade("so \\boxed{7}", truth) == 0.0


def test_percent_signs_go_only_behind_a_number():
    assert reward_worker._PERCENT.sub("", "5% 5\\% 5 \\% {5}% x% % \\%") == "5 5 5 {5} x% % \\%"


def grade(solution, truth):
    return reward.compute_score("math", solution, truth, timeout=30.0)


RIGHT = {"score": 1.0, "acc": 1.0, "grading_failed": 0.0}
WRONG = {"score": 0.0, "acc": 0.0, "grading_failed": 0.0}
THOUGHT = "Then we add 3 and 4, which is 7. "  # numbers that are not the answer


@pytest.mark.parametrize(
    "solution",
    [
        THOUGHT * 400 + "So \\boxed{\\frac{2}{4}}.",
        "So \\boxed{\\frac{2}{4}}. " + THOUGHT * 400,
        THOUGHT * 200 + "So \\boxed{\\frac{2}{4}}. " + THOUGHT * 200,
        "So \\boxed{0.50}. " + THOUGHT * 200 + "We gave 0.50 away. " + THOUGHT * 9,  # the same text later, in no box
        "So \\boxed{" + " " * 5000 + "\\frac{2}{4}}",
        THOUGHT * 200 + "So \\boxed{\\frac{2}{4}" + " " * 5000 + "}" + THOUGHT * 200,
        THOUGHT * 400 + "So it is $\\frac{2}{4}$",
    ],
    ids=["end", "start", "middle", "twice", "longer", "longer in the middle", "no box"],
)
def test_the_answer_of_a_long_solution_is_found(solution):
    assert len(solution) > reward._TAIL
    assert grade(solution, "0.5") == RIGHT
    assert grade(solution, "7") == WRONG


def ticks(process) -> int:
    """Processor time that a process has used, in clock ticks."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_until_at_work(processes) -> None:
    before = [ticks(process) for process in processes]
    for _ in range(600):
        time.sleep(0.1)
        if all(ticks(process) > was + 10 for process, was in zip(processes, before, strict=True)):
            return
    pytest.fail("the processes do not work")


def test_two_graders_killed_at_work_cost_their_answers_alone(monkeypatch):
    pool, both = reward.Pool(2, 2048), threading.Barrier(2)
    monkeypatch.setattr(reward, "pool", lambda *size: pool)
    half = "\\boxed{\\frac{1}{2}}"

    def one(solution):
        both.wait()
        return reward.math_verify("math", solution, "0.5", timeout=60.0)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(one, [half, half])) == [RIGHT, RIGHT]
        processes = [worker.process for worker in pool._idle]
        assert len(processes) == 2
        hard = threads.map(one, ["9**9**9**9", "\\boxed{\\prod_{i=1}^{10^9} i}"])
        wait_until_at_work(processes)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        assert list(hard) == [{"score": 0.0, "acc": 0.0, "grading_failed": 1.0}] * 2
        assert all(ended(process) for process in processes) and not pool._idle
        assert list(threads.map(one, [half, "\\boxed{\\frac{1}{3}}"])) == [RIGHT, WRONG]
        replaced = [worker.process for worker in pool._idle]
        assert len({process.pid for process in [*processes, *replaced]}) == 4
        for process in replaced:  # both while idle
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert list(threads.map(one, [half, half])) == [RIGHT, RIGHT]
    pool.close()


def test_each_thread_gets_its_own_answer_from_two_processes():
    cases = [(f"\\boxed{{\\frac{{{2 * i}}}{{4}}}}", f"{i / 2 if i % 3 else i + 1}") for i in range(1, 61)]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda case: grade(*case), cases))
    assert got == [RIGHT if i % 3 else WRONG for i in range(1, 61)]
    assert len(reward.pool()._idle) <= 2
