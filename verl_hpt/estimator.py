"""The unified policy gradient estimator, and what a method is made of.

    grad = 1_stable · (1/π_ref) · Â · ∇π_θ           (HPT, arXiv 2509.04419, section 3)

``Estimator`` holds the four parts, ``coefficient`` is the factor before ∇ log π_θ that they make. A ``Method`` says
what happens on rollouts, what on demonstrations, where a demonstration stands, and its own normalisation; the table of
them stands in ``methods``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from verl_hpt import parts
from verl_hpt.normalize import NORMALIZATIONS
from verl_hpt.parts import KINDS, Part, Tokens
from verl_hpt.places.schedule import Schedule, Steered
from verl_hpt.places.starts import Start

Place = Literal["separate", "group", "prefix", "hint", "stream", "buffer"]
STARTS = ("prefix", "hint")  # places at which a rollout starts from a demonstration
BESIDE = ("stream", "buffer")  # places at which demonstrations are rows without rollouts of their question


@dataclass(frozen=True)
class Estimator:
    """Four parts (functions of ``verl_hpt.parts``): what multiplies ∇ log π_θ on a token."""

    mask: Part = parts.everywhere
    reference: Part = parts.current
    advantage: Part = parts.centered
    likelihood: Part = parts.plain

    @property
    def needs(self) -> frozenset[str]:
        """Columns of ``Tokens`` that it reads and that are there only on demand."""
        return frozenset().union(*(getattr(self, kind).needs for kind in KINDS))

    def names(self) -> dict[str, str]:
        return {kind: getattr(self, kind).part_name for kind in KINDS}


@torch.no_grad()
def evaluate(estimator: Estimator, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What an estimator does on each token.

    Returns:
        coefficient: (rows, response_len), mask · π_θ/π_ref · Â · f'; the gradient ascends coefficient · ∇ log π_θ.
        surrogate: (rows, response_len), the value Â · f(p)/π_ref whose gradient that is, clipped where the mask says.
        keep: (rows, response_len), the mask, 1 where the token learns.
    """
    advantage, value = estimator.advantage(tokens), None
    coefficient = surrogate = _over_reference(estimator.reference, tokens, advantage)
    if estimator.likelihood is not parts.plain:  # factors of 1 are not multiplied: a pass over all tokens each
        value, slope = estimator.likelihood(tokens)
        coefficient, surrogate = coefficient * slope, surrogate * value
    if estimator.mask is parts.everywhere:
        return coefficient, surrogate, tokens.ones()
    if advantage is not tokens.advantage:  # a mask clips by the sign of the estimator's own Â
        tokens = replace(tokens, advantage=advantage)
    keep, bound = estimator.mask(tokens)
    stopped = tokens.zeros() if bound is None else bound * advantage
    stopped = stopped if value is None else stopped * value
    return keep * coefficient, torch.where(keep > 0, surrogate, stopped), keep


def _over_reference(reference: Part, tokens: Tokens, advantage: Tensor) -> Tensor:
    """π_θ/π_ref · Â; for the two references that most methods have, without another pass of exp."""
    if reference is parts.current:
        return advantage.expand_as(tokens.log_prob)
    ratio = tokens.ratio() if reference is parts.old else (tokens.log_prob - reference(tokens)).exp()
    return ratio * advantage


def coefficient(estimator: Estimator, tokens: Tokens) -> Tensor:
    """The factor before ∇ log π_θ. -> (rows, response_len)"""
    return evaluate(estimator, tokens)[0]


@dataclass
class RowTerms:
    """What every token of a block of rows adds to the loss, before its row's weights. All (rows, response_len).

    rl, demo: coefficients under w_rl and w_demo; the gradient of a token is −(w_rl·rl + w_demo·demo)·∇ log π_θ.
    rl_value, demo_value: surrogates whose gradients those are, as shown in the loss. keep: mask of the RL term.
    """

    rl: Tensor
    demo: Tensor
    rl_value: Tensor
    demo_value: Tensor
    keep: Tensor


