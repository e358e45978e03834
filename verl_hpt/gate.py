"""The gate: does a question learn from its rollouts or from its demonstration? Every rule of that stands here.

HPT (arXiv 2509.04419, eq. 13): with P the share of a question's rollouts that the verifier accepts, imitate where
P ≤ γ, reinforce elsewhere. Counts are compared, not shares: a float share of 5 of 7 lies below 5/7.

``decide`` is called once a question and step, before demonstrations are read; ``settle`` once they are: a question that
has no usable one falls back there, and nowhere else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

EPSILON = 1e-9

# Coefficients (on, off, sft) by number solved of 8, the demonstration itself counted as one of them (HPT's published
# code, mix_trainer.py, soft_type 0). That code stores them and never reads them: what each multiplies is inferred.
SOFT_TABLE = (
    (1, 1, 1), (0, 0, 1), (0.125, 0.5, 0.5), (0.25, 1, 0.25), (0.5, 0.5, 0.125), (1, 0.25, 0), (1, 0.125, 0), (1, 0, 0),
    (1, 0, 0),
)  # fmt: skip


@dataclass(frozen=True)
class GateSettings:
    """γ as a share (threshold) or a count of rollouts; off: upper bound of the zone trained off-policy on the demo.

    count wins over threshold where it is set. success is the score from which a rollout counts as solved; finished: one
    that was cut at the length limit never does. soft is a table (on, off, sft) by number solved, or the name of a
    registered gate, used by methods whose ``when`` is "soft". function names a gate of the user's, kwargs its keyword
    arguments.
    """

    threshold: float = 0.0
    count: int | None = None
    success: float = 1.0
    off: float | None = None
    soft: tuple[tuple[float, float, float], ...] | str | None = None
    function: str | None = None
    finished: bool = True
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What one question trains on: factors on its rollouts, on its demonstrations' R terms and on their S terms.

    zone is "rl", "demo", "off", "both", "soft", "own", "collect", "keep" or "none", for metrics and for people.
    if_wrong: what it becomes where no demonstration that is shown counts as right.
    """

    zone: str
    on: float
    off: float
    sft: float
    if_wrong: Decision | None = field(default=None, compare=False, repr=False)

    @property
    def asks_for_demo(self) -> bool:
        """Whether the question's demonstrations must be read."""
        return self.zone != "own" and bool(self.off or self.sft or self.if_wrong or self.zone == "collect")


RL = Decision("rl", 1.0, 0.0, 0.0)
DEMO = Decision("demo", 0.0, 1.0, 1.0)
OFF = Decision("off", 0.0, 1.0, 0.0)
BOTH = Decision("both", 1.0, 1.0, 1.0)
OWN = Decision("own", 0.0, 0.0, 1.0)  # imitates its own correct rollout
COLLECT = Decision("collect", 1.0, 0.0, 0.0)  # its rollouts train, its demonstration goes to the buffer
KEEP = Decision("keep", 1.0, 0.0, 0.0)  # its rollouts train, its first correct one goes to the buffer
NOTHING = Decision("none", 0.0, 0.0, 0.0)


class Remembered(dict):
    """Numbers of a question's earlier draws, by the names of ``history.Record``."""

    def __missing__(self, name):
        raise KeyError(f"history has no {name!r}; it has {', '.join(self)}")


_NUMBERS = ("solved", "rollouts", "drawn", "failures", "uses", "drawn_at", "taught_at", "graduated")
NEVER_DRAWN = Remembered.fromkeys(_NUMBERS, 0)


@dataclass(frozen=True)
class Outcome:
    """What a gate knows of one question at one step.

    Attributes:
        rewards: (n,) verifier's score of each rollout that came back (failed sessions are not among them, nor rollouts
            that started from a demonstration).
        settings: the gate's, of the question's data source.
        scores: (n,) what ``gate.success`` is compared with (``hpt.gate.metric``); None: rewards.
        cut: (n,) bool, rollouts that were cut at the length limit and therefore never count; None: all count.
        history: numbers of earlier draws: ``drawn``, ``failures`` (in a row), ``uses`` (draws that trained on
            demonstrations), ``taught_at`` (step of the last), ``graduated``, … (``history.Record``).
    """

    rewards: np.ndarray
    settings: GateSettings
    scores: np.ndarray | None = None
    cut: np.ndarray | None = None
    history: Mapping[str, float] = field(default_factory=lambda: NEVER_DRAWN)

    @property
    def n(self) -> int:
        return len(self.rewards)

    @cached_property
    def correct(self) -> np.ndarray:
        """Which rollouts count as solved. -> (n,) bool"""
        scores = self.rewards if self.scores is None else self.scores
        return solved(scores, self.settings.success, self.cut)

    @cached_property
    def solved(self) -> int:
        return int(self.correct.sum())

    @property
    def rewarded(self) -> bool:
        """Whether a rollout has a score above 0, compared as in ``solved`` (SuperRL's rule)."""
        above = np.asarray(self.rewards, dtype=np.float32) > 0
        return bool((above if self.cut is None else above & ~self.cut).any())


GATES: dict[str, Callable[..., Decision]] = {}


