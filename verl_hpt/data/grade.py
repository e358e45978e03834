"""The run's reward function, called as verl calls it, by `verl-hpt data check`."""

import asyncio
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_hpt.data.advice import grader_overrides
from verl_hpt.errors import UserError

_RUN_CODE = ("codecontests", "apps", "codeforces", "taco")  # verl's scorer executes these answers
NOT_RUN = "verl's default scorer would run the answer's code, and the check does not"
Grade = Callable[[str, str, Any, dict], tuple[float | None, str, bool]]


def load_reward(reward: str | None, kwargs: dict) -> Grade | None:
    """A function (source, text, truth, extra_info) → (score or None, problem, grading failed); None for `none`.

    reward: `shipped` (None is the same), `verl`, `none`, or PATH[:FUNCTION].
    """
    if reward == "none":
        return None
    if reward is None or reward == "shipped":
        from verl_hpt.reward import compute_score as function

        kwargs = {"workers": max(2, os.cpu_count() or 2), **kwargs}
    elif reward == "verl":
        function = verls_default()
    else:
        path, _, name = reward.partition(":") if not Path(reward).is_file() else (reward, "", "")
        function = _function(path, name or "compute_score")

    def grade(source: str, text: str, truth: Any, info: dict) -> tuple[float | None, str, bool]:
        if reward == "verl" and source in _RUN_CODE:
            return None, NOT_RUN, False
        try:
            call = {"data_source": source, "solution_str": text, "ground_truth": truth, "extra_info": info, **kwargs}
            value = function(**call)
            if inspect.isawaitable(value):
                value = asyncio.run(_awaited(value))
            failed = bool(value.get("grading_failed")) if isinstance(value, dict) else False
            score = float(value["score"] if isinstance(value, dict) else value)
        except (Exception, SystemExit) as error:  # the user's own code: its words, not ours
            return None, f"{type(error).__name__}: {str(error)[:200]}", False
        return (score, "", failed) if math.isfinite(score) else (None, f"the reward is {score}", False)

    return grade


def verls_default() -> Callable:
    """What a run without `reward.custom_reward_function.path` grades with; raises `UserError` without verl."""
    try:
        from verl.utils.reward_score import default_compute_score
    except ImportError as error:
        raise UserError(f"--reward verl: verl cannot be imported: {error}") from None
    return default_compute_score


def default_notes(samples: dict[str, list[tuple[str, Any, dict]]], success: float) -> list[str]:
    """What verl's default scorer makes of a few demonstrations (text, truth, extra_info) of each data source."""
    try:
        grade, lines, mend = load_reward("verl", {}), [], False
    except UserError as error:
        return [f"verl's default scorer could not be tried: {error}"]
    for source, demos in sorted(samples.items()):
        if source in _RUN_CODE:
            lines.append(f"{source}: not tried, it runs the code of the answer")
            continue
        graded = [grade(source, *demo) for demo in demos]
        right = sum(score is not None and score >= success for score, *_ in graded)
        problem = next((problem for score, problem, _ in graded if score is None), "")
        mend |= right < len(demos)
        unknown = "it does not know this data source and raises NotImplementedError: every rollout would stop the run"
        failed = f"it fails: {problem}"
        result = f"it counts {right} of the first {len(demos)} demonstrations as solved"
        words = unknown if problem.startswith("NotImplementedError") else failed if problem else result
        lines.append(f"{source}: {words}")
    if mend:
        lines.append("to grade with the shipped grader, as here: " + " ".join(grader_overrides()))
    return [f"verl's default scorer, which a run uses that names no reward: {line}" for line in lines[:1]] + lines[1:]


async def _awaited(value):
    return await value


def _function(path: str, name: str):
    if not Path(path).is_file():
        raise UserError(f"--reward {path}: no such file; give PATH.py or PATH.py:FUNCTION, `shipped`, `verl` or `none`")
    spec = importlib.util.spec_from_file_location("verl_hpt_checked_reward", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--reward {path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise UserError(f"--reward {path}: importing it fails: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, name, None)):
        functions = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v)) or "none"
        raise UserError(f"--reward {path}: has no function {name}; it has: {functions}")
    return getattr(module, name)