@torch.no_grad()
def row_terms(method: Method, tokens: Tokens, is_demo: Tensor) -> RowTerms:
    """Coefficients of the method's terms on every token; is_demo: (rows, 1) bool, rows that are a demonstration.

    Under w_rl stands the rollouts' estimator on a rollout's own tokens and the R term on a demonstration's, be they a
    row or the prefix of one; under w_demo the S term, on either (S³FT imitates own rollouts), but where a row has a
    prefix on that alone. The value of an S term is coefficient · log π.
    """
    nothing, of_rollouts, of_demos = (tokens.zeros(), tokens.zeros(), tokens.ones()), tokens, tokens
    if tokens.prefix is not None:
        started = tokens.prefix.any(-1, keepdim=True)
        imitated = torch.where(started, tokens.prefix, tokens.mask)
        of_rollouts = replace(tokens, averaged=tokens.mask & ~tokens.prefix)
        of_demos, is_demo = replace(tokens, averaged=imitated), is_demo | tokens.prefix
    rl, value, keep = nothing if method.rollouts is None else evaluate(method.rollouts, of_rollouts)
    if method.r_estimator is not None:
        on_demo = evaluate(method.r_estimator, of_demos)
        rl, value, keep = (torch.where(is_demo, d, r) for d, r in zip(on_demo, (rl, value, keep), strict=True))
    elif tokens.prefix is not None:  # without an R term the tokens of a prefix have no part in the RL sum
        rl, value, keep = (x.masked_fill(tokens.prefix, to) for x, to in ((rl, 0.0), (value, 0.0), (keep, 1.0)))
    if method.s_estimator is None:
        return RowTerms(rl, nothing[0], value, nothing[0], keep)
    demo = coefficient(method.s_estimator, of_demos)
    if tokens.prefix is not None:
        demo = demo.masked_fill(~imitated, 0.0)
    return RowTerms(rl, demo, value, demo * tokens.log_prob, keep)


