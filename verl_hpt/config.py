"""The settings, node ``hpt`` of verl's config: typed, checked once before any model loads, turned into plain values.

Nothing behind this file sees a config object: the plan gets ``PlanSettings``, the worker ``LossSpec``.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from verl_hpt.demos.demonstration import COLUMNS
from verl_hpt.errors import UserError, raise_all
from verl_hpt.estimator import Method, Term
from verl_hpt.gate import GATES, GateSettings, Outcome, ask
from verl_hpt.methods import METHODS, OFF_ZONE, estimator_of
from verl_hpt.normalize import NORMALIZATIONS
from verl_hpt.parts import RANGES, Constants
from verl_hpt.typed import WRONG, build, nearest


@dataclass(frozen=True)
class Schedule:
    """A number that changes over steps: from start at step 0 to end at step ``steps``, then end.

    shape "step" is start up to and with step ``steps`` and end after it. warmup: steps over which it first rises from 0
    to start, in a line; ``steps`` counts after them.
    """

    start: float
    end: float
    steps: int
    shape: Literal["linear", "cosine", "step"] = "linear"
    warmup: int = 0

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


def at(value: float | Schedule | None, step: int) -> float | None:
    """The number that a setting is at a step."""
    return value.at(step) if isinstance(value, Schedule) else value


@dataclass(frozen=True)
class Gate:
    """When a question learns from its demonstration instead of its rollouts.

    threshold: γ, solved ≤ γ·n; count: the same as a number of rollouts; success: score from which a rollout counts as
    solved; finished: a rollout that was cut at the length limit never counts as solved; metric: a key of the reward
    function's extra info that is compared with success in place of the score; off: upper bound, a share, of the zone
    trained off-policy on the demonstration; soft: table of (on, off, sft) by number solved, or a name: linear, cosine,
    or one of your own; function, and such names of your own: registered with ``verl_hpt.gate.register_gate``.
    """

    threshold: float | Schedule = 0.0
    count: int | None = None
    success: float = 1.0
    finished: bool = True
    metric: str | None = None
    off: float | Schedule | None = None
    soft: list[list[float]] | str | None = None
    function: str | None = None

    def at(self, step: int) -> GateSettings:
        """The plain numbers of one step."""
        soft = tuple(tuple(row) for row in self.soft) if isinstance(self.soft, list) else self.soft
        threshold, off = at(self.threshold, step), at(self.off, step)
        return GateSettings(threshold, self.count, self.success, off, soft, self.function, self.finished)


@dataclass(frozen=True)
class Rollouts:
    """What becomes of rollouts that were cut at the length limit.

    truncated: "keep" them as they are; count them as "unsolved", in the gate and in Â; or "mask" them: Â is made with
    them counted as unsolved, then they are dropped from the update (DAPO's overlong filtering, arXiv 2503.14476,
    section 3.4, which drops them first: then Â is 0 where all that finished are right).
    """

    truncated: Literal["keep", "unsolved", "mask"] = "keep"


@dataclass(frozen=True)
class Demo:
    """Where demonstrations come from, and which of them are used.

    key: column with the demonstration (a string, chat messages, or a list of either); reward: what a demonstration
    counts as where a method needs it, a number or a column (null: ``gate.success``); eos: id of the end token (null:
    the tokenizer's); on_unusable: "keep" the question's rollouts, or stop with an "error"; per_question: how many of a
    question's demonstrations are used at once, chosen by ``select``; likelihood_of: whose mean log-likelihood a token
    ``select=likelihood`` compares: the column ``log_likelihood``, or the ``policy`` as it is at the step, or verl's
    frozen ``reference`` model, both by a forward pass over the candidates.

    Columns, each with one value for a row with one demonstration or a list with one for each: log_likelihood,
    other_log_prob: a number; token_weights: a weight for each token, EOS included; teacher_log_prob: log π of the
    model that wrote it, for each token, EOS included (any number on what tools say); source: text, for metrics.
    """

    key: str = "target"
    reward: float | str | None = None
    eos: int | None = None
    on_unusable: Literal["keep", "error"] = "keep"
    per_question: int = 1
    select: Literal["first", "random", "round_robin", "shortest", "likelihood", "unseen_first"] = "first"
    likelihood_of: Literal["column", "policy", "reference"] = "column"
    log_likelihood: str | None = None
    other_log_prob: str | None = None
    token_weights: str | None = None
    teacher_log_prob: str | None = None
    source: str | None = None

    def columns(self) -> dict[str, str]:
        """The columns beside the demonstrations' own."""
        return {name: getattr(self, name) for name in COLUMNS if isinstance(getattr(self, name), str)}


@dataclass(frozen=True)
class EarlyGate:
    """Questions of which no rollout was solved in ``after_failures`` draws in a row get ``rollouts`` rollouts."""

    after_failures: int
    rollouts: int = 1


@dataclass(frozen=True)
class History:
    """What follows from a question's history.

    retire_after: uses after which a demonstration is retired (its question keeps its rollouts); cooldown: steps that a
    question's demonstrations rest after a use; early_gate: fewer rollouts where all failed so often; on_missing: what
    to do when a run is resumed from a checkpoint without a history although a setting depends on it.
    """

    retire_after: int | None = None
    cooldown: int = 0
    early_gate: EarlyGate | None = None
    on_missing: Literal["error", "empty"] = "error"


@dataclass(frozen=True)
class SourceSettings:
    """What may differ for one data source."""

    gate: Gate = field(default_factory=Gate)


@dataclass(frozen=True)
class ComposedTerm:
    """A term on demonstrations. estimator: as a composed method's rollouts; the advantage is unit by default, except
    that an R term's parts without one have ``centered``."""

    kind: Literal["S", "R"]
    scale: float = 1.0
    estimator: str | dict[str, str] = field(default_factory=lambda: {"advantage": "unit"})


@dataclass(frozen=True)
class Compose:
    """A method put together by hand: estimators by name or by their four parts.

    rollouts: a method's name or {mask, reference, advantage, likelihood}; demos: a list of
    {kind: S | R, scale: 1.0, estimator: as rollouts}.
    """

    rollouts: str | dict[str, str] | None = "dr_grpo"
    demos: list[ComposedTerm] = field(default_factory=list)
    place: Literal["separate", "group"] = "separate"
    when: Literal["gate", "always", "never", "soft", "unrewarded", "own"] = "gate"
    normalization: str = "question"


@dataclass(frozen=True)
class Settings:
    """Node ``hpt``. Defaults are right without reading; see the README for each."""

    method: str = "hpt"
    normalization: str | None = None
    demo_coef: float | Schedule = 0.1
    rl_length_scale: float | None = None
    question_key: str | None = None
    modules: list[str] = field(default_factory=list)
    compose: Compose | None = None
    options: dict[str, float] = field(default_factory=dict)
    gate: Gate = field(default_factory=Gate)
    per_source: dict[str, SourceSettings] = field(default_factory=dict)
    demo: Demo = field(default_factory=Demo)
    rollouts: Rollouts = field(default_factory=Rollouts)
    history: History = field(default_factory=History)
    seed: int = 0


def load(node: Mapping | None) -> Settings:
    """Settings from the plain dictionary of node ``hpt``.

    Raises:
        UserError: every unknown or ill-typed key and every value out of its range: the key, the value, the choices.
    """
    node, problems = {} if node is None else node, []
    if isinstance(node, Mapping) and isinstance(node.get("per_source"), Mapping):
        sources = {
            source: {**own, "gate": _over(node.get("gate", {}), own.get("gate", {}))}
            if isinstance(own, Mapping)
            else own
            for source, own in node["per_source"].items()
        }
        node = {**node, "per_source": sources}
    settings = build(Settings, node, "hpt", problems)
    if settings is not WRONG:
        _check(settings, problems)
    raise_all(problems, "these settings cannot work:")
    return settings


def _over(general: Any, own: Any) -> Any:
    """A source's gate: the general one, under its own keys. Its own switch replaces the general one, of any kind."""
    if not isinstance(general, Mapping) or not isinstance(own, Mapping):
        return own
    switch = {"threshold", "count", "function"}
    return {key: value for key, value in general.items() if not (switch & own.keys() and key in switch)} | {**own}


def resolve_method(settings: Settings) -> Method:
    """The method that the settings name or compose, with user modules imported and ``gate.off``'s zone added.

    Raises:
        UserError: a module that does not import, an unknown method or part.
    """
    for module in settings.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"hpt.modules: cannot import {module!r} ({error}); is it on PYTHONPATH?") from error
    if settings.compose is not None:
        method = _composed(settings.compose)
    elif settings.method in METHODS:
        method = METHODS[settings.method]
    else:
        raise UserError(f"hpt.method={settings.method!r} is unknown; one of {', '.join(METHODS)}")
    gates, problems = [settings.gate, *(own.gate for own in settings.per_source.values())], []
    if any(gate.off is not None for gate in gates):
        if method.when != "gate":
            raise UserError(f"hpt.gate.off is set, but method {method.name!r} has no gate (when={method.when!r})")
        method = dataclasses.replace(method, off_zone=method.term("R") or OFF_ZONE)
    for gate in gates:
        for key, name in (("function", gate.function), ("soft", gate.soft)):
            if isinstance(name, str) and name not in GATES:
                problems.append(
                    f"hpt.gate.{key}={name!r} is not registered; known: {', '.join(GATES)}. Name the module that "
                    "registers it in hpt.modules"
                )
        if gate.function in GATES:
            first = ask(gate.function, Outcome(np.zeros(1), gate.at(0)))
            terms = (method.term("R") if first.off else None, method.term("S") if first.sft else None)
            if (first.off or first.sft) and not first.on and not any(terms):
                problems.append(
                    f"hpt.gate.function={gate.function!r} gives an unsolved question a share of a term that method "
                    f"{method.name!r} has not (off {first.off:g}: R, sft {first.sft:g}: S), and it would be dropped"
                )
    if any(gate.soft is not None for gate in gates) and method.when != "soft":
        problems.append(f"hpt.gate.soft is set, but method {method.name!r} does not read it; set hpt.method=hpt_soft")
    raise_all(list(dict.fromkeys(problems)), f"method {method.name!r} and its gates do not fit:")
    return method


