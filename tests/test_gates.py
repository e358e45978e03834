"""Gates over steps, by data source and of a user's own, from the settings as users write them down to the plan."""

import math

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from verl_hpt import config, gate
from verl_hpt.errors import UserError
from verl_hpt.plan import PlanSettings, Question, plan


def settings_of(*overrides: str) -> config.Settings:
    """Settings as Hydra hands them to the trainer, from overrides on the command line over an empty config."""
    return config.load(OmegaConf.to_container(composed(*overrides).get("hpt", OmegaConf.create({}))))


def composed(*overrides, folder=None, name="empty"):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder or FOLDER), version_base=None):
        return compose(name, overrides=list(overrides))


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory):
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("config")
    (FOLDER / "empty.yaml").write_text("{}\n")


def question(key, solved, n=8, source="", demos=1):
    rewards = np.array([1.0] * solved + [0.0] * (n - solved))
    return Question(
        key, rewards, np.full(n, 5), demo_lengths=np.full(demos, 4), demo_rewards=np.ones(demos), source=source
    )


def zones(settings: config.Settings, questions, step=0):
    made = plan(
        questions,
        PlanSettings(
            method=config.resolve_method(settings),
            normalization="question",
            length_scale=8,
            gate=settings.gate.at(step),
            gates={source: own.gate.at(step) for source, own in settings.per_source.items()},
        ),
    )
    return [decision.zone for decision in made.decisions]


# --- over steps -------------------------------------------------------------------------------------------------------


def test_a_number_is_the_same_at_every_step():
    settings = settings_of("++hpt.gate.threshold=0.25")
    assert [settings.gate.at(step).threshold for step in (0, 1, 10**6)] == [0.25] * 3


def test_a_linear_schedule_goes_evenly_and_then_stays():
    """0.5 -> 0.1 in 8 steps: 0.05 a step."""
    settings = settings_of("++hpt.gate.threshold={start: 0.5, end: 0.1, steps: 8}")
    values = [settings.gate.at(step).threshold for step in (0, 1, 4, 8, 9, 100)]
    assert values == pytest.approx([0.5, 0.45, 0.3, 0.1, 0.1, 0.1], abs=1e-12)


def test_a_cosine_schedule_starts_and_ends_flat():
    """Half a cosine: the middle is the mean, a quarter of the way is (1 − cos 45°)/2 = 0.1464 of the distance."""
    settings = settings_of("++hpt.gate.off={start: 0.8, end: 0.0, steps: 100, shape: cosine}")
    values = [settings.gate.at(step).off for step in (0, 25, 50, 75, 100, 101)]
    quarter = (1 - math.cos(math.pi / 4)) / 2
    assert values == pytest.approx([0.8, 0.8 * (1 - quarter), 0.4, 0.8 * quarter, 0.0, 0.0], abs=1e-12)
    assert 0.8 - settings.gate.at(1).off < 0.8 / 100 / 10


def test_the_gate_closes_with_its_schedule():
    settings = settings_of("++hpt.gate.threshold={start: 0.5, end: 0.0, steps: 4}")
    asked = [question("a", 0), question("b", 2), question("c", 4)]
    assert [zones(settings, asked, step).count("demo") for step in range(6)] == [3, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++hpt.gate.threshold={start: 0.5, end: 0.1}", "hpt.gate.threshold: needs steps"),
        ("++hpt.gate.threshold={start: 0.5, end: 0.1, steps: 0}", "hpt.gate.threshold.steps=0: must be a whole number"),
        ("++hpt.gate.threshold={start: 0.5, end: 0.1, steps: 9, shape: square}", "one of linear, cosine"),
        ("++hpt.gate.threshold={from: 0.5}", "unknown key"),
        ("++hpt.gate.threshold=half", "must be a number or a schedule"),
        ("++hpt.per_source={a/b:{gate:{threshold: soon}}}", r"hpt.per_source.a/b.gate.threshold='soon'"),
        ("++hpt.per_source={a/b:{gates:{threshold: 0.5}}}", r"hpt.per_source.a/b.gates: unknown key"),
    ],
)
def test_a_schedule_or_source_that_is_written_wrongly_is_named(override, message):
    with pytest.raises(UserError, match=message):
        settings_of(override)