@dataclass(frozen=True)
class Term:
    """What a method adds on a demonstration.

    kind "S" is SFT-shaped: demo normaliser, times λ (``hpt.demo_coef``); "R" is RL-shaped: RL normaliser, no λ.
    """

    kind: Literal["S", "R"]
    estimator: Estimator
    scale: float = 1.0


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        rollouts: estimator of the model's own rollouts; None: the method trains on demonstrations only.
        demos: terms on demonstrations, at most one of each kind.
        place: "separate": a demonstration stands by itself; "group": it is a member of its question's group, and Â is
            taken over both; "prefix": a rollout continues its first tokens; "hint": it stands in a rollout's prompt,
            and none of its tokens learns; "stream": a file's stand beside the questions; "buffer": those of questions
            that the gate sends to them are collected, and trained on in optimizer steps of their own.
        when: "gate": a demonstration instead of the rollouts where the gate says so; "always": beside them;
            "never": no demonstrations; "soft": shares of both by ``hpt.gate.soft``; "unrewarded": instead of the
            rollouts where no rollout has a reward above 0 (SuperRL); "own": the question's own correct rollout is
            the demonstration where there is one (S³FT), else the data's.
        baseline: what Â of a started rollout is taken over: "start": rollouts that start alike; "group": all.
        rescored: rollouts with a hint are trained on the prompt without it, with the log-probs of the one with it as
            π_old (Guide, OC-GRPO).
        convex: the rollouts' terms have the weight 1 − λ.
        demo_coef: λ where ``hpt.demo_coef`` is null. start: what of ``hpt.start`` is null.
        off_zone: the R term of the zone between ``gate.threshold`` and ``gate.off``, where that zone is switched on.
        normalization: the method's own (``hpt.normalization`` null).
        source: arXiv id and place (numbers not all checked at the source); formula: w on rollouts / on demonstrations.
        unverified: known at second hand, or the sources disagree: what, in one line.
        approximate: what is only approximated, and how far off it is.
    """

    name: str
    rollouts: Estimator | None
    demos: tuple[Term, ...] = ()
    place: Place = "separate"
    when: Literal["gate", "always", "never", "soft", "unrewarded", "own"] = "never"
    normalization: str = "question"
    baseline: Literal["start", "group"] = "start"
    rescored: bool = False
    convex: bool = False
    demo_coef: float | Schedule | Steered = 0.1
    start: Start | None = None
    off_zone: Term | None = None
    source: str = ""
    formula: str = ""
    unverified: str = ""
    approximate: str = ""

    def __post_init__(self):
        kinds = [term.kind for term in self.demos]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"method {self.name!r}: at most one S and one R term on demonstrations, got {kinds}")
        if bool(self.demos) == (self.when == "never"):
            raise ValueError(
                f"method {self.name!r}: terms on demonstrations and when={self.when!r} contradict each other"
            )
        if self.rollouts is None and self.when not in ("always", "own"):
            raise ValueError(f"method {self.name!r} has nothing for rollouts: demonstrations must stand always")
        if self.when == "own" and self.term("S") is None:
            raise ValueError(
                f"method {self.name!r} imitates its own rollouts (when='own') and needs an S term for that"
            )
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"method {self.name!r}: unknown normalization {self.normalization!r}; one of "
                f"{', '.join(NORMALIZATIONS)}"
            )
        for term in (*self.demos, *([] if self.off_zone is None else [self.off_zone])):
            advantage, whose = term.estimator.advantage, f"method {self.name!r}: its {term.kind} term on demonstrations"
            if not 0 < term.scale < math.inf:
                raise ValueError(f"{whose} has scale {term.scale!r}: must be finite and above 0, or leave the term out")
            if advantage is parts.gae:
                raise ValueError(
                    f"{whose} takes the advantage gae, and a demonstration has no value of a critic: it would train "
                    "nothing; set its advantage to unit or reward"
                )
            if term.kind == "S" and advantage.over_group is not None:
                raise ValueError(
                    f"{whose} takes the advantage {advantage.part_name} over a group, and an S term has none: it would "
                    "train nothing; set its advantage to unit"
                )
        r_term = self.term("R")
        if (problem := self._misplaced()) is not None:
            raise ValueError(f"method {self.name!r} (place={self.place!r}): {problem}")
        if self.place == "separate" and r_term is not None and r_term.estimator.advantage.over_group is not None:
            raise ValueError(
                f"method {self.name!r}: a demonstration that stands by itself has no group to take "
                f"{r_term.estimator.advantage.part_name} over; its R term needs another advantage: reward, unit"
            )
        if self.place == "group" and (self.rollouts is None or self.when != "always"):
            raise ValueError(f"method {self.name!r}: a member of the group stands always, beside rollouts")

    def _misplaced(self) -> str | None:
        """What contradicts the place of its demonstrations, or None."""
        r_term, beside = self.term("R"), self.place in BESIDE
        over_starts = [e for e in self.estimators() if e.advantage.over_starts is not None]
        if self.place not in ("separate", "group") and self.rollouts is None:
            return "its demonstrations stand with rollouts, and it has nothing for those"
        if over_starts and (self.place != "prefix" or over_starts != [self.r_estimator]):
            return f"{over_starts[0].advantage.part_name} is the advantage of a prefix's R term alone"
        r_scale = 1.0 if r_term is None else r_term.scale
        if self.place == "prefix" and (self.when not in ("always", "never") or r_scale != 1):
            return "a prefix learns wherever it stands (when='always'), and its R term has scale 1"
        if self.place == "hint" and self.demos:
            return "no token of a hint learns; leave its terms on demonstrations out"
        if beside and (r_term is not None or self.when != {"stream": "always", "buffer": "gate"}[self.place]):
            return "it takes one S term, when='always' for a stream and when='gate' for a buffer"
        if (self.rescored and self.place != "hint") or (self.convex and self.place != "stream"):
            return "only hints are rescored, and only a stream's weights are convex"
        if self.start is not None and self.place not in STARTS:
            return "start says how rollouts start from demonstrations, with place 'prefix' or 'hint'"
        return None

    def term(self, kind: str) -> Term | None:
        return next((term for term in self.demos if term.kind == kind), None)

    @property
    def reads_demos(self) -> bool:
        """Whether demonstrations of the questions matter to it."""
        return self.place != "stream" and bool(self.demos or self.place in STARTS)

    @property
    def r_estimator(self) -> Estimator | None:
        """What stands under w_rl on a demonstration."""
        term = self.term("R") or self.off_zone
        return None if term is None else term.estimator

    @property
    def s_estimator(self) -> Estimator | None:
        """What stands under w_demo on any row."""
        term = self.term("S")
        return None if term is None else term.estimator

    @property
    def needs(self) -> frozenset[str]:
        """What the update must bring beside log-probs and old log-probs of rollouts."""
        return frozenset().union(*(e.needs for e in self.estimators()))

    @property
    def needs_of_demos(self) -> frozenset[str]:
        """Columns that demonstrations need: old or reference log-probs take a forward pass of their own."""
        return frozenset().union(*(e.needs for e in (self.r_estimator, self.s_estimator) if e is not None))

    @property
    def uses_critic(self) -> bool:
        return any(e.advantage is parts.gae for e in self.estimators())

    def estimators(self) -> list[Estimator]:
        return [e for e in (self.rollouts, self.r_estimator, self.s_estimator) if e is not None]
