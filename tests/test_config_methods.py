"""From settings to a method: constants and their ranges, composed methods, gates that fit."""

import dataclasses
import math

import pytest
from test_config import problems

from verl_hpt import config, parts
from verl_hpt.config import load, resolve_method
from verl_hpt.errors import UserError, read
from verl_hpt.estimator import Estimator, Method, Term
from verl_hpt.gate import GATES, Decision
from verl_hpt.methods import METHODS
from verl_hpt.parts import Constants

# --- constants -------------------------------------------------------------------------------------------------------

EDGES = {  # the last number that a range takes, and the first that it does not
    "shaping": (1e-9, 0.0, "at 0 no token learns"),
    "entropy_weight": (0.0, -1e-9, "demonstrations are unlearned"),
    "positive_weight": (0.0, -1e-9, "correct rollouts are unlearned"),
    "kl": (0.0, -1e-9, "away from the reference model"),
    "max_ratio": (1e-9, 0.0, "its logarithm is taken"),
    "otr_beta": (1 - 1e-9, 1.0, "at 1 no token learns"),
    "psft_clip": (0.0, -1e-9, "below 0 no token learns"),
    "trust": (1.0, 1.001, "it is a probability"),
    "prefix_dropped": (1 - 1e-9, 1.0, "the most certain ones, that do not learn"),
    "uniform": (1.0, 1.001, "it is a probability"),
}


def test_every_constant_has_a_range_that_takes_its_default():
    for f in dataclasses.fields(Constants):
        assert f.metadata.keys() & {"ge", "gt", "le", "lt"} and f.metadata["description"], f.name
    assert set(EDGES) == {f.name for f in dataclasses.fields(Constants)} - {"clip_low", "clip_high", "clip_c"}
    assert read(Constants, dataclasses.asdict(Constants()), "") == (Constants(), [])


@pytest.mark.parametrize("name", EDGES)
def test_a_constant_out_of_its_range_is_refused_with_the_reason(name):
    inside, outside, why = EDGES[name]
    assert getattr(config.constants(load({"options": {name: inside}})), name) == inside
    (said,) = problems({"options": {name: outside}})
    assert said.startswith(f"hpt.options.{name}={outside!r}: must be ") and why in said
    if name in ("trust", "uniform"):
        assert "above 0 and at most 1" in problems({"options": {name: 0}})[0]


# --- methods that would train nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [None, {}, {"reference": "one"}, {"mask": "psft_clip", "reference": "old"}])
def test_a_composed_s_term_imitates_unless_it_says_otherwise(estimator):
    term = {"kind": "S"} if estimator is None else {"kind": "S", "estimator": estimator}
    method = resolve_method(load({"compose": {"demos": [term]}}))
    assert method.s_estimator.names() == {
        "mask": "everywhere", "reference": "current", "advantage": "unit", "likelihood": "plain"
    } | (estimator or {})  # fmt: skip
    assert method.term("S").scale == 1.0
    calm = {"compose": {"demos": [{"kind": "S", "scale": 2, "estimator": {"advantage": "calm"}}]}}
    assert resolve_method(load(calm)).s_estimator.advantage is parts.calm
    assert resolve_method(load(calm)).term("S").scale == 2.0


def test_a_composed_r_term_stands_for_its_question_and_takes_the_groups_advantage():
    node = {
        "compose": {"demos": [{"kind": "R", "estimator": {"reference": "one"}}], "place": "group", "when": "always"}
    }
    assert resolve_method(load(node)).r_estimator.advantage is parts.centered
    assert resolve_method(load({"compose": {"demos": [{"kind": "R"}]}})).r_estimator.advantage is parts.unit


def of(term: Term, **changes) -> Method:
    return Method("mine", METHODS["grpo"].rollouts, (term,), **{"when": "always", **changes})


OVER_GROUP = [name for name, part in parts.PARTS["advantage"].items() if part.over_group is not None]


@pytest.mark.parametrize("place", ["separate", "group"])
@pytest.mark.parametrize("advantage", OVER_GROUP)
def test_an_s_term_over_a_group_is_refused_wherever_it_stands(advantage, place):
    with pytest.raises(
        ValueError, match=rf"'mine': its S term on demonstrations takes the advantage {advantage} over a"
    ):
        of(Term("S", Estimator(advantage=parts.PARTS["advantage"][advantage])), place=place)


@pytest.mark.parametrize("place", ["separate", "group"])
@pytest.mark.parametrize("kind", ["S", "R"])
def test_a_critics_advantage_is_refused_on_demonstrations(kind, place):
    with pytest.raises(ValueError, match=rf"'mine': its {kind} term on demonstrations takes the advantage gae"):
        of(Term(kind, Estimator(advantage=parts.gae)), place=place)


def test_the_off_zones_term_is_checked_as_well():
    with pytest.raises(ValueError, match="its R term on demonstrations takes the advantage gae"):
        dataclasses.replace(METHODS["hpt"], off_zone=Term("R", Estimator(advantage=parts.gae)))


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf])
def test_a_scale_that_trains_nothing_or_unlearns_is_refused(scale):
    with pytest.raises(ValueError, match=r"its S term on demonstrations has scale .*: must be finite and above 0"):
        of(Term("S", METHODS["sft"].s_estimator, scale))


def test_a_methods_normalization_is_one_that_there_is():
    with pytest.raises(ValueError, match="'mine': unknown normalization 'tokens'; one of question, sequence, token"):
        of(METHODS["sft"].demos[0], normalization="tokens")


