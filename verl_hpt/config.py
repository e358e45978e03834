"""The settings, node ``hpt`` of verl's config: typed, checked once before any model loads, turned into plain values.

Nothing behind this file sees a config object: the plan gets ``PlanSettings``, the worker ``LossSpec``. Every key's
type, bounds, default and meaning stand at the key; ``verl-hpt settings`` prints them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from verl_hpt.demos.demonstration import COLUMNS
from verl_hpt.errors import UserError, checked, nearest, raise_all, read, setting
from verl_hpt.estimator import Estimator, Method, Place, Term
from verl_hpt.gate import GATES, GateSettings, Outcome, arguments, ask
from verl_hpt.methods import METHODS, OFF_ZONE
from verl_hpt.normalize import NORMALIZATIONS
from verl_hpt.parts import KINDS, PARTS, Constants
from verl_hpt.places.schedule import Schedule, Steered, at
from verl_hpt.places.starts import Start, merged

Normalization = Literal[NORMALIZATIONS]


@checked
class Gate:
    threshold: float | Schedule = setting(0.0, "γ: imitate where solved ≤ γ·n; below 0 never, from 1 on always")
    count: int | None = setting(None, "the same as a number of rollouts; below 0 never")
    success: float = setting(1.0, "score from which a rollout counts as solved")
    finished: bool = setting(True, "a rollout that was cut at the length limit never counts as solved")
    metric: str | None = setting(None, "key of the reward's extra info that is compared with success, not the score")
    off: float | Schedule | None = setting(None, "upper bound, a share, of the zone trained off-policy on the demo")
    soft: list[list[float]] | str | None = setting(
        None,
        "of hpt_soft: a table of (on, off, sft) by number solved, `linear`, `cosine`, your gate; null: HPT's",
    )
    function: str | None = setting(None, "a gate of your own, registered with verl_hpt.register_gate")
    kwargs: dict[str, Any] = setting(dict, "keyword arguments of hpt.gate.function")

    def __post_init__(self):
        table = self.soft if isinstance(self.soft, list) else [[0.0] * 3] * 2
        if len(table) < 2 or not all(len(row) == 3 and min(row) >= 0 for row in table):
            raise ValueError(f"soft={table!r}: must be a table of at least two rows (on, off, sft), none negative")

    def at(self, step: int) -> GateSettings:
        """The plain numbers of one step."""
        values = {f.name: at(getattr(self, f.name), step) for f in dataclasses.fields(GateSettings)}
        table = values["soft"]
        return GateSettings(**{**values, "soft": tuple(map(tuple, table)) if isinstance(table, list) else table})


@checked
class Rollouts:
    # DAPO's overlong filtering (arXiv 2503.14476, section 3.4) masks before Â, which is 0 where all the rest are right.

    truncated: Literal["keep", "unsolved", "mask"] = setting(
        "keep", "cut rollouts: keep; count as unsolved (in Â: 0, or the group's lowest below 0); or mask, drop after Â"
    )


def _with_columns(cls: type) -> type:
    """The same class with a key for each of the columns beside demonstrations."""
    for name, column in COLUMNS.items():
        if name not in cls.__annotations__:
            cls.__annotations__[name] = str | None
            setattr(cls, name, setting(None, f"column: {column.meaning}"))
    return cls


@checked
@_with_columns
class Demo:
    """Each column holds one value for a row with one demonstration, or a list with one for each."""

    key: str = setting("target", "column with demonstrations: a string, chat messages, or a list of either")
    reward: float | str | None = setting(
        None, "what one counts as, a number or a column; null: gate.success, in a group at least the group's best"
    )
    eos: int | None = setting(None, "id of the token that ends an answer; null: the tokenizer's")
    on_unusable: Literal["keep", "error"] = setting("keep", "keep the question's rollouts, or stop with an error")
    per_question: int = setting(1, "how many of a question's demonstrations are used at once", ge=1)
    select: Literal["first", "random", "round_robin", "shortest", "likelihood", "unseen_first"] = setting(
        "first", "which of them; likelihood: the likeliest a token (GRAPE)"
    )
    likelihood_of: Literal["column", "policy", "reference"] = setting(
        "column",
        "whose likelihood: a column's, or by a forward pass the policy's of the step or the reference model's",
    )

    def __post_init__(self):
        if self.select == "likelihood" and self.likelihood_of == "column" and self.log_likelihood is None:
            raise ValueError(
                "log_likelihood=null: must be the column that hpt.demo.select=likelihood compares (`verl-hpt data "
                "likelihood` writes one); or set hpt.demo.likelihood_of to policy or reference"
            )

    def columns(self) -> dict[str, str]:
        """The columns beside the demonstrations' own."""
        return {name: getattr(self, name) for name in COLUMNS if isinstance(getattr(self, name), str)}


