"""Where a rollout starts: from nothing, from the first tokens of a demonstration, or with a hint in its prompt.

Which of a question's rollouts start from how much is a pure function of seed, question, step and session; so nothing of
it stands in a checkpoint, but for a length that is adapted (G²RPO-A).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge

from verl_hpt.errors import checked, setting
from verl_hpt.places.schedule import Schedule, at

SLACK = 1e-9  # 0.6 of 10 tokens are 6, whatever the float product is
QUESTA = "{question}\n\n## Hint.{hint}"  # arXiv 2507.13266, published code
END_OF_THOUGHT = "</think>"


@checked
class Uniform:
    low: float | Schedule = setting(..., "smallest share", ge=0, le=1)
    high: float | Schedule = setting(..., "largest share", ge=0, le=1)

    def __post_init__(self):
        ends = [value.warmup + value.steps for value in (self.low, self.high) if isinstance(value, Schedule)]
        for step in range(max(ends, default=0) + 2):
            if at(self.low, step) > at(self.high, step):
                raise ValueError(
                    f"low={at(self.low, step):g}: must not lie above high, which is {at(self.high, step):g} at step "
                    f"{step}"
                )


@checked
class Chunks:
    chunks: int = setting(..., "equal parts of a demonstration; each is taken with probability p", ge=1)
    p: float | Schedule = setting(..., "the probability", ge=0, le=1)


@checked
class Adapted:
    tokens: int = setting(..., "tokens of the first steps; then the length follows the solve rate", ge=1)
    every: int = setting(
        3, "steps between two changes: tokens · (mean solve rate of the others) / (the last one)", ge=2
    )


@checked
class Start:
    """Fields that are null are the method's own."""

    share: float | Schedule | Uniform | Chunks | Adapted | list[float] | None = setting(
        None, "of the demonstration: a number, a range, parts, tokens, or a list with one for each rollout"
    )
    rollouts: Annotated[int, Ge(1)] | Literal["all"] | None = setting(  # a bound of the setting would be one of "all"
        None, "how many of a question's rollouts start from it"
    )
    until: int | None = setting(None, "the last step at which rollouts start from demonstrations", ge=0)
    after_failures: int | None = setting(None, "only questions that failed so many draws in a row; 0: all", ge=0)
    min_length: int | None = setting(
        None, "shorter starts are left out: tokens of a prefix, characters of a hint", ge=1
    )
    template: str | None = setting(None, "the prompt with a hint, with {question} and {hint} in it")

    def __post_init__(self):
        problems = []
        shares = self.share if isinstance(self.share, list) else [self.share]
        for share in shares:
            if isinstance(share, float | Schedule) and not (share >= 0 and share <= 1):
                problems.append(f"share={self.share!r}: must lie between 0 and 1")
        if isinstance(self.share, list) and not any(self.share):
            problems.append(f"share={self.share!r}: one must be above 0")
        if self.template is not None:
            problems += [
                f"template={self.template!r}: must have {name} in it, once"
                for name in ("{question}", "{hint}")
                if self.template.count(name) != 1
            ]
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))


# What is taken where neither the settings nor the method say it.
PLAIN = Start(rollouts="all", after_failures=0, min_length=1, template=QUESTA)


def merged(*starts: Start | None) -> Start:
    """One Start: each field of the first that sets it, of ``PLAIN`` where none does."""
    known = [start for start in (*starts, PLAIN) if start is not None]
    values = {
        field.name: next((v for v in (getattr(start, field.name) for start in known) if v is not None), None)
        for field in dataclasses.fields(Start)
    }
    return Start(**values)


