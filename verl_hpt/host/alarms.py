"""Alarms: what the metrics of a run look like when it goes wrong, and what to set.

Each is judged from a step's metrics alone, said once in the log, and stands in every step's metrics as
``hpt/alarm/<name>``: 1 while it holds, else 0. The one public record of HPT on a modern verl ended in such a way:
rollouts that were cut at the length limit counted as solved, and the model learned to answer early and never stop.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from verl_hpt.errors import UserError
from verl_hpt.gate import solved

if TYPE_CHECKING:  # `verl-hpt report` reads the table below and needs no torch
    from verl_hpt.plan import PlanSettings, Question

logger = logging.getLogger(__name__)

FILE = "hpt_alarms.json"
PREFIX = "hpt/alarm/"
REFERENCE_STEPS = 5  # the first steps of a run, whose mean length and entropy later ones are compared with


class Alarm(NamedTuple):
    """steps: how many in a row it must hold; says: what it means; remedy: what to set."""

    steps: int
    says: str
    remedy: str


ALARMS = {
    "truncated_success": Alarm(
        3,
        "more than a quarter of the rollouts that reach gate.success were cut at the length limit: the reward pays "
        "answers that never end",
        "keep hpt.gate.finished=true, set hpt.rollouts.truncated=unsolved or mask, or data.max_response_length higher",
    ),
    "all_truncated": Alarm(
        5,
        "every rollout is cut at the length limit: none can count as solved",
        "set data.max_response_length higher; check that the model's stop tokens are those of its chat template; or "
        "set hpt.gate.finished=false where your agent loop always fills the limit",
    ),
    "length": Alarm(
        3,
        "rollouts are more than twice as long as in the first steps, and more than half of them are cut",
        "set hpt.rollouts.truncated=unsolved or mask, look at what the reward pays, lower the learning rate",
    ),
    "entropy": Alarm(
        3,
        "the policy's entropy is more than twice that of the first steps and 1 nat above it",
        "set actor.entropy_coeff to 0, keep the clip range, lower the learning rate or hpt.demo_coef",
    ),
    "clipped": Alarm(
        5,
        "more than 30% of the rollouts' tokens are clipped: the policy moves too far in one update",
        "lower the learning rate or actor.ppo_epochs, or set a larger actor.ppo_mini_batch_size",
    ),
    "all_demos": Alarm(
        20,
        "every question trains on its demonstration, step after step: no reinforcement takes place",
        "look at hpt/solve_rate; set hpt.gate.success to what your reward pays, or take easier questions",
    ),
    "never_solved": Alarm(
        20,
        "no rollout of a data source has ever reached gate.success",
        "set hpt.gate.success (or the source's own in hpt.per_source) to what your reward pays for a right answer, or "
        "hpt.gate.metric to what says so",
    ),
    "one_signal": Alarm(
        5,
        "rollouts and demonstrations both train, and more than 99% of the gradient comes from one of them",
        "set hpt.demo_coef higher or lower; hpt/demo_to_rl_weight is the ratio of their weights",
    ),
}


class Alarms:
    """The alarms of a run: how long each has held, and what the first steps looked like.

    scheduled: whether every question trains on its demonstration at a step because the settings say so.
    """

    def __init__(self, scheduled: Callable[[int], bool] = lambda step: False):
        self.scheduled = scheduled
        self.held = dict.fromkeys(ALARMS, 0)
        self.announced: set[str] = set()
        self.first: dict[str, list[float]] = {"length": [], "entropy": []}
        self.best: dict[str, tuple[float, float]] = {}  # source -> (largest score, gate.success)

    def watch(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Judge one step; each alarm that goes off is said once. Returns the metrics of the alarms."""
        holds = self._holds(step, metrics)
        for name, (patience, says, remedy) in ALARMS.items():
            self.held[name] = self.held[name] + 1 if holds[name] else 0
            if self.held[name] >= patience and name not in self.announced:
                self.announced.add(name)
                detail = self._unsolved() if name == "never_solved" else f"{patience} steps in a row"
                logger.warning("alarm %s at step %d: %s (%s). To mend it, %s", name, step, says, detail, remedy)
        streak = {"hpt/all_demo_streak": float(self.held["all_demos"])}
        return streak | {PREFIX + name: float(self.held[name] >= ALARMS[name].steps) for name in ALARMS}

    def scored(self, questions: Sequence[Question], settings: PlanSettings) -> None:
        """Take in the largest score that each data source's rollouts reached at a step."""
        for question in questions:
            if len(question.scores):
                largest, success = float(question.scores.max()), settings.gate_of(question.source).success
                before, _ = self.best.get(question.source, (largest, success))
                self.best[question.source] = (max(before, largest), success)

    def _holds(self, step: int, metrics: Mapping[str, float]) -> dict[str, bool]:
        def of(name: str) -> float:
            return metrics.get(name, 0.0)

        cut, demos = of("hpt/truncated_share"), metrics.get("hpt/gradient_share/demos")
        both = of("hpt/rows/rollouts") > 0 and of("hpt/rows/demos") > 0
        grown = {
            "length": self._grown("length", metrics.get("hpt/response_length"), 2.0, 0.0),
            "entropy": self._grown("entropy", metrics.get("actor/entropy"), 2.0, 1.0),
        }
        return {
            "truncated_success": of("hpt/truncated_success_share") > 0.25,
            "all_truncated": cut == 1,
            "length": grown["length"] and cut > 0.5,
            "entropy": grown["entropy"],
            "clipped": of("hpt/clip_share/rollouts") > 0.3,
            "all_demos": of("hpt/demo_share") == 1 and not self.scheduled(step),
            "never_solved": bool(self._unsolved()),
            "one_signal": both and demos is not None and not 0.01 <= demos <= 0.99,
        }

    def _grown(self, name: str, now: float | None, factor: float, at_least: float) -> bool:
        """Whether a number has grown beyond what the first steps had; takes it in while these last."""
        if now is None:
            return False
        first = self.first[name]
        if len(first) < REFERENCE_STEPS:
            first.append(float(now))
            return False
        start = sum(first) / len(first)
        return now > factor * start and now > start + at_least

    def _unsolved(self) -> str:
        """The data sources of which no rollout has reached its own threshold, with the best score of each."""
        return "; ".join(
            f"{source or 'all rows'}: best {best:g}, gate.success {success:g}"
            for source, (best, success) in sorted(self.best.items())
            if not solved([best], success)[0]
        )

    def save(self, folder: str) -> None:
        """Write what later steps are judged by into a checkpoint's folder."""
        os.makedirs(folder, exist_ok=True)
        state = {"held": self.held, "said": sorted(self.announced), "first": self.first, "best": self.best}
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
            json.dump(state, file)

    def load(self, folder: str) -> None:
        """Take it from a checkpoint's folder; one without it starts anew.

        Raises:
            UserError: the file is damaged; names it.
        """
        path = os.path.join(folder, FILE)
        if not os.path.exists(path):
            return
        try:
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            self.held = {name: int(state["held"].get(name, 0)) for name in ALARMS}
            self.announced = set(state["said"])
            self.first = {name: [float(x) for x in state["first"][name]] for name in self.first}
            self.best = {source: (float(best), float(success)) for source, (best, success) in state["best"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error!r}); delete it to let the alarms start anew") from error