@checked
class EarlyGate:
    after_failures: int = setting(..., "draws of the question in a row without a solved rollout", ge=1)
    rollouts: int = setting(1, "rollouts that such a question gets", ge=1)


@checked
class History:
    retire_after: int | None = setting(None, "uses after which a demonstration is retired for the question", ge=1)
    cooldown: int = setting(0, "steps that a question's demonstrations rest after a use", ge=0)
    early_gate: EarlyGate | None = setting(None, "fewer rollouts for questions that failed so often in a row")
    on_missing: Literal["error", "empty"] = setting(
        "error",
        "a resumed run lacks the history it needs, or its questions are named otherwise: stop, or start empty",
    )


@checked
class SourceSettings:
    gate: Gate = setting(Gate, "hpt.gate under this source's own keys")


@checked
class Stream:
    files: str | list[str] | None = setting(None, "parquet files of demonstrations, in the form of the training data's")
    batch: int = setting(64, "demonstrations a step", ge=1)


@checked
class Buffer:
    size: int = setting(128, "entries that an optimizer step of the buffer takes; it waits for so many", ge=1)
    content: Literal["demonstrations", "successes"] = setting(
        "demonstrations",
        "of questions that the gate sends to them; or own solved rollouts of questions that are partly solved",
    )


@checked
class ComposedTerm:
    kind: Literal["S", "R"] = setting(..., "S imitates, R reinforces")
    scale: float = setting(1.0, "its weight; or leave the term out", gt=0)
    estimator: str | dict[str, str] = setting(
        lambda: {"advantage": "unit"}, "as of rollouts, advantage unit by default; parts of an R term: centered"
    )


@checked
class Compose:
    rollouts: str | dict[str, str] | None = setting(
        "dr_grpo", "a method's name, or {mask, reference, advantage, likelihood}; null: no term on rollouts"
    )
    demos: list[ComposedTerm] = setting(list, "terms on demonstrations, one S and one R at most")
    place: Place = setting(
        "separate", "where demonstrations stand: by themselves, in the rollouts' group, or elsewhere"
    )
    when: Literal["gate", "always", "never", "soft", "unrewarded", "own"] = setting("gate", "when demonstrations train")
    normalization: Normalization = setting("question", "as hpt.normalization")


def _constants_as(name: str, keys: Mapping[str, str]) -> type:
    """Constants as a node of settings, under the keys given."""
    of = {f.name: dataclasses.field(default=f.default, metadata=f.metadata) for f in dataclasses.fields(Constants)}
    values = {new: of[old] for new, old in keys.items()}
    return checked(type(name, (), {"__annotations__": dict.fromkeys(keys, float), **values}))


# verl's own constants, of ``actor.*``; the others are of ``hpt.options``.
CLIPS = {"clip_ratio_low": "clip_low", "clip_ratio_high": "clip_high", "clip_ratio_c": "clip_c"}
Clips = _constants_as("Clips", CLIPS)
Options = _constants_as(
    "Options", {f.name: f.name for f in dataclasses.fields(Constants) if f.name not in CLIPS.values()}
)