def clips(actor: Mapping) -> dict[str, Any]:
    """Clip range and dual clip of verl's ``actor.*``, as its losses read them: clip_ratio where low or high is null."""
    low, high = (actor.get(name) for name in ("clip_ratio_low", "clip_ratio_high"))
    both = actor.get("clip_ratio")
    return {
        "clip_low": both if low is None else low,
        "clip_high": both if high is None else high,
        "clip_c": actor.get("clip_ratio_c"),
    }


def constants(settings: Settings, clip_low: float = 0.2, clip_high: float = 0.2, clip_c: float = 3.0) -> Constants:
    """Numbers of the methods: clip range from verl's ``actor.*``, the rest from ``hpt.options``."""
    return Constants(clip_low=clip_low, clip_high=clip_high, clip_c=clip_c, **settings.options)


def _composed(compose: Compose) -> Method:
    try:
        rollouts = None if compose.rollouts is None else estimator_of(compose.rollouts, "hpt.compose.rollouts")
        terms = []
        for i, term in enumerate(compose.demos):
            parts = term.estimator
            if term.kind == "S" and isinstance(parts, Mapping):
                parts = {"advantage": "unit", **parts}
            estimator = estimator_of(parts, f"hpt.compose.demos[{i}].estimator")
            terms.append(Term(term.kind, estimator, term.scale))
        return Method("composed", rollouts, tuple(terms), compose.place, compose.when, compose.normalization)
    except ValueError as error:
        said = str(error)
        raise UserError(said if said.startswith("hpt.") else f"hpt.compose: {said}") from error


