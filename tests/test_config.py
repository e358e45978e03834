"""Settings: typed, checked before a model loads, errors that name key, value and choices; refusals all at once."""

import pytest

from verl_hpt import config
from verl_hpt.config import Schedule, load, resolve_method
from verl_hpt.errors import UserError


def test_defaults_are_the_documented_ones():
    settings = load({})
    assert (settings.method, settings.normalization, settings.demo_coef) == ("hpt", None, 0.1)
    assert (settings.gate.threshold, settings.gate.count, settings.gate.success) == (0.0, None, 1.0)
    assert (settings.demo.key, settings.demo.on_unusable) == ("target", "keep")
    assert load(config.defaults()) == settings


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"methd": "hpt"}, r"hpt\.methd: unknown key.*method"),
        ({"gate": {"treshold": 0}}, r"hpt\.gate\.treshold: unknown key.*threshold"),
        ({"demo_coef": "much"}, r"hpt\.demo_coef='much': must be a number"),
        ({"demo_coef": True}, r"hpt\.demo_coef=True: must be a number"),
        ({"demo_coef": -1}, r"hpt\.demo_coef=-1\.0: must be at least 0"),
        ({"demo_coef": float("nan")}, r"hpt\.demo_coef=nan: must be a number that is finite"),
        ({"gate": {"count": 1.5}}, r"hpt\.gate\.count=1\.5: must be a whole number"),
        ({"gate": 3}, r"hpt\.gate=3: must be a mapping with keys threshold"),
        ({"gate": {"threshold": {"start": 1, "end": 0}}}, r"hpt\.gate\.threshold: needs steps"),
        ({"gate": {"threshold": "x"}}, r"hpt\.gate\.threshold='x': must be a number or a schedule"),
        ({"gate": {"soft": [[1, 0]]}}, r"hpt\.gate\.soft=.*rows \(on, off, sft\)"),
        ({"normalization": "mean"}, r"hpt\.normalization='mean': must be null or one of question, sequence"),
        ({"demo": {"on_unusable": "drop"}}, r"hpt\.demo\.on_unusable='drop': must be one of keep, error"),
        ({"options": {"gama": 1}}, r"hpt\.options\.gama=1\.0: must be one of .*shaping"),
        ({"per_source": {"a": {"gates": {}}}}, r"hpt\.per_source\.a\.gates: unknown key"),
        ({"rl_length_scale": 0}, r"hpt\.rl_length_scale=0\.0: must be null .*or above 0"),
        ({"modules": "mine"}, r"hpt\.modules='mine': must be a list"),
        ({"demo": {"select": "likelihood"}}, r"hpt\.demo\.log_likelihood=None: must be the column .*likelihood_of"),
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
        ({"compose": {"demos": [{"kind": "S"}], "place": "group"}}, r"a member of the group stands always"),
        ({"compose": {"demos": []}}, r"terms on demonstrations and when='gate' contradict"),
        ({"method": "luffy", "gate": {"off": 0.5}}, r"hpt\.gate\.off is set, but method 'luffy' has no gate"),
        ({"gate": {"soft": [[0, 0, 1], [1, 0, 0]]}}, r"hpt\.gate\.soft is set.*hpt_soft"),
        (
            {"method": "hpt_off_on", "gate": {"function": "linear"}},
            r"a term that method 'hpt_off_on' has not",
        ),
        ({"compose": {"demos": [{"kind": "R", "estimator": {}}]}}, r"no group to take centered over"),
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


def test_schedules_move_from_start_to_end_and_stay():
    linear = Schedule(0.5, 0.0, 100)
    assert [linear.at(s) for s in (0, 50, 100, 500)] == [0.5, 0.25, 0.0, 0.0]
    cosine = Schedule(1.0, 0.0, 100, "cosine")
    assert [round(cosine.at(s), 6) for s in (0, 50, 100)] == [1.0, 0.5, 0.0] and cosine.at(25) > 0.8
