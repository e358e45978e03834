"""The unified policy gradient estimator, and every method of the field as one row of a table.

    grad = 1_stable · (1/π_ref) · Â · ∇π_θ           (HPT, arXiv 2509.04419, section 3)

``Estimator`` holds the four parts, ``coefficient`` is the factor before ∇ log π_θ that they make, ``METHODS`` is the
table: what a method does on rollouts, what on demonstrations, where a demonstration stands, and its own normalisation.
A method of your own is one ``register_method(Method(...))`` in a module named in ``hpt.modules``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from verl_hpt import parts
from verl_hpt.normalize import NORMALIZATIONS
from verl_hpt.parts import KINDS, PARTS, Part, Tokens


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
    """Coefficients of the method's terms on every token; is_demo: (rows, 1) bool.

    Under w_rl stands the rollouts' estimator on rollouts and the R term on demonstrations; under w_demo the S term, on
    either (S³FT imitates own rollouts). The value of an S term is coefficient · log π.
    """
    nothing = (tokens.zeros(), tokens.zeros(), tokens.ones())
    rl, value, keep = nothing if method.rollouts is None else evaluate(method.rollouts, tokens)
    if method.r_estimator is not None:
        on_demo = evaluate(method.r_estimator, tokens)
        rl, value, keep = (torch.where(is_demo, d, r) for d, r in zip(on_demo, (rl, value, keep), strict=True))
    if method.s_estimator is None:
        return RowTerms(rl, nothing[0], value, nothing[0], keep)
    demo = coefficient(method.s_estimator, tokens)
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
            taken over both.
        when: "gate": a demonstration instead of the rollouts where the gate says so; "always": beside them;
            "never": no demonstrations; "soft": shares of both by ``hpt.gate.soft``; "unrewarded": instead of the
            rollouts where no rollout has a reward above 0 (SuperRL); "own": the question's own correct rollout is
            the demonstration where there is one (S³FT), else the data's.
        off_zone: the R term of the zone between ``gate.threshold`` and ``gate.off``, where that zone is switched on.
        normalization: the method's own (``hpt.normalization`` null).
        source: arXiv id and place (numbers not all checked at the source); formula: w on rollouts / on demonstrations.
        unverified: known at second hand, or the sources disagree: what, in one line.
        approximate: what is only approximated, and how far off it is.
    """

    name: str
    rollouts: Estimator | None
    demos: tuple[Term, ...] = ()
    place: Literal["separate", "group"] = "separate"
    when: Literal["gate", "always", "never", "soft", "unrewarded", "own"] = "never"
    normalization: str = "question"
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
        if self.place == "separate" and r_term is not None and r_term.estimator.advantage.over_group is not None:
            raise ValueError(
                f"method {self.name!r}: a demonstration that stands by itself has no group to take "
                f"{r_term.estimator.advantage.part_name} over; its R term needs another advantage: reward, unit"
            )
        if self.place == "group" and (self.rollouts is None or self.when != "always"):
            raise ValueError(f"method {self.name!r}: a member of the group stands always, beside rollouts")

    def term(self, kind: str) -> Term | None:
        return next((term for term in self.demos if term.kind == kind), None)

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


_PPO = Estimator(mask=parts.ppo_clip, reference=parts.old)
_DR_GRPO = _PPO
_GRPO = Estimator(parts.ppo_clip, parts.old, parts.standardized)
_SFT = Estimator(advantage=parts.unit)
_OFF = Estimator(reference=parts.one, advantage=parts.reward, likelihood=parts.shaped)
OFF_ZONE = Term("R", _OFF)
_SHAPED = Estimator(reference=parts.one, likelihood=parts.shaped)
_SRFT_SFT = Estimator(advantage=parts.calm)
_SRFT_ROLLOUTS = Estimator(advantage=parts.excited)

METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Add a row to the table; the name must be free."""
    if METHODS.get(method.name, method) != method:
        raise ValueError(f"method {method.name!r} is already registered: choose another name")
    METHODS[method.name] = method
    return method


_ROLLOUT_METHODS = (
    Method("ppo", Estimator(parts.ppo_clip, parts.old, parts.gae), normalization="token",
           source="1707.06347 eq. 7", formula="1_clip·r·Â, Â from a critic (GAE)"),
    Method("grpo", _GRPO, normalization="sequence", source="2402.03300 eq. 3", formula="1_clip·r·(R−mean)/(std+1e-6)"),
    Method("dr_grpo", _DR_GRPO, source="2503.20783 section 3.2", formula="1_clip·r·(R−mean)"),
    Method("reinforce", Estimator(), normalization="sequence", source="2402.14740 eq. 6", formula="R−mean"),
    Method("rloo", Estimator(advantage=parts.against_others), normalization="sequence", source="2402.14740 eq. 8",
           formula="R − mean of the others"),
    Method("cispo", Estimator(reference=parts.clipped_old, advantage=parts.standardized), normalization="token",
           source="2506.13585 eq. 4", formula="sg(clip(r))·(R−mean)/(std+1e-6)"),
    Method("gspo", Estimator(parts.sequence_clip, parts.sequence_old, parts.standardized), normalization="sequence",
           source="2507.18071 eq. 5, 14", formula="1_seq·s·(R−mean)/(std+1e-6), s = (π_θ(y)/π_old(y))^(1/|y|)"),
    Method("raft", Estimator(parts.correct_only, advantage=parts.unit), normalization="token",
           source="2304.06767 algorithm 1", formula="1[R ≥ success]"),
)  # fmt: skip

_DEMO_METHODS = (
    Method("sft", None, (Term("S", _SFT),), when="always", normalization="token", source="maximum likelihood",
           formula="– / S: 1"),
    Method("hpt", _DR_GRPO, (Term("S", _SFT),), when="gate", source="2509.04419 eq. 11–13",
           formula="1_clip·r·(R−mean) / S: 1 where solved ≤ γ·n"),
    Method("hpt_off_on", _DR_GRPO, (Term("R", _OFF),), when="gate", source="2509.04419 section 5 (ablation)",
           formula="1_clip·r·(R−mean) / R: R·γ₀p/(p+γ₀)² where solved ≤ γ·n"),
    Method("hpt_mix_on", _DR_GRPO, (Term("S", _SFT, 0.1), Term("R", _OFF)), when="gate",
           source="2509.04419 section 5 (ablation)",
           formula="1_clip·r·(R−mean) / S: 0.1 and R: R·γ₀p/(p+γ₀)² where solved ≤ γ·n"),
    Method("hpt_soft", _DR_GRPO, (Term("S", _SFT), Term("R", _OFF)), when="soft", source="2509.04419, published code",
           formula="on·1_clip·r·(R−mean) / S: sft·1 and R: off·R·γ₀p/(p+γ₀)², shares by number solved",
           unverified="what each share of the published table multiplies is inferred from its names"),
    Method("luffy", Estimator(reference=parts.old), (Term("R", _SHAPED),), place="group", when="always",
           source="2504.14945 eq. 4–6", formula="r·(R−mean) / R: (R−mean)·γ₀p/(p+γ₀)²"),
    Method("srft", _SRFT_ROLLOUTS,
           (Term("S", _SRFT_SFT), Term("R", Estimator(reference=parts.one, advantage=parts.standardized))),
           place="group", when="always", normalization="sequence", source="2506.19767 eq. 5–10",
           formula="0.1·e^H̄ or −1 / S: 0.5·e^−H̄ and R: p·(R−mean)/(std+1e-6)"),
    Method("srft_hpt", _SRFT_ROLLOUTS, (Term("S", _SRFT_SFT), Term("R", _SHAPED)), place="group", when="always",
           source="2509.04419 (the SRFT it compares with)",
           formula="0.1·e^H̄ or −1 / S: 0.5·e^−H̄ and R: (R−mean)·γ₀p/(p+γ₀)²"),
    Method("srft_code", Estimator(reference=parts.old, advantage=parts.centered_excited),
           (Term("S", Estimator(advantage=parts.excited_tokens)), Term("R", _SHAPED)), place="group", when="always",
           source="published SRFT code", formula="r·Â·(0.1·e^H_t where Â > 0) / S: 0.5·e^H_t and R: Â·γ₀p/(p+γ₀)²",
           unverified="read at second hand"),
    Method("dft", None, (Term("S", Estimator(reference=parts.one, advantage=parts.unit)),), when="always",
           normalization="token", source="2508.05629 eq. 9", formula="– / S: sg(p)"),
    Method("asft", None,
           (Term("S", Estimator(advantage=parts.unit, likelihood=parts.anchored)),),
           when="always", normalization="token", source="2509.23753 eq. 8",
           formula="– / S: sg(p) + λ_kl·(π_ref/p − 1), capped",
           approximate="KL(ref‖θ) in its k3 log-prob form on the demonstration's tokens, π_ref/p capped at "
           "options.max_ratio; the exact form needs the logits of both models"),
    Method("otr", None,
           (Term("S", Estimator(reference=parts.one, advantage=parts.unit, likelihood=parts.expected_match)),),
           when="always", normalization="token", source="2509.26313 section 3",
           formula="– / S: (1−β)·p, in expectation at κ = 1", unverified="κ and β of the published runs",
           approximate="expectation over the sampled token at temperature κ = 1; κ ≠ 1 is no multiple of ∇ log π and "
           "needs the logits"),
    Method("psft", None, (Term("S", Estimator(parts.psft_clip, parts.old, parts.unit)),), when="always",
           normalization="token", source="2508.17784 eq. 6", formula="– / S: r·1[r ≤ 1+ε]"),
    Method("trsft", _DR_GRPO, (Term("R", Estimator(reference=parts.trust_region, advantage=parts.unit)),),
           when="always", source="2512.17636 (TRAPO)", formula="1_clip·r·(R−mean) / R: min(1, p/α)"),
    Method("superrl", _GRPO, (Term("S", _SFT),), when="unrewarded", normalization="sequence",
           source="2506.01096 section 3", formula="1_clip·r·(R−mean)/(std+1e-6) / S: 1 where max R = 0"),
    Method("rl_plus", Estimator(reference=parts.old),
           (Term("R", Estimator(reference=parts.mixture, likelihood=parts.exploring)),), place="group",
           when="always", source="2508.00222 eq. 5–8", formula="r·(R−mean) / R: (R−mean)·(1−p)^½·2p/(π̂+π_old)"),
    Method("s3ft", None, (Term("S", _SFT),), when="own", normalization="token", source="2502.08130 section 3",
           formula="S: 1 on the question's own correct rollout if there is one, else on the demonstration"),
    Method("poft", None, (Term("S", Estimator(advantage=parts.preference)),), when="always",
           normalization="sequence", source="2412.12865 eq. 5", formula="– / S: σ(m̄ − m) a sequence"),
)  # fmt: skip

for _method in (*_ROLLOUT_METHODS, *_DEMO_METHODS):
    register_method(_method)


def estimator_of(description: Mapping[str, str] | str, where: str) -> Estimator:
    """An estimator from a config: a method's name (its rollouts' estimator), or part names by kind.

    Raises:
        ValueError: an unknown kind or name; the message names the place and the choices.
    """
    if isinstance(description, str):
        method = METHODS.get(description)
        if method is None or not method.estimators():
            raise ValueError(f"{where}: unknown estimator {description!r}; one of {', '.join(METHODS)}")
        return method.estimators()[0]
    chosen = {}
    for kind, name in description.items():
        if kind not in KINDS:
            raise ValueError(f"{where}: unknown part kind {kind!r}; one of {', '.join(KINDS)}")
        if name not in PARTS[kind]:
            raise ValueError(f"{where}.{kind}: unknown {kind} {name!r}; one of {', '.join(PARTS[kind])}")
        chosen[kind] = PARTS[kind][name]
    return Estimator(**chosen)
