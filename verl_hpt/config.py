"""The settings, node ``hpt`` of verl's config: typed, checked once before any model loads, turned into plain values.

Nothing behind this file sees a config object: the plan gets ``PlanSettings``, the worker ``LossSpec``.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from verl_hpt.demo_columns import DemoColumns
from verl_hpt.errors import UserError
from verl_hpt.estimator import METHODS, OFF_ZONE, Method, Term, estimator_of
from verl_hpt.gate import GATES, GateSettings
from verl_hpt.normalize import NORMALIZATIONS
from verl_hpt.parts import Constants


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

    def columns(self) -> DemoColumns:
        """The columns beside the demonstrations' own."""
        named = {name: getattr(self, name) for name in vars(DemoColumns()) if isinstance(getattr(self, name), str)}
        return DemoColumns(**named)


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
class Compose:
    """A method put together by hand: estimators by name or by their four parts.

    rollouts: a method's name or {mask, reference, advantage, likelihood}; demos: a list of
    {kind: S | R, scale: 1.0, estimator: as rollouts}.
    """

    rollouts: str | dict[str, str] | None = "dr_grpo"
    demos: list[dict[str, Any]] = field(default_factory=list)
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
        UserError: an unknown or ill-typed key, or a value out of its range: the key, the value and the choices.
    """
    node = dict(node or {})
    if isinstance(node.get("per_source"), Mapping):
        node["per_source"] = {
            source: {**own, "gate": _over(node.get("gate") or {}, own.get("gate") or {})}
            if isinstance(own, Mapping)
            else own
            for source, own in node["per_source"].items()
        }
    settings = _build(Settings, node, "hpt")
    _check(settings)
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
    gates = [settings.gate, *(own.gate for own in settings.per_source.values())]
    if any(gate.off is not None for gate in gates):
        if method.when != "gate":
            raise UserError(f"hpt.gate.off is set, but method {method.name!r} has no gate (when={method.when!r})")
        method = dataclasses.replace(method, off_zone=method.term("R") or OFF_ZONE)
    for gate in gates:
        for key, name in (("function", gate.function), ("soft", gate.soft)):
            if isinstance(name, str) and name not in GATES:
                raise UserError(
                    f"hpt.gate.{key}={name!r} is not registered; known: {', '.join(GATES)}. Name the module that "
                    "registers it in hpt.modules"
                )
        if gate.function is not None:
            first = GATES[gate.function](0, 1, gate.at(0))
            terms = (method.term("R") if first.off else None, method.term("S") if first.sft else None)
            if (first.off or first.sft) and not first.on and not any(terms):
                raise UserError(
                    f"hpt.gate.function={gate.function!r} gives an unsolved question a share of a term that method "
                    f"{method.name!r} has not (off {first.off:g}: R, sft {first.sft:g}: S), and it would be dropped"
                )
    if any(gate.soft is not None for gate in gates) and method.when != "soft":
        raise UserError(f"hpt.gate.soft is set, but method {method.name!r} does not read it; set hpt.method=hpt_soft")
    return method


def constants(settings: Settings, clip_low: float = 0.2, clip_high: float = 0.2, clip_c: float = 3.0) -> Constants:
    """Numbers of the methods: clip range from verl's ``actor.*``, the rest from ``hpt.options``."""
    return Constants(clip_low=clip_low, clip_high=clip_high, clip_c=clip_c, **settings.options)


