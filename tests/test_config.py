"""Settings: typed, checked before a model loads, all at once, errors that name key, value and choices."""

import dataclasses
import math
import re
import sys

import numpy as np
import pytest

from verl_hpt import config
from verl_hpt.config import Schedule, load, resolve_method
from verl_hpt.errors import UserError, checked, read, setting
from verl_hpt.gate import Outcome, decide


def test_defaults_are_the_documented_ones():
    settings = load({})
    assert (settings.method, settings.normalization, settings.demo_coef) == ("hpt", None, None)
    assert config.demo_coef(settings, resolve_method(settings)) == 0.1 and settings.start is None
    assert (settings.stream.files, settings.stream.batch, settings.buffer.size) == (None, 64, 128)
    assert settings.buffer.content == "demonstrations"
    assert (settings.gate.threshold, settings.gate.count, settings.gate.success) == (0.0, None, 1.0)
    assert (settings.demo.key, settings.demo.on_unusable) == ("target", "keep")
    assert (settings.demo.per_question, settings.demo.select, settings.demo.reward) == (1, "first", None)
    assert (settings.history.cooldown, settings.history.retire_after, settings.seed) == (0, None, 0)
    assert config.EarlyGate(3).rollouts == 1 and config.Compose().rollouts == "dr_grpo"
    assert load(config.defaults()) == settings


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"methd": "hpt"}, r"hpt\.methd: unknown key.*method"),
        ({"gate": {"treshold": 0}}, r"hpt\.gate\.treshold: unknown key.*threshold"),
        (
            {"demo_coef": "much"},
            r"hpt\.demo_coef='much': must be null or a number or a schedule \{.*at least 0, got str",
        ),
        ({"demo_coef": True}, r"hpt\.demo_coef=True: must be null or a number or .* or a steered \{.*, got bool"),
        ({"demo_coef": -1}, r"hpt\.demo_coef=-1: must be .* at least 0: λ, weight of"),
        ({"demo_coef": float("nan")}, r"hpt\.demo_coef=nan: must be null or a number .*, and finite"),
        ({"gate": {"count": 1.5}}, r"hpt\.gate\.count=1\.5: must be null or a whole number, got float"),
        ({"gate": 3}, r"hpt\.gate=3: must be a mapping with keys threshold"),
        ({"gate": {"threshold": {"start": 1, "end": 0}}}, r"hpt\.gate\.threshold: needs steps"),
        ({"gate": {"threshold": "x"}}, r"hpt\.gate\.threshold='x': must be a number or a schedule"),
        ({"gate": {"soft": [[1, 0]]}}, r"hpt\.gate\.soft=.*rows \(on, off, sft\)"),
        ({"normalization": "mean"}, r"hpt\.normalization='mean': must be null or one of question, sequence"),
        ({"demo": {"on_unusable": "drop"}}, r"hpt\.demo\.on_unusable='drop': must be one of keep, error"),
        ({"options": {"gama": 1}}, r"hpt\.options\.gama: unknown key \(value 1\); one of shaping, "),
        ({"per_source": {"a": {"gates": {}}}}, r"hpt\.per_source\.a\.gates: unknown key"),
        ({"rl_length_scale": 0}, r"hpt\.rl_length_scale=0: must be null or a number above 0: .*null: data\.max_resp"),
        ({"modules": "mine"}, r"hpt\.modules='mine': must be a list"),
        (
            {"gate": {"threshold": {"start": 1, "end": 0, "steps": 0}}},
            r"hpt\.gate\.threshold\.steps=0: must be a whole number at least 1",
        ),
        (
            {"gate": {"off": {"start": 1, "end": 0, "steps": 0}}},
            r"gate\.off\.steps=0: must be a whole number at least 1",
        ),
        ({"gate": {"soft": [[0, 0, 1]]}}, r"hpt\.gate\.soft=.*: must be a table of at least two rows"),
        (
            {"gate": {"soft": [[0, 0], [1, 0]]}},
            r"hpt\.gate\.soft=.*: must be a table of at least two rows \(on, off, sft\)",
        ),
        ({"gate": {"soft": [[0, 0, 1], [1, 0, -1]]}}, r"hpt\.gate\.soft=.*none negative"),
        ({"demo": {"per_question": 0}}, r"hpt\.demo\.per_question=0: must be a whole number at least 1"),
        ({"history": {"retire_after": 0}}, r"hpt\.history\.retire_after=0: must be null or a whole number at least 1"),
        ({"history": {"cooldown": -1}}, r"hpt\.history\.cooldown=-1: must be a whole number at least 0: steps"),
        (
            {"history": {"early_gate": {"after_failures": 0}}},
            r"\.after_failures=0: must be a whole number at least 1",
        ),
        (
            {"history": {"early_gate": {"after_failures": 1, "rollouts": 0}}},
            r"early_gate\.rollouts=0: must be a whole number at least 1",
        ),
        ({"history": {"early_gate": {"rollouts": 2}}}, r"hpt\.history\.early_gate: needs after_failures; got rollouts"),
        (
            {"compose": {"normalization": "tokens"}},
            r"hpt\.compose\.normalization='tokens': must be one of question, seq",
        ),
        ({"compose": {"demos": [{"scale": 2}]}}, r"hpt\.compose\.demos\[0\]: needs kind; got scale"),
        (
            {"compose": {"demos": [{"kind": "S", "scale": 0}]}},
            r"demos\[0\]\.scale=0: must be a number above 0: .*or leave",
        ),
        ({"compose": {"demos": [{"kind": "S", "weight": 1}]}}, r"hpt\.compose\.demos\[0\]\.weight: unknown key"),
        ({"compose": {"rollouts": 5}}, r"hpt\.compose\.rollouts=5: must be null or text or a mapping, got int"),
        ({"modules": ["a/b.py"]}, r"hpt\.modules='a/b\.py': must be names of modules"),
        (
            {"per_source": {"a": {"gate": {"off": math.inf}}}},
            r"hpt\.per_source\.a\.gate\.off=inf: must be null or a number .*, and finite",
        ),
        ({"demo": {"select": "likelihood"}}, r"hpt\.demo\.log_likelihood=null: must be the column .*likelihood_of"),
    ],
)
def test_bad_settings_are_named_with_key_value_and_choices(node, message):
    with pytest.raises(UserError, match=message):
        load(node)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"method": "hptt"}, r"hpt\.method='hptt' is unknown; one of ppo, grpo"),
        ({"modules": ["no_such_module"]}, r"hpt\.modules: cannot import 'no_such_module'"),
        ({"compose": {"rollouts": "nothing"}}, r"hpt\.compose\.rollouts: unknown estimator 'nothing'"),
        ({"compose": {"rollouts": {"mask": "x"}}}, r"hpt\.compose\.rollouts\.mask: unknown mask 'x'; one of"),
        ({"compose": {"demos": [{"kind": "Q"}]}}, r"hpt\.compose\.demos\[0\]\.kind='Q': must be one of S, R"),
        (
            {"compose": {"demos": [{"kind": "S"}], "place": "group"}},
            r"hpt\.compose: .* member of the group stands always",
        ),
        ({"compose": {"demos": []}}, r"terms on demonstrations and when='gate' contradict"),
        ({"method": "luffy", "gate": {"off": 0.5}}, r"hpt\.gate\.off is set, but method 'luffy' has no gate"),
        ({"gate": {"soft": [[0, 0, 1], [1, 0, 0]]}}, r"hpt\.gate\.soft is set.*hpt_soft"),
        (
            {"method": "hpt_off_on", "gate": {"function": "linear"}},
            r"a term that method 'hpt_off_on' has not",
        ),
        ({"compose": {"demos": [{"kind": "R", "estimator": {}}]}}, r"no group to take centered over"),
        (
            {"compose": {"demos": [{"kind": "S", "estimator": "grpo"}]}},
            r"its S term on demonstrations takes the advantage standardized over a group.*set its advantage to unit",
        ),
        (
            {"compose": {"demos": [{"kind": "R", "estimator": "ppo"}]}},
            r"its R term on demonstrations takes the advantage gae.*set its advantage to unit or reward",
        ),
        ({"gate": {"function": "mine"}}, r"hpt\.gate\.function='mine' is not registered"),
        (
            {"method": "hpt_soft", "gate": {"soft": "steep"}},
            r"soft='steep' is not registered; known: linear",
        ),
    ],
)
def test_methods_and_parts_that_do_not_fit_are_named_with_the_choices(node, message):
    with pytest.raises(UserError, match=message):
        resolve_method(load(node))