def register_gate(function: Callable[..., Decision]):
    """Register a gate of your own under its function's name, for ``hpt.gate.function``, or for ``hpt.gate.soft`` where
    the method is ``hpt_soft`` (module in ``hpt.modules``).

    It gets an ``Outcome``, and ``hpt.gate.kwargs`` as keyword arguments; or (solved, n, settings) where it takes three
    arguments. It returns a Decision, as ``decide`` does::

        @register_gate
        def rarely_solved(outcome, at_most=1):
            return DEMO if outcome.solved <= at_most else RL
    """
    if GATES.get(function.__name__, function).__module__ != function.__module__:
        raise ValueError(f"gate {function.__name__!r} is already registered: choose another name")
    GATES[function.__name__] = function
    return function


@register_gate
def linear(outcome: Outcome) -> Decision:
    """P on the rollouts, 1 − P on the demonstration's S term, P the share solved."""
    share = outcome.solved / max(outcome.n, 1)
    return Decision("soft", share, 0.0, 1 - share)


@register_gate
def cosine(outcome: Outcome) -> Decision:
    """As ``linear``, with (1 − cos πP)/2 for P: flat at both ends, where a question is never solved or always."""
    share = (1 - math.cos(math.pi * outcome.solved / max(outcome.n, 1))) / 2
    return Decision("soft", share, 0.0, 1 - share)


def solved(scores: np.ndarray, success: float, cut: np.ndarray | None = None) -> np.ndarray:
    """Which scores count as solved: at least success, and not cut. The only place that compares the two. -> (n,) bool

    Both are taken as float32, the type in which verl keeps scores: as float64 a score of 0.9 lies below 0.9.
    """
    reached = np.asarray(scores, dtype=np.float32) >= np.float32(success)
    return reached if cut is None else reached & ~cut


def always_demo(settings: GateSettings, n: int) -> bool:
    """Whether every question with n rollouts trains on its demonstration, whatever they score."""
    return settings.function is None and _limit(settings.threshold, settings.count, n) >= n


def decide(
    when: str, outcome: Outcome, trains_rollouts: bool = True, place: str = "separate", collects: str = "demonstrations"
) -> Decision:
    """What a question trains on, by its method's rule ``when``, its ``place`` (``estimator.Method``) and the gate.

    γ < 0 never fires, γ ≥ 1 always does. trains_rollouts: whether the method has a term on rollouts. A question without
    a rollout that started from nothing tells the gate nothing: with a buffer, it trains on the others.

    collects: what a buffer takes: "demonstrations" of questions that the gate sends to them, or "successes", of
    questions of which some rollouts are solved and some are not.
    """
    if place == "buffer" and collects == "successes":
        return KEEP if 0 < outcome.solved < max(outcome.n, 2) else RL
    if place == "buffer":
        asked = decide(when, outcome) if outcome.n else RL
        return RL if asked.on else COLLECT
    settings, n = outcome.settings, outcome.n
    if when == "never" or place == "stream":
        return RL
    if when == "always":
        return BOTH if trains_rollouts else DEMO
    if when == "unrewarded":
        return RL if outcome.rewarded else DEMO
    if when == "own":
        return OWN if outcome.solved else DEMO
    if when == "soft":
        return _soft(outcome)
    if settings.function is not None:
        return ask(settings.function, outcome)
    if outcome.solved <= _limit(settings.threshold, settings.count, n):
        return DEMO
    if settings.off is not None and outcome.solved <= _limit(settings.off, None, n):
        return OFF
    return RL


def settle(decision: Decision, demonstrations: int, right: bool, trains_rollouts: bool) -> Decision:
    """What a decision becomes once the question's demonstrations are read.

    Args:
        demonstrations: usable ones that the question is shown. right: whether one of them counts as solved.
        trains_rollouts: whether a question without one can train on its rollouts; else it trains on nothing.
    """
    if decision.asks_for_demo and not demonstrations:
        return RL if trains_rollouts else NOTHING
    return decision if right or decision.if_wrong is None else decision.if_wrong


def ask(name: str, outcome: Outcome) -> Decision:
    """What a registered gate says."""
    return GATES[name](*arguments(GATES[name], outcome), **outcome.settings.kwargs)


def arguments(function: Callable, outcome: Outcome) -> tuple:
    """What a gate is called with beside its keyword arguments: three numbers where it requires three, else one."""
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    own = {p.name for p in required[1:]} & outcome.settings.kwargs.keys()
    return (outcome.solved, outcome.n, outcome.settings) if len(required) - len(own) >= 3 else (outcome,)


def _soft(outcome: Outcome) -> Decision:
    """Shares of rollouts and demonstration by number solved: a registered gate's, or a table's.

    A table of the user's has rows for 0 … m solved; groups of other sizes are scaled to it, rounded to the nearest. The
    published table counts a correct demonstration as one of its 8: entry 0 is never reached with one.
    """
    table = outcome.settings.soft
    if isinstance(table, str):
        return ask(table, outcome)
    if table is not None:
        return _entry(table, 0, outcome)
    return replace(_entry(SOFT_TABLE, 1, outcome), if_wrong=_entry(SOFT_TABLE, 0, outcome))


def _entry(table, counted: int, outcome: Outcome) -> Decision:
    """The row of a table; counted: demonstrations that count as solved."""
    at = counted + int((len(table) - 1 - counted) * outcome.solved / max(outcome.n, 1) + 0.5)
    return Decision("soft", *map(float, table[at]))


def _limit(threshold: float, count: int | None, n: int) -> float:
    return (count if count is not None else threshold * n) + EPSILON