# --- by data source ---------------------------------------------------------------------------------------------------


def test_a_source_with_a_slash_is_written_in_braces():
    settings = settings_of("++hpt.per_source={openai/gsm8k:{gate:{threshold:0.25}}}", "++hpt.gate.success=0.5")
    own = settings.per_source["openai/gsm8k"].gate
    assert (own.threshold, own.success) == (0.25, 0.5), "what it does not say comes from the general gate"
    assert settings.gate.threshold == 0.0


def test_sources_in_a_yaml_file_are_the_same_settings(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "hpt:\n  per_source:\n    openai/gsm8k:\n      gate: {threshold: 0.25}\n"
        "    math:\n      gate: {threshold: {start: 1, end: 0, steps: 10}}\n"
    )
    of_file = config.load(OmegaConf.to_container(composed(folder=tmp_path, name="mine").hpt))
    assert of_file == settings_of(
        "++hpt.per_source={openai/gsm8k:{gate:{threshold:0.25}},math:{gate:{threshold:{start:1,end:0,steps:10}}}}"
    )


def test_each_source_follows_its_own_gate_in_one_batch():
    """Of 8 rollouts 0 to 7 solved in each source: γ = 0 takes one of the eight, 0.25 three, a count of 5 six."""
    settings = settings_of("++hpt.per_source={openai/gsm8k:{gate:{threshold:0.25}},code:{gate:{count:5}}}")
    asked = [question(f"{s}{i}", i, source=s) for s in ("other", "openai/gsm8k", "code") for i in range(8)]
    demo = np.array([zone == "demo" for zone in zones(settings, asked)]).reshape(3, 8)
    assert demo.sum(axis=1).tolist() == [1, 3, 6]


def test_a_sources_own_threshold_wins_over_a_general_count():
    settings = settings_of("++hpt.gate.count=6", "++hpt.per_source={a/b:{gate:{threshold:0.0}}}")
    assert zones(settings, [question("x", 3), question("y", 3, source="a/b")]) == ["demo", "rl"]


def test_schedules_run_in_each_source_by_itself():
    settings = settings_of(
        "++hpt.gate.threshold=1.0", "++hpt.per_source={a/b:{gate:{threshold:{start:1.0,end:0.0,steps:2}}}}"
    )
    asked = [question("x", 4), question("y", 4, source="a/b")]
    assert [zones(settings, asked, step) for step in (0, 2)] == [["demo", "demo"], ["demo", "rl"]]


def test_the_off_zone_of_one_source_leaves_the_others_alone():
    settings = settings_of("++hpt.per_source={a/b:{gate:{off:0.5}}}")
    assert zones(settings, [question("x", 3), question("y", 3, source="a/b")]) == ["rl", "off"]


# --- a user's own -----------------------------------------------------------------------------------------------------


