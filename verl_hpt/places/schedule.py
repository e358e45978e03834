"""Numbers that change over steps: by a schedule, or steered by the policy's entropy."""

from __future__ import annotations

import math
from typing import Literal

from verl_hpt.errors import checked, setting


@checked
class Schedule:
    """A number that changes over steps: from start at step 0 to end at step ``steps``, then end."""

    start: float = setting(..., "at step 0")
    end: float = setting(..., "from step `steps` on")
    steps: int = setting(..., "how many steps the change takes, after the warm-up", ge=1)
    shape: Literal["linear", "cosine", "step"] = setting("linear", "`step`: start until after step `steps`, then end")
    warmup: int = setting(0, "steps over which it first rises from 0 to start, in a line", ge=0)

    def __ge__(self, bound: float) -> bool:
        """A bound of a setting holds for both ends of its schedule."""
        return min(self.start, self.end) >= bound

    def __le__(self, bound: float) -> bool:
        return max(self.start, self.end) <= bound

    def at(self, step: int) -> float:
        """The number at a step; verl's first is 1."""
        if step < self.warmup:
            return self.start * max(step, 0) / self.warmup
        step -= self.warmup
        if self.shape == "step":
            return self.start if step <= self.steps else self.end
        done = min(max(step / self.steps, 0.0), 1.0) if self.steps > 0 else 1.0
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@checked
class Steered:
    """A number that follows the policy's entropy H, nats a token: x ← clip(x + rate·(target − H), low, high) a step.

    The entropy half of AMFT's controller (arXiv 2508.06944); its meta-gradient half is left out.
    """

    start: float = setting(..., "before the first step")
    target: float = setting(..., "entropy that it holds, nats a token; it rises where the policy's lies below", ge=0)
    rate: float = setting(0.01, "change a step for each nat between the two", gt=0)
    low: float = setting(0.05, "never below", ge=0)
    high: float = setting(0.95, "never above")

    def __post_init__(self):
        if not self.low <= self.start <= self.high:
            raise ValueError(f"start={self.start!r}: must lie between low ({self.low:g}) and high ({self.high:g})")

    def __ge__(self, bound: float) -> bool:
        return self.low >= bound

    def __le__(self, bound: float) -> bool:
        return self.high <= bound

    def after(self, value: float, entropy: float) -> float:
        """The number of the next step."""
        return min(max(value + self.rate * (self.target - entropy), self.low), self.high)


def at(value: float | Schedule | Steered | None, step: int) -> float | None:
    """The number that a setting is at a step; of one that is steered, where it starts."""
    if isinstance(value, Steered):
        return value.start
    return value.at(step) if isinstance(value, Schedule) else value
