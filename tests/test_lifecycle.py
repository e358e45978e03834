"""What the history decides: retirement, rest, early gate; and that a restored run goes on the same."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_questions import Letters, scored

from verl_hpt import config
from verl_hpt import plan as mixing
from verl_hpt.demos.demonstration import Demonstration
from verl_hpt.errors import UserError
from verl_hpt.history import UNKNOWN, Draw, Lifecycle, Past, identity
from verl_hpt.host.batch import SKIPPED, Group, Reader, questions_of
from verl_hpt.plan import PlanSettings, Question, plan


class Trainer:
    """A step as the trainer makes it, the rollouts' scores given: questions -> plan -> history.

    hashed: a question's identity is that of its prompt, as in a run, and not its name.
    """

    hashed = False

    def __init__(self, node=None, n=4, demos=("one",)):
        self.settings = config.load({"gate": {"threshold": 0.0}, **(node or {})})
        self.method = config.resolve_method(self.settings)
        self.lifecycle = Lifecycle(self.settings, n)
        self.reader = Reader(Letters(), 0, self.settings.demo, 64, self.settings.seed)
        self.n, self.demos, self.step_number, self.skipped = n, list(demos), 0, {}
        self.shown: list[dict[str, list[int]]] = []  # a step: question -> places of its demonstrations
        self.tokens = 0

    def prompt(self, name):
        return [{"role": "user", "content": name}]

    def key(self, name):
        return identity({"data_source": "src", "raw_prompt": self.prompt(name)}) if self.hashed else name

    def step(self, scores):
        """scores(question, i): score of its i-th rollout; questions: names. Returns the metrics."""
        self.step_number += 1
        names = list(scores)
        skipped = self.lifecycle.skipped_rollouts([self.key(name) for name in names], [self.n] * len(names)) or [
            0
        ] * len(names)
        groups, rewards = [], []
        for name, less in zip(names, skipped, strict=True):
            own = scores[name][: self.n - less]
            at = range(len(rewards), len(rewards) + len(own))
            columns = {"target": self.demos, "raw_prompt": self.prompt(name), SKIPPED: less}
            groups.append(Group(name, list(at), self.key(name), "src", [1, 2], columns))
            rewards.extend(own)
        self.tokens += 10 * len(rewards)
        self.skipped = dict(zip(names, skipped, strict=True))
        settings = PlanSettings(
            method=self.method, normalization="question", length_scale=10, gate=self.settings.gate.at(self.step_number)
        )
        rewards, counts = np.array(rewards, dtype=float), Counter()
        past = self.lifecycle.past(groups, self.step_number)
        questions, read, counts, decisions = questions_of(
            groups, scored(rewards, length=10), self.reader, settings, self.step_number, past
        )
        made = plan(questions, settings, decisions)
        self.zones = {name: decision.zone for name, decision in zip(names, made.decisions, strict=True)}
        shown = {name: [] for name in names}
        for row in np.flatnonzero(made.kind == mixing.DEMO):
            shown[names[made.question[row]]].append(read[made.question[row]][made.index[row]].index)
        self.shown.append(shown)
        return self.lifecycle.remember(self.step_number, groups, questions, read, made, counts)


def test_a_demonstration_is_retired_after_its_uses_and_its_question_keeps_its_rollouts():
    trainer = Trainer({"history": {"retire_after": 2}})
    zones, retired = [], []
    for _ in range(4):
        metrics = trainer.step({"q": [0, 0, 0, 0]})
        zones.append(trainer.zones["q"])
        retired.append(metrics["hpt/history/retired"])
    assert zones == ["demo", "demo", "rl", "rl"]
    assert retired == [0, 0, 1, 1]


def test_of_several_demonstrations_each_is_retired_by_itself():
    trainer = Trainer({"history": {"retire_after": 1}, "demo": {"select": "round_robin"}}, demos=["a", "b", "c"])
    for _ in range(4):
        trainer.step({"q": [0, 0, 0, 0]})
    shown = [step["q"] for step in trainer.shown]
    assert sorted(shown[0] + shown[1] + shown[2]) == [0, 1, 2] and shown[3] == []


def test_a_cool_down_lets_so_many_steps_pass():
    trainer = Trainer({"history": {"cooldown": 2}})
    zones, cooling = [], []
    for _ in range(7):
        cooling.append(trainer.step({"q": [0, 0, 0, 0]})["hpt/history/cooling"])
        zones.append(trainer.zones["q"])
    assert zones == ["demo", "rl", "rl", "demo", "rl", "rl", "demo"]
    assert cooling == [0, 1, 1, 0, 1, 1, 0]


def test_without_a_cool_down_nothing_rests_in_a_second_update_of_the_same_step():
    trainer = Trainer()
    for _ in range(2):
        trainer.step_number = 0
        assert trainer.step({"q": [0] * 4})["hpt/history/cooling"] == 0 and trainer.zones["q"] == "demo"


def test_round_robin_goes_by_a_questions_own_uses_not_by_the_step():
    """The question is drawn at every third step, as in an epoch of three steps, and still meets all three."""
    trainer = Trainer({"demo": {"select": "round_robin"}}, demos=["a", "b", "c"])
    for step in range(9):
        trainer.step({"q": [0] * 4} if step % 3 == 0 else {f"other {step}": [0] * 4})
    shown = [step["q"][0] for step in trainer.shown if "q" in step]
    assert sorted(shown) == [0, 1, 2]


def test_unseen_first_meets_every_demonstration_before_one_comes_again():
    trainer = Trainer({"demo": {"select": "unseen_first", "per_question": 2}}, demos=["a", "b", "c", "d"])
    for _ in range(4):
        trainer.step({"q": [0] * 4})
    shown = [step["q"] for step in trainer.shown]
    assert all(len(two) == 2 for two in shown)
    assert sorted(shown[0] + shown[1]) == sorted(shown[2] + shown[3]) == [0, 1, 2, 3]


def test_early_gate_spares_rollouts_after_failures_in_a_row_and_gives_them_back_after_a_success():
    trainer = Trainer({"history": {"early_gate": {"after_failures": 2, "rollouts": 1}}})
    asked, zones, saved = [], [], []
    for scores in ([0] * 4, [0] * 4, [0] * 4, [1] * 4, [1, 0, 0, 0], [0] * 4):
        metrics = trainer.step({"q": scores})
        asked.append(4 - trainer.skipped["q"])
        zones.append(trainer.zones["q"])
        saved.append(metrics["hpt/history/tokens_saved"])
    assert asked == [4, 4, 1, 1, 4, 4]
    assert zones == ["demo", "demo", "demo", "rl", "rl", "demo"], "one rollout that fails: the demonstration"
    assert saved == [0, 0, 30, 30, 0, 0], "three rollouts of ten tokens each"
    assert metrics["hpt/history/tokens_saved_total"] == 60


def test_without_early_gate_nothing_is_put_on_verls_batch():
    assert Trainer().lifecycle.skipped_rollouts(["q"], [4]) is None


def test_early_gate_respects_a_questions_own_number_of_rollouts():
    trainer = Trainer({"history": {"early_gate": {"after_failures": 1, "rollouts": 2}}}, n=8)
    trainer.step({"a": [0] * 8, "b": [0] * 8})
    assert trainer.lifecycle.skipped_rollouts(["a", "b", "new"], [8, 1, 8]) == [6, 0, 0]


def learn(node, steps=60, questions=64, seed=0):
    """Half of the questions are never solved; else each demonstration lifts the chance of a rollout by 0.1."""
    draw, trainer = np.random.default_rng(seed), Trainer(node, n=8)
    names = [f"q{i}" for i in range(questions)]
    uses = Counter()
    for step in range(steps):
        batch = [names[(step * 16 + i) % questions] for i in range(16)]
        chances = {name: 0.0 if int(name[1:]) % 2 else min(0.1 * uses[name], 0.9) for name in batch}
        trainer.step({name: (draw.random(8) < chances[name]).astype(float) for name in batch})
        for name, places in trainer.shown[-1].items():
            uses[name] += bool(places)
    graduated = set(trainer.lifecycle.history.listing("graduated"))
    return trainer, graduated, {name for name in names if int(name[1:]) % 2 == 0}


def test_early_gate_where_half_is_never_solved_saves_a_third_of_the_tokens_and_the_same_questions_graduate():
    for seed in range(3):
        full, graduated_full, learnable = learn({}, seed=seed)
        gate = {"history": {"early_gate": {"after_failures": 2, "rollouts": 1}}}
        gated, graduated, _ = learn(gate, seed=seed)
        assert graduated == graduated_full == learnable
        assert gated.tokens < 0.7 * full.tokens
        saved = gated.lifecycle.history.tokens_saved
        assert saved == full.tokens - gated.tokens, "equal lengths: the estimate is exact"


def test_two_runs_from_one_checkpoint_go_on_the_same(tmp_path):
    """Stopped in the middle and restored: zones, demonstrations shown, spared rollouts and history are identical."""
    node = {
        "demo": {"select": "unseen_first", "per_question": 2},
        "history": {"retire_after": 3, "cooldown": 1, "early_gate": {"after_failures": 2}},
        "gate": {"threshold": {"start": 0.6, "end": 0.0, "steps": 10}},
    }

    def scores(step):
        draw = np.random.default_rng(step)
        return {f"q{i}": (draw.random(4) < 0.1 * (i % 5)).astype(float) for i in draw.permutation(12)[:6]}

    whole = Trainer(node, demos=["a", "b", "c"])
    trace = []
    for step in range(20):
        if step == 9:
            whole.lifecycle.save(str(tmp_path))
        whole.step(scores(step))
        trace.append((whole.zones, whole.skipped))
    resumed = Trainer(node, demos=["a", "b", "c"])
    resumed.lifecycle.load(str(tmp_path))
    resumed.step_number = 9
    for step in range(9, 20):
        resumed.step(scores(step))
        assert (resumed.zones, resumed.skipped) == trace[step]
    assert resumed.shown == whole.shown[9:]
    assert whole.lifecycle.history == resumed.lifecycle.history


def test_a_checkpoint_without_history_stops_a_run_that_needs_it(tmp_path, caplog):
    needs = Trainer({"history": {"cooldown": 3}, "demo": {"select": "round_robin"}}).lifecycle
    with pytest.raises(UserError, match=r"cooldown, hpt.demo.select=round_robin .* hpt.history.on_missing=empty"):
        needs.load(str(tmp_path))
    Trainer({"history": {"cooldown": 3, "on_missing": "empty"}}).lifecycle.load(str(tmp_path))
    Trainer().lifecycle.load(str(tmp_path))
    assert caplog.text.count("it starts empty") == 2


# --- boundaries, value by value ---------------------------------------------------------------------------------------


def taught(lifecycle, step, *names) -> None:
    """Questions that train on a demonstration at a step."""
    lifecycle.history.observe(step, [Draw(name, 0, 4, (0,), False) for name in names])


def asked(*names, demos=("one",)) -> list[Group]:
    return [Group(name, [0], name, "src", [1], {"target": list(demos)}) for name in names]


@pytest.mark.parametrize(
    ("cooldown", "at", "rests"),
    [
        (0, 5, {6: False}),
        (1, 5, {6: True, 7: False}),
        (3, 5, {6: True, 8: True, 9: False, 10: False}),
        (3, 1, {2: True, 4: True, 5: False}),
        (9, 1, {2: True, 10: True, 11: False}),
    ],
)
def test_a_question_rests_for_so_many_steps_after_its_last_use_and_an_unknown_one_never(cooldown, at, rests):
    lifecycle = Trainer({"history": {"cooldown": cooldown}}).lifecycle
    taught(lifecycle, at, "q")
    lifecycle.history.observe(at, [Draw("untaught", 0, 4, (), True)])
    for step, resting in rests.items():
        past = lifecycle.past(asked("q", "new", "untaught"), step)
        assert [known.cooling for known in past] == [resting, False, False], step
    taught(lifecycle, at + 4, "q")
    assert lifecycle.past(asked("q"), at + 4 + max(cooldown, 1))[0].cooling == (cooldown > 0), "the last use counts"
    assert not lifecycle.past(asked("q"), at + 5 + cooldown)[0].cooling


def test_a_demonstration_is_retired_from_so_many_uses_on():
    past = Past(uses=9, demo_uses=[2, 3, 4], retire_after=3)
    assert [past.retired(place) for place in range(5)] == [False, True, True, False, False]
    assert [past.used(place) for place in range(5)] == [2, 3, 4, 0, 0]
    assert not any(Past(demo_uses=[9], retire_after=None).retired(place) for place in range(2))
    assert not Past(retire_after=1).retired(0) and Past(demo_uses=[1], retire_after=1).retired(0)
    assert Past() == UNKNOWN == Past(uses=0, cooling=False, demo_uses=(), retire_after=None)


def test_the_past_of_one_demonstration_is_its_questions_and_of_several_each_ones_own():
    lifecycle = Trainer({"history": {"retire_after": 5}}).lifecycle
    for step, place in enumerate((1, 1, 0), 1):
        taught(lifecycle, step, "one")
        lifecycle.history.observe(step, [Draw("two", 0, 4, (place,), False)])
    one, two, new = asked("one"), asked("two", demos=("a", "b", "c")), asked("new", demos=("a", "b"))
    none = [Group("none", [0], "none", "src", [1], {}), *asked("empty", demos=())]
    found = lifecycle.past([*one, *two, *new, *none], 4)
    assert [past.numbers["uses"] for past in found] == [3, 3, 0, 0, 0], "a gate reads the record"
    assert found[2].numbers == Past().numbers and found[0].numbers["failures"] == found[0].numbers["drawn"] == 3
    assert [replace(past, numbers=Past().numbers) for past in found] == [
        Past(uses=3, demo_uses=(3,), retire_after=5),
        Past(uses=3, demo_uses=(1, 2), retire_after=5),
        *[Past(uses=0, demo_uses=(), retire_after=5)] * 3,
    ]
    assert [[past.used(place) for place in range(3)] for past in found] == [[3, 0, 0], [1, 2, 0], *[[0, 0, 0]] * 3]
    assert lifecycle.past([], 4) == []
    taught(lifecycle, 4, "one")
    assert found[0].demo_uses == (3,), "what was known before the step stays"


def test_how_many_rollouts_are_skipped_value_by_value():
    """By failures in a row (below, at and above the limit), and by a question's own number of rollouts."""
    lifecycle = Trainer({"history": {"early_gate": {"after_failures": 3, "rollouts": 2}}}, n=8).lifecycle
    keys = [f"{failures} failures" for failures in range(6)]
    for step in range(1, 6):
        lifecycle.history.observe(step, [Draw(key, 0, 8, (), True) for key in keys[step:]])
    assert lifecycle.skipped_rollouts(keys, [8] * 6) == [0, 0, 0, 6, 6, 6]
    assert lifecycle.skipped_rollouts(keys, [8, 8, 3, 3, 2, 1]) == [0, 0, 0, 1, 0, 0]
    assert lifecycle.skipped_rollouts(keys, [16, 1, 0, 16, 4, 0]) == [0, 0, 0, 14, 2, 0]
    assert lifecycle.skipped_rollouts(["other", "", "3"], [8] * 3) == [0, 0, 0], "other questions"
    assert lifecycle.skipped_rollouts([], []) == [] and len(lifecycle.history.records) == 5
    with pytest.raises(ValueError, match="zip"):
        lifecycle.skipped_rollouts(["q"], [8, 8])