def _composed(compose: Compose) -> Method:
    try:
        rollouts = None if compose.rollouts is None else estimator_of(compose.rollouts, "hpt.compose.rollouts")
        terms = []
        for i, term in enumerate(compose.demos):
            where = f"hpt.compose.demos[{i}]"
            unknown = set(term) - {"kind", "scale", "estimator"}
            if unknown or term.get("kind") not in ("S", "R"):
                raise UserError(f"{where}: needs kind (S or R), scale and estimator; got {dict(term)}")
            estimator = estimator_of(term.get("estimator", {"advantage": "unit"}), f"{where}.estimator")
            terms.append(Term(term["kind"], estimator, float(term.get("scale", 1.0))))
        return Method("composed", rollouts, tuple(terms), compose.place, compose.when, compose.normalization)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _check(settings: Settings) -> None:
    """Ranges and choices that types do not say."""

    def need(ok: bool, key: str, value: Any, what: str) -> None:
        if not ok:
            raise UserError(f"hpt.{key}={value!r}: must be {what}")

    need(
        settings.normalization in (None, *NORMALIZATIONS),
        "normalization", settings.normalization, f"null or one of {', '.join(NORMALIZATIONS)}",
    )  # fmt: skip
    need(all(x >= 0 for x in _numbers(settings.demo_coef)), "demo_coef", settings.demo_coef, "at least 0")
    _check_schedule(need, "demo_coef", settings.demo_coef)
    scale = settings.rl_length_scale
    need(scale is None or scale > 0, "rl_length_scale", scale, "null (data.max_response_length) or above 0")
    allowed = {f.name for f in dataclasses.fields(Constants)} - {"clip_low", "clip_high", "clip_c"}
    for name in settings.options:
        need(name in allowed, f"options.{name}", settings.options[name], f"one of {', '.join(sorted(allowed))}")
    for where, gate in [("gate", settings.gate)] + [
        (f"per_source.{s}.gate", o.gate) for s, o in settings.per_source.items()
    ]:
        if isinstance(gate.soft, list):
            need(len(gate.soft) >= 2 and all(len(row) == 3 and min(row) >= 0 for row in gate.soft), f"{where}.soft",
                 gate.soft, "a table of at least two rows (on, off, sft), none negative")  # fmt: skip
        for name in ("threshold", "off"):
            value = getattr(gate, name)
            need(all(map(math.isfinite, _numbers(value))), f"{where}.{name}", value, "finite")
            _check_schedule(need, f"{where}.{name}", value)
        need(math.isfinite(gate.success), f"{where}.success", gate.success, "finite")
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


def _build(kind: Any, value: Any, path: str) -> Any:
    """A value of the wanted type, or a UserError that names the path, the value and what it may be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: must be a mapping with keys {', '.join(_keys(kind))}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise UserError(f"{path}.{key}: unknown key (value {value[key]!r}); one of {', '.join(_keys(kind))}")
        built = {key: _build(hints[key], item, f"{path}.{key}") for key, item in value.items()}
        missing = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in built]
        if missing:
            raise UserError(f"{path}: needs {', '.join(missing)}; got {', '.join(value) or 'nothing'}")
        return kind(**built)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        wanted = [arg for arg in args if arg is not type(None)]
        if isinstance(value, Mapping):  # the error of the one that could fit is the helpful one
            wanted = [
                arg for arg in wanted if dataclasses.is_dataclass(arg) or typing.get_origin(arg) is dict
            ] or wanted
        if len(wanted) == 1:
            return _build(wanted[0], value, path)
        for arg in wanted:
            try:
                return _build(arg, value, path)
            except UserError:
                continue
        raise UserError(f"{path}={value!r}: must be {_name(kind)}")
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{path}={value!r}: must be one of {', '.join(map(str, args))}")
    if origin is list:
        if isinstance(value, (list, tuple)):
            return [_build(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
        raise UserError(f"{path}={value!r}: must be a list")
    if origin is dict:
        if isinstance(value, Mapping):
            return {str(key): _build(args[1], item, f"{path}.{key}") for key, item in value.items()}
        raise UserError(f"{path}={value!r}: must be a mapping")
    if kind is Any:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    if kind in (int, str, bool) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{path}={value!r}: must be {_name(kind)}, got {type(value).__name__}")


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _keys(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _name(kind: Any) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_name(arg) for arg in args)
    plain = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
    if kind is Schedule:
        return "a schedule {start, end, steps, shape: linear | cosine | step, warmup: 0}"
    return plain.get(kind, str(kind))


def defaults() -> dict[str, Any]:
    """Every key with its default, as plain values, for Hydra's ``--config-name hpt_trainer``."""
    return dataclasses.asdict(Settings())
