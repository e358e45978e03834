"""The gate: does a question learn from its rollouts or from its demonstration? Decided here, in ``decide``.

HPT (arXiv 2509.04419, eq. 13): with P the share of a question's rollouts that the verifier accepts, imitate where
P ≤ γ, reinforce elsewhere. Counts are compared, not shares: a float share of 5 of 7 lies below 5/7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

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
    registered gate, used by methods whose ``when`` is "soft". function names a gate of the user's.
    """

    threshold: float = 0.0
    count: int | None = None
    success: float = 1.0
    off: float | None = None
    soft: tuple[tuple[float, float, float], ...] | str | None = None
    function: str | None = None
    finished: bool = True
    kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What one question trains on: factors on its rollouts, on its demonstrations' R terms and on their S terms.

    zone is "rl", "demo", "off", "both" or "soft", for metrics and for people.
    """

    zone: str
    on: float
    off: float
    sft: float


RL = Decision("rl", 1.0, 0.0, 0.0)
DEMO = Decision("demo", 0.0, 1.0, 1.0)
OFF = Decision("off", 0.0, 1.0, 0.0)
BOTH = Decision("both", 1.0, 1.0, 1.0)


GATES: dict[str, Callable[[int, int, GateSettings], Decision]] = {}


def register_gate(function: Callable[[int, int, GateSettings], Decision]):
    """Register a gate of your own under its function's name, for ``hpt.gate.function``, or for ``hpt.gate.soft`` where
    the method is ``hpt_soft`` (module in ``hpt.modules``).

    It gets (solved, n, settings) and returns a Decision, as ``decide`` does::

        @register_gate
        def at_most_one(solved, n, settings):
            return DEMO if solved <= 1 else RL
    """
    if GATES.get(function.__name__, function).__module__ != function.__module__:
        raise ValueError(f"gate {function.__name__!r} is already registered: choose another name")
    GATES[function.__name__] = function
    return function


@register_gate
def linear(solved: int, n: int, settings: GateSettings) -> Decision:
    """P on the rollouts, 1 − P on the demonstration's S term, P the share solved."""
    share = solved / max(n, 1)
    return Decision("soft", share, 0.0, 1 - share)


@register_gate
def cosine(solved: int, n: int, settings: GateSettings) -> Decision:
    """As ``linear``, with (1 − cos πP)/2 for P: flat at both ends, where a question is hopeless or solved."""
    share = (1 - math.cos(math.pi * solved / max(n, 1))) / 2
    return Decision("soft", share, 0.0, 1 - share)


def solved(scores: np.ndarray, success: float, cut: np.ndarray | None = None) -> np.ndarray:
    """Which rollouts count as solved: score ≥ success, and not cut. The only place that compares the two.

    Both are taken as float32, the type in which verl keeps scores: as float64 a score of 0.9 lies below 0.9.

    Args:
        scores: (n,) verifier's scores, or the numbers of ``hpt.gate.metric``.
        cut: (n,) bool, rollouts that were cut at the length limit and therefore never count; None: all count.

    Returns:
        (n,) bool
    """
    reached = np.asarray(scores, dtype=np.float32) >= np.float32(success)
    return reached if cut is None else reached & ~cut


def rewarded(scores: np.ndarray, cut: np.ndarray | None = None) -> np.ndarray:
    """Which rollouts have a score above 0 (SuperRL's rule), compared as in ``solved``. -> (n,) bool"""
    above = np.asarray(scores, dtype=np.float32) > 0
    return above if cut is None else above & ~cut


def always_demo(settings: GateSettings, n: int) -> bool:
    """Whether every question with n rollouts trains on its demonstration, whatever they score."""
    return settings.function is None and _limit(settings.threshold, settings.count, n) >= n


def decide(solved: int, n: int, settings: GateSettings) -> Decision:
    """The switch. γ < 0 never fires, γ ≥ 1 always does.

    Args:
        solved: rollouts of the question that are solved, see ``solved``.
        n: rollouts of the question that came back (failed sessions are not among them).
    """
    if settings.function is not None:
        return GATES[settings.function](solved, n, settings)
    if solved <= _limit(settings.threshold, settings.count, n):
        return DEMO
    if settings.off is not None and solved <= _limit(settings.off, None, n):
        return OFF
    return RL


def decide_soft(solved: int, n: int, demo_correct: bool, settings: GateSettings) -> Decision:
    """Shares of rollouts and demonstration by number solved: a registered gate's, or a table's.

    A table of the user's has rows for 0 … m solved; groups of other sizes are scaled to it, rounded to the nearest. The
    published table counts a correct demonstration as one of its 8: entry 0 is never reached with one.
    """
    if isinstance(settings.soft, str):
        return GATES[settings.soft](solved, n, settings)
    table = settings.soft or SOFT_TABLE
    last, counted = len(table) - 1, 0
    if settings.soft is None and demo_correct:
        last, counted = last - 1, 1
    at = counted + int(last * solved / max(n, 1) + 0.5)
    on, off, sft = table[at]
    return Decision("soft", float(on), float(off), float(sft))


def _limit(threshold: float, count: int | None, n: int) -> float:
    return (count if count is not None else threshold * n) + EPSILON