def test_the_metrics_of_a_step_and_what_is_remembered_value_by_value():
    """Four questions: taught with one demonstration; on RL; taught with two of three; its rollout spared, no prompt."""
    gated = {"gate": {"success": 0.5}, "history": {"early_gate": {"after_failures": 9}}}
    trainer = Trainer({"demo": {"per_question": 2}, **gated})
    lifecycle = trainer.lifecycle
    columns = [
        {"target": ["a"], "raw_prompt": trainer.prompt("one")},
        {"target": ["a"], "raw_prompt": trainer.prompt("two")},
        {"target": ["a", "b", "c"], "raw_prompt": trainer.prompt("three")},
        {"target": ["a"]},
    ]
    names = ["one", "two", "three", "four"]
    groups = [Group(n, [], n, "src", [1], c) for n, c in zip(names, columns, strict=True)]
    rollouts = [([0.0, 0.4], [10, 30]), ([0.5, 1.0, 0.0], [1, 2, 3]), ([0.0], [7]), ([], [])]
    demonstrations = [[0], [], [2, 0], []]
    questions = [
        Question(name, np.array(rewards), np.array(lengths, dtype=int), source="src",
                 demo_lengths=np.full(len(places), 5), demo_rewards=np.ones(len(places)), skipped_rollouts=skipped)
        for name, (rewards, lengths), places, skipped in zip(names, rollouts, demonstrations, (0, 0, 3, 2), strict=True)
    ]  # fmt: skip
    read = [[Demonstration("a", place) for place in places] for places in demonstrations]
    settings = PlanSettings(trainer.method, "question", 10, gate=trainer.settings.gate.at(7))
    counts = Counter({"history/retired": 2, "history/cooling": 3, "unusable": 1})
    lifecycle.history.tokens_saved = 100.0
    made = plan(questions, settings)
    metrics = lifecycle.remember(7, groups, questions, read, made, counts)
    assert metrics == {
        "hpt/history/questions": 4.0,
        "hpt/history/graduated": 0.0,
        "hpt/history/forgotten": 0.0,
        "hpt/history/never_solved": 3.0,
        "hpt/history/retired": 2.0,
        "hpt/history/cooling": 3.0,
        "hpt/history/early_gated": 2.0,
        "hpt/history/tokens_sampled": 53.0,
        "hpt/history/tokens_saved": 21.0,
        "hpt/history/tokens_saved_total": 121.0,
    }
    assert all(type(value) is float for value in metrics.values())
    fields = ("solved", "rollouts", "drawn", "failures", "uses", "drawn_at", "taught_at", "demo_uses")
    records = [lifecycle.history.of(name) for name in names]
    assert [[getattr(record, name) for record in records] for name in fields] == [
        [0, 2, 0, 0], [2, 3, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0], [7, 7, 7, 7], [7, 0, 7, 0],
        [[1], [], [1, 0, 1], []],
    ]  # fmt: skip
    kinds = {type(getattr(record, name)) for record in records for name in fields[:-1]}
    assert kinds == {int}, "JSON knows no NumPy"