@checked
class Settings:
    method: str = setting("hpt", "a row of `verl-hpt methods`")
    normalization: Normalization | None = setting(None, "how a row's tokens are weighted; null: the method's own")
    demo_coef: float | Schedule | Steered | None = setting(
        None, "λ, weight of SFT-shaped terms (metric hpt/demo_to_rl_weight); null: the method's own, mostly 0.1", ge=0
    )
    rl_length_scale: float | None = setting(
        None, "L of normalization `question` and `official`; null: data.max_response_length", gt=0
    )
    question_key: str | None = setting(
        None, "column that names a question, for histories where prompts hold the date; null: hash of source and prompt"
    )
    modules: list[str] = setting(list, "modules of your own to import, here and in the workers")
    compose: Compose | None = setting(None, "a method put together from its parts, in place of hpt.method")
    options: Options = setting(Options, "constants of the methods")
    gate: Gate = setting(Gate, "when a question learns from its demonstration instead of its rollouts")
    per_source: dict[str, SourceSettings] = setting(
        dict, "the gate of a data source: '++hpt.per_source={openai/gsm8k:{gate:{threshold:0.25}}}'"
    )
    demo: Demo = setting(Demo, "where demonstrations come from, and which of them are used")
    rollouts: Rollouts = setting(Rollouts, "what becomes of rollouts that were cut")
    history: History = setting(History, "what follows from a question's history")
    start: Start | None = setting(None, "how rollouts start from demonstrations; null: the method's own")
    stream: Stream = setting(Stream, "demonstrations beside the questions")
    buffer: Buffer = setting(Buffer, "demonstrations that are collected, and trained on in steps of their own")
    seed: int = setting(0, "of the order of questions and of the choice of demonstrations")

    def __post_init__(self):
        problems = [
            f"modules={name!r}: must be names of modules, as in import"
            for name in self.modules
            if not all(part.isidentifier() for part in name.split("."))
        ]
        if self.compose is not None and self.method != "hpt":
            problems.append(f"method={self.method!r}: must be left out where hpt.compose puts a method together")
        if problems:
            raise ValueError("\n".join(problems))


def load(node: Mapping | None) -> Settings:
    """Settings from the plain dictionary of node ``hpt``.

    Raises:
        UserError: every unknown or ill-typed key and every value out of its range: the key, the value, the choices.
    """
    settings, problems = parse(node)
    raise_all(problems, "these settings cannot work:")
    return settings


def parse(node: Mapping | None) -> tuple[Settings | None, list[str]]:
    """As ``load``; or None, and the problems."""
    node = {} if node is None else node
    if isinstance(node, Mapping) and isinstance(node.get("per_source"), Mapping):
        sources = {str(name): _over(node.get("gate", {}), source) for name, source in node["per_source"].items()}
        node = {**node, "per_source": sources}
    return read(Settings, node, "hpt")


def _over(general: Any, source: Any) -> Any:
    """A source with the general gate under its own gate's keys. Its own switch replaces the general one."""
    own = source.get("gate", {}) if isinstance(source, Mapping) else None
    if not isinstance(general, Mapping) or not isinstance(own, Mapping):
        return source
    switch = {"threshold", "count", "function"}
    replaced = switch | {"kwargs"} if switch & own.keys() else set()
    return {**source, "gate": {name: value for name, value in general.items() if name not in replaced} | {**own}}


def demo_coef(settings: Settings, method: Method) -> float | Schedule | Steered:
    """λ of a run."""
    return method.demo_coef if settings.demo_coef is None else settings.demo_coef


def start_of(settings: Settings, method: Method) -> Start:
    """How the rollouts of a run start."""
    return merged(settings.start, method.start)


def gates(settings: Settings) -> dict[str, Gate]:
    """Every gate by its key."""
    sources = {f"hpt.per_source.{source}.gate": own.gate for source, own in settings.per_source.items()}
    return {"hpt.gate": settings.gate, **sources}


def resolve_method(settings: Settings) -> Method:
    """The method that the settings name or compose, with user modules imported and ``gate.off``'s zone added.

    Raises:
        UserError: every module that does not import, an unknown method or part, gates that do not fit it.
    """
    method, problems = find_method(settings)
    raise_all(problems, f"method {settings.method!r} and its gates do not fit:")
    return method


def find_method(settings: Settings) -> tuple[Method | None, list[str]]:
    """As ``resolve_method``, with the problems beside it; None where there is no such method."""
    method, problems = None, []
    for module in settings.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"hpt.modules: cannot import {module!r} ({error}); is it on PYTHONPATH?")
    try:
        method = METHODS.get(settings.method) if settings.compose is None else _composed(settings.compose)
    except UserError as error:
        problems.append(str(error))
    else:
        if method is None:
            problems.append(f"hpt.method={settings.method!r} is unknown; one of {', '.join(METHODS)}")
    if method is not None and any(gate.off is not None for gate in gates(settings).values()):
        if method.when == "gate" and method.place == "buffer":
            problems.append(f"hpt.gate.off is set, but method {method.name!r} has no term off-policy; drop it")
        elif method.when == "gate":
            method = dataclasses.replace(method, off_zone=method.term("R") or OFF_ZONE)
        else:
            problems.append(f"hpt.gate.off is set, but method {method.name!r} has no gate (when={method.when!r})")
    general = list(_gate_problems(settings.gate, method))
    problems += general
    for where, gate in gates(settings).items():
        problems += [text.replace("hpt.gate", where) for text in _gate_problems(gate, method) if text not in general]
    return method, problems