def test_a_users_gate_is_one_decorator_and_a_name(tmp_path, monkeypatch):
    (tmp_path / "my_gates.py").write_text(
        "from verl_hpt.gate import BOTH, DEMO, RL, register_gate\n\n"
        "@register_gate\n"
        "def half_and_half(solved, n, settings):\n"
        "    return DEMO if solved == 0 else BOTH if solved < n / 2 else RL\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = settings_of("++hpt.modules=[my_gates]", "++hpt.gate.function=half_and_half")
    assert zones(settings, [question(str(i), i) for i in (0, 3, 4)]) == ["demo", "both", "rl"]
    gate.GATES.pop("half_and_half")
    with pytest.raises(UserError, match=r"half_and_half.* is not registered; known: linear, cosine\. Name the module"):
        config.resolve_method(settings_of("++hpt.gate.function=half_and_half"))


def test_a_users_gate_can_stand_for_one_source(tmp_path, monkeypatch):
    monkeypatch.setitem(gate.GATES, "never_teach", lambda solved, n, settings: gate.RL)
    settings = settings_of("++hpt.gate.count=8", "++hpt.per_source={a/b:{gate:{function:never_teach}}}")
    assert zones(settings, [question("x", 0), question("y", 0, source="a/b")]) == ["demo", "rl"]


# --- keyword arguments of a gate -------------------------------------------------------------------------------------


def up_to(solved, n, settings, most, other=gate.RL):
    return gate.DEMO if solved <= most else other


def needs_nothing(solved, n, settings):
    return gate.RL


@pytest.fixture
def of_mine(monkeypatch):
    for function in (up_to, needs_nothing):
        monkeypatch.setitem(gate.GATES, function.__name__, function)


def test_keyword_arguments_of_a_gate_are_plain_values_of_the_config(of_mine):
    settings = settings_of("++hpt.gate.function=up_to", "++hpt.gate.kwargs={most: 2}")
    assert config.resolve_method(settings).name == "hpt"
    assert settings.gate.at(1).kwargs == {"most": 2} and settings_of().gate.at(1).kwargs == {}


def test_a_sources_arguments_are_its_own_and_go_with_the_general_function(of_mine):
    general = ("++hpt.gate.function=up_to", "++hpt.gate.kwargs={most: 2}")
    of_source = settings_of(
        *general, "++hpt.per_source={a/b:{gate:{kwargs:{most:1}}},c:{gate:{threshold:0.5}}}"
    ).per_source
    assert (of_source["a/b"].gate.function, of_source["a/b"].gate.kwargs) == ("up_to", {"most": 1})
    assert (of_source["c"].gate.function, of_source["c"].gate.kwargs) == (None, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++hpt.gate.kwargs={most: 2}"], r"hpt\.gate\.kwargs is set, but no hpt\.gate\.function reads it"),
        (["++hpt.per_source={a/b:{gate:{kwargs:{most:2}}}}"],
         r"hpt\.per_source\.a/b\.gate\.kwargs is set, but no hpt\.per_source\.a/b\.gate\.function reads it"),
        (["++hpt.gate.function=up_to"], r"kwargs={} does not fit .*'up_to', missing a required argument: 'most'"),
        (["++hpt.gate.function=up_to", "++hpt.gate.kwargs={most: 1, mots: 2}"],
         r"got an unexpected keyword argument 'mots'; it takes most, other; did you mean most\?"),
        (["++hpt.gate.function=needs_nothing", "++hpt.gate.kwargs={k: 1}"],
         r"hpt\.gate\.kwargs={'k': 1} does not fit hpt\.gate\.function='needs_nothing', .* it takes none"),
        (["++hpt.gate.function=up_to", "++hpt.gate.kwargs={most: many}"],
         r"hpt\.gate\.function='up_to' fails where none of 1 is solved, kwargs={'most': 'many'}: TypeError\("),
        (["++hpt.gate.function=up_to", "++hpt.gate.kwargs={n: 1}"], r"multiple values for argument 'n'"),
        (["++hpt.gate.function=up_to", "++hpt.gate.kwargs=2"], r"hpt\.gate\.kwargs=2: must be a mapping, got int"),
    ],
)  # fmt: skip
def test_arguments_that_no_gate_takes_are_refused(of_mine, overrides, message):
    with pytest.raises(UserError, match=message):
        config.resolve_method(settings_of(*overrides))


@pytest.mark.parametrize("success", [1.0, 0.0, -0.5])
def test_a_gate_is_tried_on_a_question_that_is_not_solved_whatever_counts_as_solved(success, monkeypatch):
    """Rewards of ±1 with success 0: a score of 0 was taken for unsolved, and its share of a missing term not seen."""
    share = gate.Decision("mine", 0.0, 0.0, 1.0)
    monkeypatch.setitem(gate.GATES, "mine", lambda outcome: gate.RL if outcome.solved else share)
    node = {"compose": {"demos": [{"kind": "R"}]}, "gate": {"function": "mine", "success": success}}
    with pytest.raises(UserError, match="gives an unsolved question a share of a term"):
        config.resolve_method(config.load(node))
