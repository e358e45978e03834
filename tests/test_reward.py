"""Graders: right on real answers, bounded on hostile ones, the same by path and by name."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from made_data import EVAL, eval_set, gsm8k

from verl_hpt import reward

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2.0  # seconds, in the tests of hostile answers


def score(source, solution, truth, **kwargs):
    return reward.compute_score(source, solution, truth, {}, **kwargs)["score"]


def test_gsm8k_worked_solutions_all_score_one():
    rows = gsm8k() + gsm8k("test")
    wrong = [r for r in rows if score("openai/gsm8k", r["answer"], r["answer"].rpartition("####")[2].strip()) != 1.0]
    assert wrong == []


def test_gsm8k_solutions_do_not_score_on_another_question():
    rows = gsm8k()[:2000]
    truths, compared = [r["answer"].rpartition("####")[2].strip() for r in rows], 0
    for row, own, other in zip(rows, truths, truths[1:], strict=False):
        if float(own.replace(",", "")) != float(other.replace(",", "")):
            assert score("openai/gsm8k", row["answer"], other) == 0.0
            compared += 1
    assert compared > 0.9 * len(rows)


@pytest.mark.parametrize("name", EVAL)
def test_expected_answers_in_a_box_score_one(name):
    """The share is 100% in each file, and without any help from comparing the texts."""
    for question in eval_set(name):
        answer = reward.unboxed(question["answer"])
        solution = f"First we think. Hence the answer is \\boxed{{{answer}}}."
        assert score(name, solution, question["answer"]) == 1.0, answer
        if name != "gpqa":
            assert reward.pool().grade(solution, answer, 30.0)["score"] == 1.0, answer


def test_wrong_answers_score_zero():
    for name in ("aime24", "aime25", "amc23"):
        for question in eval_set(name):
            wrong = float(reward.unboxed(question["answer"])) + 1
            assert score(name, f"It is \\boxed{{{wrong:g}}}.", question["answer"]) == 0.0


@pytest.mark.parametrize(
    ("solution", "truth", "expected"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("so \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("first \\boxed{3}, then \\boxed{4}", "4", 1.0),
        ("first \\boxed{4}, then \\boxed{3}", "4", 0.0),
        ("so \\boxed{62.5\\%}", "62.5", 1.0),
        ("so \\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        ("no answer at all", "4", 0.0),
        ("", "4", 0.0),
        ("so \\boxed{2}", ["1", "2"], 1.0),
        ("so \\boxed{2}", np.array(["1", "2"], dtype=object), 1.0),
        ("so \\boxed{2}", 2, 1.0),
    ],
)
def test_math_verify_compares_values(solution, truth, expected):
    assert score("math", solution, truth) == expected


@pytest.mark.parametrize(
    ("solution", "truth", "expected"),
    [
        ("#### 1,234", "1234", 1.0),
        ("#### $1,234.00", "1234", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 72 clips\nand more", "72", 1.0),
        ("#### 72/2", "72", 0.0),
        ("#### 7", "72", 0.0),
        ("#### 1\n#### 2", "2", 1.0),
        ("72", "72", 0.0),
        ("so \\boxed{72}", "72", 1.0),
        ("#### ", "72", 0.0),
        ("####", "0", 0.0),
    ],
)
def test_hash_answers(solution, truth, expected):
    assert score("openai/gsm8k", solution, truth) == expected


@pytest.mark.parametrize(
    ("boxed", "expected"), [("D", 1), ("(D)", 1), ("\\text{D}", 1), ("D. because", 1), ("d", 0), ("Dog", 0), ("A", 0)]
)
def test_multiple_choice_takes_the_letter(boxed, expected):
    assert score("gpqa", f"so \\boxed{{{boxed}}}", "D") == expected


def test_exact_match_is_exact():
    assert score("x", " 12 ", "12", grader="exact_match") == 1.0
    assert score("x", "so \\boxed{12}", "12", grader="exact_match") == 1.0
    assert score("x", "12.0", "12", grader="exact_match") == 0.0


def test_graders_can_be_chosen_by_name_and_by_source():
    assert score("mine", "#### 5", "5", graders={"mine": "hash_answer"}) == 1.0
    with pytest.raises(ValueError, match=r"unknown grader 'nonsense'.*math_verify"):
        score("mine", "5", "5", grader="nonsense")


def test_result_is_always_finite_with_the_same_keys():
    for solution in ("x", "", None, float("nan"), 5, "\\boxed{", "#### nan", "\\boxed{nan}", "\\boxed{\\infty}"):
        for truth in ("1", None, float("nan"), "", [], "nan", "\\infty", {"a": 1}):
            for source in ("openai/gsm8k", "math", "gpqa", None):
                result = reward.compute_score(source, solution, truth)
                assert set(result) == {"score", "acc", "grading_failed"}
                assert all(isinstance(v, float) and math.isfinite(v) for v in result.values())


HOSTILE = [
    "9**9**9**9",
    "\\boxed{9^{9^{9^9}}}",
    "\\boxed{10^{10^{10^{10}}}!}",
    "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "\\boxed{\\prod_{i=1}^{10^9} i}",
]


def test_hostile_expressions_cost_at_most_the_limit_and_never_the_run():
    """In threads, as verl calls it, where an alarm cannot be set; then the pool still grades."""
    assert score("math", "\\boxed{1}", "1.0", timeout=30.0) == 1.0  # the processes are up

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda text: reward.compute_score("math", text, "5", timeout=LIMIT), HOSTILE))
    assert results == [{"score": 0.0, "acc": 0.0, "grading_failed": 1.0}] * len(HOSTILE)
    assert score("math", "\\boxed{\\frac{2}{4}}", "0.5", timeout=30.0) == 1.0


def test_limit_holds_once_a_process_is_up():
    pool = reward.Pool(1, 2048)
    pool.grade("\\boxed{1}", "1", 30.0)
    reply = pool.grade("9**9**9**9", "5", 1.0)  # without a limit it would take longer than the universe has
    assert reply["score"] == 0.0 and reply["error"]
    pool.close()


def test_memory_blow_up_ends_in_its_own_process():
    """The limit holds in the grader's process, and after an expression of a billion digits the pool still grades."""
    code = "from verl_hpt import reward_worker as w; w._limit_memory(512); bytearray(2**30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().endswith("MemoryError")
    pool = reward.Pool(1, 300)
    reply = pool.grade("\\boxed{10^{10^{8}} \\cdot 10^{10^{8}} + 7^{10^{8}}}", "5", 5.0)
    assert reply["score"] == 0.0 and reply["error"]
    assert pool.grade("\\boxed{0.5}", "0.5", 30.0) == {"score": 1.0}
    pool.close()