def draw(*parts: Any) -> float:
    """A number in [0, 1) that depends on the parts alone. blake2b of them, parted by zero bytes."""
    text = "\0".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def amounts(start: Start, n: int, *, seed: int, key: str, step: int, tokens: float | None = None) -> list[float]:
    """How much of its demonstration each of a question's n rollouts starts from. -> (n,), 0: from nothing

    A share in [0, 1]; with ``Adapted`` a number of tokens.

    Args:
        key: the question's identity. tokens: the length that ``Adapted`` has come to; None: its first.
    """
    if n < 1 or (start.until is not None and step > start.until):
        return [0.0] * n
    if isinstance(start.share, list):
        return [float(share) for share in (*start.share, *[0.0] * n)][:n]
    many = n if start.rollouts == "all" else min(start.rollouts, n - 1)  # one at least starts from nothing
    return [_amount(start.share, seed, key, step, session, tokens) for session in range(many)] + [0.0] * (n - many)


def _amount(share, seed: int, key: str, step: int, session: int, tokens: float | None) -> float:
    parts = (seed, key, step, session)
    if isinstance(share, Uniform):
        low, high = at(share.low, step), at(share.high, step)
        return low + draw(*parts) * (high - low)
    if isinstance(share, Chunks):
        return sum(draw(*parts, chunk) < at(share.p, step) for chunk in range(share.chunks)) / share.chunks
    if isinstance(share, Adapted):
        return float(share.tokens if tokens is None else tokens)
    return float(at(share, step))


def prefix_length(amount: float, start: Start, tokens: int, limit: int) -> int:
    """Tokens of a demonstration that a rollout starts from.

    At least one token is left to the rollout, of the demonstration and of the response; EOS is never given.

    Args:
        tokens: of the demonstration, EOS left out. limit: tokens that a response may have.
    """
    asked = amount if isinstance(start.share, Adapted) else amount * tokens
    length = min(math.floor(asked + SLACK), tokens - 1, limit - 1)
    return length if length >= start.min_length else 0


def hint_of(amount: float, start: Start, text: str) -> str | None:
    """The first part of a solution's text, by characters, what it thinks aloud left out; None where it is too short."""
    text = text.rpartition(END_OF_THOUGHT)[2].strip()
    hint = text[: math.floor(amount * len(text) + SLACK)]
    return hint if len(hint) >= start.min_length else None


def hinted(template: str, question: str, hint: str) -> str:
    """The prompt's text with the hint. A command line's ``\\n`` is two characters: it is read as a new line."""
    values = {"{question}": question, "{hint}": hint}
    template = template.replace("\\n", "\n")
    return re.sub(r"\{question\}|\{hint\}", lambda found: values[found[0]], template)


def adapted(length: float, solve_rates: Sequence[float], every: int, most: int) -> float:
    """The length after a step (G²RPO-A, arXiv 2508.13023, published code): longer where the solve rate fell.

    solve_rates: of all steps so far. At every ``every``-th: length · (mean of the ``every − 1`` before) / (this one),
    between 1 and ``most``; ``most`` where nothing was solved now and something before.
    """
    if not solve_rates or len(solve_rates) % every:
        return length
    *before, now = solve_rates[-every:]
    mean = sum(before) / len(before)
    if now == 0:
        return float(most) if mean > 0 else length
    return min(max(length * mean / now, 1.0), float(most))


def in_words(start: Start, n: int) -> str:
    """For the banner: how many rollouts start from how much."""
    share = start.share
    if isinstance(share, list):
        return f"rollouts start from the shares {', '.join(f'{one:g}' for one in share)} of the demonstration"
    many = "all" if start.rollouts == "all" else str(min(start.rollouts, n - 1))  # as `amounts` has it
    return f"{many} of {n} rollouts from {''.join(_words(share))} of the demonstration"


def _words(share) -> Iterator[str]:
    if isinstance(share, Uniform):
        yield f"U({shown(share.low)}, {shown(share.high)})"
    elif isinstance(share, Chunks):
        yield f"{share.chunks} parts, each with probability {shown(share.p)},"
    elif isinstance(share, Adapted):
        yield f"{share.tokens} tokens, adapted every {share.every} steps,"
    else:
        yield shown(share)


def shown(value) -> str:
    return f"{value.start:g} → {value.end:g}" if isinstance(value, Schedule) else f"{value:g}"