def _check(settings: Settings, problems: list[str]) -> None:
    """Ranges and choices that types do not say; problems gains those of keys that it does not name yet."""
    named = tuple(problems)

    def need(ok: bool, key: str, value: Any, what: str) -> None:
        if not ok and not any(problem.startswith(tuple(f"hpt.{key}{end}" for end in "=.[:")) for problem in named):
            problems.append(f"hpt.{key}={value!r}: must be {what}")

    need(
        settings.normalization in (None, *NORMALIZATIONS),
        "normalization", settings.normalization, f"null or one of {', '.join(NORMALIZATIONS)}",
    )  # fmt: skip
    need(all(x >= 0 for x in _numbers(settings.demo_coef)), "demo_coef", settings.demo_coef, "at least 0")
    _check_schedule(need, "demo_coef", settings.demo_coef)
    scale = settings.rl_length_scale
    need(scale is None or scale > 0, "rl_length_scale", scale, "null (data.max_response_length) or above 0")
    allowed = {f.name for f in dataclasses.fields(Constants)} - {"clip_low", "clip_high", "clip_c"}
    for name, value in settings.options.items():
        choices = f"one of {', '.join(sorted(allowed))}{nearest(name, allowed)}"
        ok, what = RANGES[name] if name in allowed else (lambda _: False, choices)
        need(ok(value), f"options.{name}", value, what)
    for name in settings.modules:
        need(all(part.isidentifier() for part in name.split(".")), "modules", name, "names of modules, as in import")
    if settings.compose is not None:
        need(settings.method == "hpt", "method", settings.method, "left out where hpt.compose puts a method together")
        need(settings.compose.normalization in NORMALIZATIONS, "compose.normalization", settings.compose.normalization,
             f"one of {', '.join(NORMALIZATIONS)}")  # fmt: skip
        for i, term in enumerate(settings.compose.demos):
            need(term.scale > 0, f"compose.demos[{i}].scale", term.scale, "above 0; or leave the term out")
    for where, gate in [("gate", settings.gate)] + [
        (f"per_source.{s}.gate", o.gate) for s, o in settings.per_source.items()
    ]:
        if isinstance(gate.soft, list):
            need(len(gate.soft) >= 2 and all(len(row) == 3 and min(row) >= 0 for row in gate.soft), f"{where}.soft",
                 gate.soft, "a table of at least two rows (on, off, sft), none negative")  # fmt: skip
        for name in ("threshold", "off"):
            value = getattr(gate, name)
            _check_schedule(need, f"{where}.{name}", value)
    need(settings.demo.per_question >= 1, "demo.per_question", settings.demo.per_question, "at least 1")
    by_column = settings.demo.select == "likelihood" and settings.demo.likelihood_of == "column"
    need(not by_column or settings.demo.log_likelihood is not None, "demo.log_likelihood", None,
         "the column that hpt.demo.select=likelihood compares (`verl-hpt data likelihood` writes one); or set "
         "hpt.demo.likelihood_of to policy or reference")  # fmt: skip
    history, early = settings.history, settings.history.early_gate
    need(history.retire_after is None or history.retire_after >= 1, "history.retire_after", history.retire_after,
         "null or at least 1")  # fmt: skip
    need(history.cooldown >= 0, "history.cooldown", history.cooldown, "at least 0 (steps)")
    if early is not None:
        need(early.after_failures >= 1, "history.early_gate.after_failures", early.after_failures, "at least 1")
        need(early.rollouts >= 1, "history.early_gate.rollouts", early.rollouts, "at least 1")


def _numbers(value: float | Schedule | None) -> list[float]:
    """The numbers that a setting's bounds hold for."""
    found = [value.start, value.end] if isinstance(value, Schedule) else [value]
    return [x for x in found if x is not None]


def _check_schedule(need: Callable, key: str, value: float | Schedule | None) -> None:
    if isinstance(value, Schedule):
        need(value.steps >= 1, f"{key}.steps", value.steps, "at least 1")
        need(value.warmup >= 0, f"{key}.warmup", value.warmup, "at least 0 (steps)")


def defaults() -> dict[str, Any]:
    """Every key with its default, as plain values, for Hydra's ``--config-name hpt_trainer``."""
    return dataclasses.asdict(Settings())