def _gate_problems(gate: Gate, method: Method | None) -> Iterator[str]:
    """Names that are not registered, arguments that nothing takes, terms that the method has not."""
    for name, value in (("function", gate.function), ("soft", gate.soft)):
        if isinstance(value, str) and value not in GATES:
            yield (
                f"hpt.gate.{name}={value!r} is not registered; known: {', '.join(GATES)}. Name the module that "
                "registers it in hpt.modules"
            )
    key, name = ("function", gate.function) if gate.function is not None else ("soft", gate.soft)
    if gate.kwargs and not isinstance(name, str):
        yield "hpt.gate.kwargs is set, but no hpt.gate.function reads it; name one, or drop it"
    if method is not None and gate.soft is not None and method.when != "soft":
        yield f"hpt.gate.soft is set, but method {method.name!r} does not read it; set hpt.method=hpt_soft"
    if not isinstance(name, str) or name not in GATES:
        return
    signature, unsolved = inspect.signature(GATES[name]), Outcome(np.full(1, -np.inf), gate.at(0))
    positional = arguments(GATES[name], unsolved)
    try:
        signature.bind(*positional, **gate.kwargs)
    except TypeError as error:
        takes = list(signature.parameters)[len(positional) :]
        near = "".join(nearest(name, takes) for name in gate.kwargs if name not in takes)
        yield (
            f"hpt.gate.kwargs={gate.kwargs!r} does not fit hpt.gate.{key}={name!r}, {error}; it takes "
            f"{', '.join(takes) or 'none'}{near}"
        )
        return
    if gate.function is None:
        return
    try:
        first = ask(gate.function, unsolved)
        shares = first.on + first.off + first.sft
    except Exception as error:  # code of the user's
        yield f"hpt.gate.function={gate.function!r} fails where none of 1 is solved, kwargs={gate.kwargs!r}: {error!r}"
        return
    terms = () if method is None else (first.off and method.term("R"), first.sft and method.term("S"))
    if terms and shares and not first.on and not any(terms):
        yield (
            f"hpt.gate.function={gate.function!r} gives an unsolved question a share of a term that method "
            f"{method.name!r} has not (off {first.off:g}: R, sft {first.sft:g}: S), and it would be dropped"
        )


def clips(actor: Mapping) -> dict[str, Any]:
    """Clip range and dual clip of verl's ``actor.*``, as its losses read them: clip_ratio where low or high is null."""
    found = {constant: actor.get(name) for name, constant in CLIPS.items()}
    both = dict.fromkeys(("clip_low", "clip_high"), actor.get("clip_ratio"))
    return {name: both.get(name) if value is None else value for name, value in found.items()}


def constants(settings: Settings, **clip: float) -> Constants:
    """Numbers of the methods: clip range as of ``clips``, the rest from ``hpt.options``."""
    return Constants(**vars(settings.options), **clip)


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


def _composed(compose: Compose) -> Method:
    try:
        rollouts = None if compose.rollouts is None else estimator_of(compose.rollouts, "hpt.compose.rollouts")
        terms = []
        for i, term in enumerate(compose.demos):
            default = {"advantage": "unit"} if term.kind == "S" else {}
            parts = term.estimator if isinstance(term.estimator, str) else {**default, **term.estimator}
            terms.append(Term(term.kind, estimator_of(parts, f"hpt.compose.demos[{i}].estimator"), term.scale))
        return Method("composed", rollouts, tuple(terms), compose.place, compose.when, compose.normalization)
    except ValueError as error:
        text = str(error)
        raise UserError(text if text.startswith("hpt.") else f"hpt.compose: {text}") from error


def defaults() -> dict[str, Any]:
    """Every key with its default, as plain values, for Hydra's ``--config-name hpt_trainer``."""
    return dataclasses.asdict(Settings())