def test_a_term_of_each_kind_at_most_and_a_place_that_fits():
    s, r = METHODS["sft"].demos[0], METHODS["trsft"].demos[0]
    with pytest.raises(ValueError, match=r"at most one S and one R term on demonstrations, got \['S', 'S'\]"):
        Method("mine", None, (s, s), when="always")
    with pytest.raises(ValueError, match="terms on demonstrations and when='never' contradict"):
        of(s, when="never")
    with pytest.raises(ValueError, match="has nothing for rollouts: demonstrations must stand always"):
        Method("mine", None, (s,), when="gate")
    with pytest.raises(ValueError, match="a member of the group stands always, beside rollouts"):
        of(r, when="gate", place="group")
    with pytest.raises(ValueError, match=r"'mine' imitates its own rollouts \(when='own'\) and needs an S term"):
        Method("mine", None, (r,), when="own")
    assert of(s).term("R") is None and of(r).term("S") is None


# --- what a method is read from --------------------------------------------------------------------------------------


def test_the_off_zone_is_the_methods_own_r_term_or_the_published_one():
    off = resolve_method(load({"gate": {"off": 0.5}})).off_zone
    assert off.kind == "R" and off.estimator.names() == {
        "mask": "everywhere", "reference": "one", "advantage": "reward", "likelihood": "shaped"
    }  # fmt: skip
    of_source = {"method": "hpt_mix_on", "per_source": {"a": {"gate": {"off": 0.5}}}}
    assert resolve_method(load(of_source)).off_zone is METHODS["hpt_mix_on"].term("R")
    assert resolve_method(load({})).off_zone is None


def test_the_clip_range_is_clip_ratio_where_a_bound_is_null():
    actor = {"clip_ratio": 0.3, "clip_ratio_low": None, "clip_ratio_high": 0.28, "clip_ratio_c": 9.0}
    assert config.clips(actor) == {"clip_low": 0.3, "clip_high": 0.28, "clip_c": 9.0}
    assert config.clips({**actor, "clip_ratio_low": 0.0, "clip_ratio_high": None}) == {
        "clip_low": 0.0, "clip_high": 0.3, "clip_c": 9.0
    }  # fmt: skip


def test_a_gate_that_fits_its_method_is_taken():
    table = [[0, 0, 1], [1, 0, 0]]
    settings = load({"method": "hpt_soft", "gate": {"soft": table}})
    assert resolve_method(settings) is METHODS["hpt_soft"]
    assert settings.gate.at(0).soft == ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
    assert resolve_method(load({"gate": {"function": "linear"}})) is METHODS["hpt"]
    with pytest.raises(UserError, match=r"hpt\.gate=5: must be a mapping"):
        load({"gate": 5, "per_source": {"a": {"gate": {"count": 1}}}})


@pytest.mark.parametrize(
    ("shares", "fits"),
    [
        ((0, 1, 0), {"hpt": False, "hpt_off_on": True, "hpt_mix_on": True}),
        ((0, 0, 1), {"hpt": True, "hpt_off_on": False, "hpt_mix_on": True}),
        ((0, 1, 1), {"hpt": True, "hpt_off_on": True, "hpt_mix_on": True}),
        ((1, 1, 0), {"hpt": True, "hpt_off_on": True, "hpt_mix_on": True}),
        ((1, 0, 0), {"hpt": True, "hpt_off_on": True, "hpt_mix_on": True}),
    ],
)
def test_a_gates_share_of_a_term_that_a_method_lacks_is_refused(shares, fits, monkeypatch):
    monkeypatch.setitem(GATES, "shared", lambda solved, n, settings: Decision("soft", *shares))
    for name, fit in fits.items():
        settings = load({"method": name, "gate": {"function": "shared"}})
        if fit:
            assert resolve_method(settings).name == name
        else:
            with pytest.raises(UserError, match=rf"a share of a term that method '{name}' has not"):
                resolve_method(settings)


def test_likelihoods_of_a_model_need_no_column():
    for model in ("policy", "reference"):
        assert load({"demo": {"select": "likelihood", "likelihood_of": model}}).demo.log_likelihood is None
    assert load({"demo": {"select": "likelihood", "log_likelihood": "l"}}).demo.log_likelihood == "l"


def test_a_composed_method_may_train_on_demonstrations_alone():
    method = resolve_method(load({"compose": {"rollouts": None, "demos": [{"kind": "S"}], "when": "always"}}))
    assert method.rollouts is None and method.demos == (Term("S", Estimator(advantage=parts.unit)),)


def test_the_constants_are_verls_clip_range_and_the_options():
    made = config.constants(load({"options": {"shaping": 0.5}}), clip_low=0.1, clip_high=0.3, clip_c=9.0)
    assert (made.clip_low, made.clip_high, made.clip_c, made.shaping) == (0.1, 0.3, 9.0, 0.5)
    assert config.constants(load({})) == Constants()


def test_a_sources_switch_replaces_the_general_one_of_any_kind():
    node = {"gate": {"threshold": 0.5, "success": 0.7}, "per_source": {"a": {"gate": {"count": 2}}, "b": {}}}
    own = load(node).per_source
    assert (own["a"].gate.threshold, own["a"].gate.count, own["a"].gate.success) == (0.0, 2, 0.7)
    assert (own["b"].gate.threshold, own["b"].gate.count, own["b"].gate.success) == (0.5, None, 0.7)


def test_a_named_method_beside_a_composed_one_is_refused():
    with pytest.raises(UserError, match=r"hpt\.method='luffy': must be left out where hpt\.compose puts a method"):
        load({"method": "luffy", "compose": {"demos": [{"kind": "S"}]}})