@pytest.mark.parametrize(("method", "graduated"), [("hpt", 1), ("sft", 0)])
def test_a_solved_question_that_trains_on_nothing_does_not_graduate(method, graduated):
    """Without its demonstration, method sft has nothing for it."""
    trainer = Trainer({"method": method})
    trainer.step({"q": [0] * 4})
    trainer.demos = []
    assert trainer.step({"q": [1] * 4})["hpt/history/graduated"] == graduated


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({}, []),
        ({"history": {"retire_after": 1}}, ["hpt.history.retire_after"]),
        ({"history": {"cooldown": 1}}, ["hpt.history.cooldown"]),
        ({"history": {"cooldown": 0}}, []),
        ({"history": {"early_gate": {"after_failures": 1}}}, ["hpt.history.early_gate"]),
        ({"demo": {"select": "round_robin"}}, ["hpt.demo.select=round_robin"]),
        ({"demo": {"select": "unseen_first"}}, ["hpt.demo.select=unseen_first"]),
        *(({"demo": {"select": select}}, []) for select in ("first", "random", "shortest")),
        ({"history": {"on_missing": "empty"}, "question_key": "id"}, []),
        (
            {"history": {"retire_after": 2, "cooldown": 1, "early_gate": {"after_failures": 1}}},
            ["hpt.history.retire_after", "hpt.history.cooldown", "hpt.history.early_gate"],
        ),
    ],
)
def test_settings_whose_effect_depends_on_the_history_are_named(node, named):
    assert Trainer(node).lifecycle.matters == named


