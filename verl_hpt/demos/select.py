"""Which of a question's demonstrations it is shown at a draw: by a rule, from the arguments alone."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any


def stable_hash(*parts: Any) -> int:
    """A 64-bit number that depends on the parts alone: the same in every process, on every machine."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


SELECTORS = ("first", "random", "round_robin", "shortest", "likelihood", "unseen_first")


def select(
    demos: Sequence[Any],
    how: str = "first",
    k: int = 1,
    *,
    seed: int = 0,
    draw: int = 0,
    question_key: Any = "",
    log_likelihoods: Sequence[float | None] | None = None,
    lengths: Sequence[int] | None = None,
    seen: Callable[[int], int] | dict[int, int] | None = None,
) -> list[int]:
    """Positions of the k demonstrations (all, where there are fewer) that this question is shown at this draw.

    Depends on the arguments alone: two questions with the same draw differ by `question_key`, one question's draws by
    `draw` (a step, or how often it was drawn). `likelihood` (GRAPE, arXiv 2502.04194) takes the highest mean log-prob a
    token, unknown ones last; `shortest` the fewest `lengths` (default: characters); `unseen_first` the least often
    `seen` (position → times), at random among equals. Raises ValueError for an unknown rule or missing input.
    """
    n = len(demos)
    k = min(k, n)
    if how not in SELECTORS:
        raise ValueError(f"demo.select is {how!r}; choose from {', '.join(SELECTORS)}")
    if k <= 0:
        return []

    def shuffled() -> list[int]:
        return sorted(range(n), key=lambda i: stable_hash(seed, question_key, draw, i))

    if how == "first":
        return list(range(k))
    if how == "random":
        return sorted(shuffled()[:k])
    if how == "round_robin":
        start = stable_hash(seed, question_key) % n + draw * k
        return [(start + i) % n for i in range(k)]
    if how == "shortest":
        sizes = list(lengths) if lengths is not None else [len(d if isinstance(d, str) else str(d)) for d in demos]
        return sorted(range(n), key=lambda i: (sizes[i], i))[:k]
    if how == "likelihood":
        if log_likelihoods is None or len(log_likelihoods) != n:
            got = "none" if log_likelihoods is None else str(len(log_likelihoods))
            raise ValueError(f"demo.select=likelihood needs a mean log-prob for each of {n} demonstrations, got {got}")
        known = [v if v is not None and not math.isnan(v) else -math.inf for v in log_likelihoods]
        return sorted(range(n), key=lambda i: (-known[i], i))[:k]
    counts = seen if callable(seen) else (seen or {}).get
    order = {i: place for place, i in enumerate(shuffled())}
    return sorted(range(n), key=lambda i: (counts(i) or 0, order[i]))[:k]