def test_a_sources_gate_starts_from_the_general_one():
    node = {"gate": {"success": 0.5}, "per_source": {"openai/gsm8k": {"gate": {"threshold": 0.25}}}}
    gate = load(node).per_source["openai/gsm8k"].gate
    assert (gate.threshold, gate.success) == (0.25, 0.5)


def test_a_source_may_be_named_by_a_number():
    assert load({"per_source": {5: {"gate": {"count": 1}}}}).per_source["5"].gate.count == 1


def test_schedules_move_from_start_to_end_and_stay():
    linear = Schedule(0.5, 0.0, 100)
    assert [linear.at(s) for s in (0, 25, 50, 100, 500)] == [0.5, 0.375, 0.25, 0.0, 0.0]
    cosine = Schedule(1.0, 0.0, 100, "cosine")
    assert [round(cosine.at(s), 6) for s in (0, 50, 100)] == [1.0, 0.5, 0.0] and cosine.at(25) > 0.8


# --- every problem, not the first ------------------------------------------------------------------------------------


def problems(node) -> list[str]:
    with pytest.raises(UserError) as error:
        load(node)
    return str(error.value).removeprefix("these settings cannot work:\n  - ").split("\n  - ")


def test_every_problem_of_the_settings_is_said_at_once():
    node = {
        "methd": "hpt",
        "demo_coef": "x",
        "gate": {"threshold": math.inf, "success": True},
        "options": {"shaping": -0.5, "kl": [1]},
        "demo": {"per_question": 0},
        "compose": {"demos": [{"kind": "S", "scale": math.nan}, {"kind": "Q"}]},
        "history": {"cooldown": -1},
    }
    said = problems(node)
    keys = ("methd", "demo_coef", "gate.threshold", "gate.success", "options.shaping", "options.kl",
            "demo.per_question", "compose.demos[0].scale", "compose.demos[1].kind", "history.cooldown")  # fmt: skip
    assert len(said) == len(keys) and all(any(p.startswith(f"hpt.{key}") for p in said) for key in keys)