@pytest.mark.parametrize(("rollouts", "n"), [(4, 4), (5, 4), (1, 1), (2, 1)])
def test_an_early_gate_that_spares_nothing_is_refused(rollouts, n):
    message = f"early_gate.rollouts={rollouts} spares nothing: actor_rollout_ref.rollout.n is {n}$"
    with pytest.raises(UserError, match=message):
        Trainer({"history": {"early_gate": {"after_failures": 1, "rollouts": rollouts}}}, n=n)
    Trainer({"history": {"early_gate": {"after_failures": 1, "rollouts": rollouts}}}, n=rollouts + 1)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"retire_after": 0}, "retire_after=0: must be null or a whole number at least 1"),
        ({"cooldown": -1}, "cooldown=-1: must be a whole number at least 0"),
        ({"early_gate": {"after_failures": 0}}, "after_failures=0: must be a whole number at least 1"),
        ({"early_gate": {"after_failures": 1, "rollouts": 0}}, "rollouts=0: must be a whole number at least 1"),
        ({"early_gate": {"rollouts": 2}}, "hpt.history.early_gate: needs after_failures"),
        ({"early_gate": {"after_failures": 1, "rollouts": 4}}, "spares nothing"),
        ({"retire_afer": 1}, "unknown key"),
    ],
)
def test_settings_that_make_no_sense_are_refused(node, message):
    with pytest.raises(UserError, match=message):
        Trainer({"history": node})