def test_killed_process_is_replaced():
    pool = reward.Pool(1, 2048)
    assert pool.grade("\\boxed{0.5}", "\\frac{1}{2}", 30.0) == {"score": 1.0}
    os.kill(pool._idle[0].process.pid, signal.SIGKILL)
    pool._idle[0].process.wait()
    assert pool.grade("\\boxed{0.5}", "\\frac{1}{2}", 30.0) == {"score": 1.0}
    pool.close()


def test_many_threads_share_few_processes():
    with ThreadPoolExecutor(16) as threads:
        jobs = [threads.submit(score, "math", f"\\boxed{{\\frac{{{2 * i}}}{{2}}}}", str(i)) for i in range(100)]
    assert [job.result() for job in jobs] == [1.0] * 100
    assert len(reward.pool()._idle) <= reward.WORKERS


def test_so_many_open_boxes_are_passed_over_and_no_more():
    """A text of nothing else must not cost its length squared: the box before them is out of reach."""
    assert reward.last_boxed("\\boxed{" * 100_000) is None
    within = "\\boxed{1} " + "\\boxed{" * (reward._BOX_TRIES - 1)
    assert reward.last_boxed(within) == "1" and reward.last_boxed(within + "\\boxed{") is None


def test_works_when_imported_by_path_in_a_thread():
    """As `reward.custom_reward_function.path` does: under another name, away from the package."""
    spec = importlib.util.spec_from_file_location("custom_module_1234", ROOT / "verl_hpt" / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = []
    call = dict(data_source="math", solution_str="\\boxed{\\frac{1}{2}}", ground_truth="0.5", extra_info={})
    thread = threading.Thread(target=lambda: results.append(module.compute_score(**call)))
    thread.start()
    thread.join(60)
    assert results == [{"score": 1.0, "acc": 1.0, "grading_failed": 0.0}]