def test_a_key_of_a_wrong_type_is_not_named_again_for_the_default_that_stands_in():
    assert problems({"demo": {"select": "likelihood", "log_likelihood": 5}}) == [
        "hpt.demo.log_likelihood=5: must be null or text, got int"
    ]
    assert problems({"gate": {"soft": [[0, 0, 1], [1, 0, "x"]]}}) == [
        "hpt.gate.soft[1][2]='x': must be a number, got str"
    ]
    assert len(problems({"options": {"kl": "x", "k": 1}})) == 2


def test_problems_of_gates_and_method_come_at_once():
    node = {
        "method": "grpo",
        "gate": {"function": "mine", "soft": "linear"},
        "per_source": {"a": {"gate": {"soft": "x"}}},
    }
    with pytest.raises(UserError) as error:
        resolve_method(load(node))
    text = str(error.value)
    assert text.startswith("method 'grpo' and its gates do not fit:\n  - ") and text.count("\n  - ") == 3
    for part in (
        "hpt.gate.function='mine'",
        "hpt.per_source.a.gate.soft='x'",
        "hpt.gate.soft is set, but method 'grpo'",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("node", "near"),
    [
        ({"gate": {"treshold": 0}}, "did you mean threshold?"),
        ({"demo_coeff": 1}, "did you mean demo_coef?"),
        ({"options": {"shapng": 1}}, "did you mean shaping?"),
        ({"demo": {"select": "round-robin"}}, "did you mean round_robin?"),
        ({"history": {"cool_down": 1}}, "did you mean cooldown?"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one(node, near):
    assert problems(node)[0].endswith(near)
    assert "did you mean" not in problems({"zzzz": 1})[0]


UNFIT = {
    "number": ["x", "1.0", True, math.nan, math.inf, -math.inf, [1], {"a": 1}, 10**400],
    "whole number": ["1", True, 1.5, math.nan, [1], {"a": 1}],
    "text": [5, True, ["a"], {"a": "b"}, 1.5],
    "choice": ["nothing", 5, ["question"], {}, True, ""],
    "mapping": [5, "x", [1], True],
    "list": ["x", 5, {"a": 1}],
    "below 0": [-1, -0.5],
}
KEYS = {
    "demo_coef": ["number", "below 0"],
    "rl_length_scale": ["number", "below 0"],
    "gate.threshold": ["number"],
    "gate.success": ["number"],
    "gate.off": ["number"],
    "gate.count": ["whole number"],
    "demo.eos": ["whole number"],
    "demo.per_question": ["whole number"],
    "history.cooldown": ["whole number"],
    "history.retire_after": ["whole number"],
    "seed": ["whole number"],
    "question_key": ["text"],
    "method": ["choice"],
    "demo.key": ["text"],
    "normalization": ["choice"],
    "demo.on_unusable": ["choice"],
    "demo.select": ["choice"],
    "history.on_missing": ["choice"],
    "gate": ["mapping"],
    "demo": ["mapping"],
    "history": ["mapping"],
    "options": ["mapping"],
    "per_source": ["mapping"],
    "compose": ["mapping"],
    "modules": ["list"],
}
HOSTILE = [(key, value) for key, kinds in KEYS.items() for kind in kinds for value in UNFIT[kind]] + [
    ("gate", 5),
    ("gate.threshold", {"start": math.nan, "end": 0, "steps": 5}),
    ("gate.threshold", {"start": 0, "end": math.inf, "steps": 5}),
    ("gate.off", {"start": 0, "end": 0, "steps": 1.5}),
    ("gate.threshold", {"start": 0, "end": 0, "steps": 5, "shape": "steep"}),
    *(("gate.soft", x) for x in (5, True, [], ["x"], [[["a"]]], {}, "", [[0, 0, math.inf], [1, 0, 0]], [[0, 0], [1]])),
    *(("demo.reward", x) for x in (True, math.nan, math.inf, [1], {"a": 1})),
    *(("gate.function", x) for x in ("", "no_such_gate", 5, [1])),
    *(("compose", {"demos": [{"kind": "S", "scale": x}]}) for x in (math.nan, math.inf, -1, [1], "x", True, None, 0)),
    *(("compose", {"demos": x}) for x in (5, "S", [5], ["S"], [[]], {"kind": "S"}, [{}], [{"kind": ["S"]}], [None])),
    *(("compose", {"rollouts": x}) for x in (5, [], "", {"mask": 5}, {"mask": "no"}, {"masc": "x"}, {5: "x"})),
    *(("compose", {"demos": [{"kind": "S", "estimator": x}]}) for x in (5, None, [], "no", {"mask": ["x"]})),
    *(("per_source.a", x) for x in (5, "x", [], {"gate": 0}, {"gate": None}, {"gate": [1]}, {"gate": {"count": "x"}})),
    *(("history.early_gate", x) for x in (5, {}, "x", {"after_failures": "x"}, {"after_failures": 0})),
    *(("modules", x) for x in ([""], ["."], [".a"], ["a b"], ["a/b"], [5], [None], ["no_such_module_of_mine"])),
    *(("options.shaping", x) for x in ("x", None, True, math.nan, math.inf, [1])),
    *((key, 1) for key in ("no", "gate.no", "demo.no", "history.no", "options.no", "options.clip_c", "per_source.a.x")),
]  # fmt: skip


def nested(key: str, value) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda x: str(x)[:40])
def test_hostile_settings_get_an_error_that_names_the_key(key, value):
    with pytest.raises(UserError, match=re.escape(f"hpt.{key}")):
        resolve_method(load(nested(key, value)))


@pytest.mark.parametrize("node", [5, "x", [1], True, 0, "", {5: 1}, {"gate": {None: 1}}, {(1, 2): 3}], ids=str)
def test_a_hostile_node_is_refused(node):
    with pytest.raises(UserError, match=r"^hpt(\.gate)?[.=]"):
        load(node)


def test_no_node_is_the_defaults_and_null_is_not_a_mapping():
    assert load(None) == load({}) == config.Settings()
    assert problems({"gate": None}) == [
        "hpt.gate=null: must be a mapping with keys " + ", ".join(f.name for f in dataclasses.fields(config.Gate))
    ]


@checked
class Plain:
    switch: bool = setting(False, "")
    count: int = setting(0, "")
    name: str = setting("a", "")
    number: float = setting(0.0, "")


def test_a_value_is_of_its_type_and_nothing_else():
    edges = {"switch": True, "count": 3, "name": "b", "number": sys.float_info.max}
    assert read(Plain, edges, "a") == (Plain(**edges), [])
    assert type(read(Plain, {"number": 1}, "a")[0].number) is float, "a whole number is a number"
    for key, value, what in (
        ("switch", 1, "true or false, got int"),
        ("switch", "true", "true or false, got str"),
        ("count", True, "a whole number, got bool"),
        ("name", 1, "text, got int"),
        ("name", "", "text, and not empty"),
        ("number", True, "a number, got bool"),
        ("number", "1", "a number, got str"),
        ("number", -math.inf, "a number, and finite"),
    ):
        assert read(Plain, {key: value}, "a") == (None, [f"a.{key}={value!r}: must be {what}"])
    assert problems({"history": {"early_gate": {}}}) == ["hpt.history.early_gate: needs after_failures; got nothing"]


def test_numbers_at_the_edge_are_taken():
    settings = load({"demo_coef": 0, "gate": {"threshold": -1, "count": -1}, "demo": {"reward": -2, "per_question": 1}})
    assert (settings.demo_coef, settings.demo.reward) == (0.0, -2.0)
    outcomes = [Outcome(np.array([1.0] * k + [0.0] * (4 - k)), settings.gate.at(0)) for k in (0, 4)]
    assert [decide("gate", outcome).zone for outcome in outcomes] == ["rl", "rl"], "a count below 0: never"
    edge = {"history": {"cooldown": 0, "retire_after": 1, "early_gate": {"after_failures": 1, "rollouts": 1}}}
    assert load(edge).history.early_gate.after_failures == 1
    assert load({"gate": {"threshold": {"start": 1, "end": 0, "steps": 1}}}).gate.at(1).threshold == 0.0
    assert load({"rl_length_scale": 1e-3}).rl_length_scale == 1e-3
    assert load({"gate": {"soft": [[0, 0, 1], [1, 0, 0]]}}).gate.soft == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "node",
    [
        {"question_key": ""},
        {"gate": {"metric": ""}},
        {"gate": {"function": ""}},
        {"demo": {"key": ""}},
        {"demo": {"source": ""}},
        {"per_source": {"a": {"gate": {"metric": ""}}}},
    ],
    ids=str,
)
def test_no_name_is_empty(node):
    with pytest.raises(UserError, match=r"='': must be (null or )?text, and not empty"):
        load(node)
