"""What the history decides: retirement, rest, early gate; and that a restored run goes on the same."""

from collections import Counter

import numpy as np
import pytest
from test_questions import Letters, scored

from verl_hpt import config, mixing
from verl_hpt.errors import UserError
from verl_hpt.history import number
from verl_hpt.lifecycle import SPARED, Lifecycle
from verl_hpt.mixing import PlanSettings, plan
from verl_hpt.questions import Group, Reader, questions_of


class Trainer:
    """A step as the trainer makes it, the rollouts' scores given: questions -> plan -> history."""

    def __init__(self, node=None, n=4, demos=("one",)):
        self.settings = config.load({"gate": {"threshold": 0.0}, **(node or {})})
        self.method = config.resolve_method(self.settings)
        self.lifecycle = Lifecycle(self.settings, n)
        self.reader = Reader(Letters(), 0, self.settings.demo, 64, self.settings.seed)
        self.n, self.demos, self.step_number, self.spared = n, list(demos), 0, {}
        self.shown: list[dict[str, list[int]]] = []  # a step: question -> places of its demonstrations
        self.tokens = 0

    def prompt(self, name):
        return [{"role": "user", "content": name}]

    def step(self, scores):
        """scores(question, i): score of its i-th rollout; questions: names. Returns the metrics."""
        self.step_number += 1
        names = list(scores)
        spared = self.lifecycle.spared(["src"] * len(names), [self.prompt(name) for name in names])
        spared = [0] * len(names) if spared is None else spared
        groups, rewards = [], []
        for name, less in zip(names, spared, strict=True):
            own = scores[name][: self.n - less]
            at = range(len(rewards), len(rewards) + len(own))
            columns = {"target": self.demos, "raw_prompt": self.prompt(name), SPARED: less}
            groups.append(Group(name, list(at), number_text(name), "src", [1, 2], columns))
            rewards.extend(own)
        self.tokens += 10 * len(rewards)
        self.spared = dict(zip(names, spared, strict=True))
        settings = PlanSettings(
            method=self.method, normalization="question", length_scale=10, gate=self.settings.gate.at(self.step_number)
        )
        rewards, counts = np.array(rewards, dtype=float), Counter()
        past = self.lifecycle.past(groups, self.step_number)
        questions, read, counts = questions_of(
            groups, scored(rewards, length=10), self.reader, settings, self.step_number, past
        )
        made = plan(questions, settings)
        self.zones = {name: decision.zone for name, decision in zip(names, made.decisions, strict=True)}
        shown = {name: [] for name in names}
        for row in np.flatnonzero(made.kind == mixing.DEMO):
            shown[names[made.question[row]]].append(read[made.question[row]][made.index[row]][1]["place"])
        self.shown.append(shown)
        return self.lifecycle.remember(self.step_number, groups, questions, read, made, counts)


def number_text(name: str) -> str:
    return f"{number(name):016x}"


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
        asked.append(4 - trainer.spared["q"])
        zones.append(trainer.zones["q"])
        saved.append(metrics["hpt/history/tokens_saved"])
    assert asked == [4, 4, 1, 1, 4, 4]
    assert zones == ["demo", "demo", "demo", "rl", "rl", "demo"], "one rollout that fails: the demonstration"
    assert saved == [0, 0, 30, 30, 0, 0], "three rollouts of ten tokens each"
    assert metrics["hpt/history/tokens_saved_total"] == 60


def test_without_early_gate_nothing_is_put_on_verls_batch():
    assert Trainer().lifecycle.spared(["src"], [[{"role": "user", "content": "q"}]]) is None


def test_early_gate_respects_a_questions_own_number_of_rollouts():
    trainer = Trainer({"history": {"early_gate": {"after_failures": 1, "rollouts": 2}}}, n=8)
    trainer.step({"a": [0] * 8, "b": [0] * 8})
    prompts = [trainer.prompt(name) for name in ("a", "b", "new")]
    assert trainer.lifecycle.spared(["src"] * 3, prompts, [8, 1, 8]) == [6, 0, 0]


def learn(node, steps=60, questions=64, seed=0):
    """Half of the questions are hopeless; of the others, each demonstration lifts the chance of a rollout by 0.1."""
    draw, trainer = np.random.default_rng(seed), Trainer(node, n=8)
    names = [f"q{i}" for i in range(questions)]
    uses = Counter()
    for step in range(steps):
        batch = [names[(step * 16 + i) % questions] for i in range(16)]
        chances = {name: 0.0 if int(name[1:]) % 2 else min(0.1 * uses[name], 0.9) for name in batch}
        trainer.step({name: (draw.random(8) < chances[name]).astype(float) for name in batch})
        for name, places in trainer.shown[-1].items():
            uses[name] += bool(places)
    graduated = set(trainer.lifecycle.history.listing("graduated")["key"].tolist())
    return trainer, graduated, {number(name) for name in names if int(name[1:]) % 2 == 0}


def test_early_gate_on_half_hopeless_questions_saves_a_third_of_the_tokens_and_the_same_questions_graduate():
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
        trace.append((whole.zones, whole.spared))
    resumed = Trainer(node, demos=["a", "b", "c"])
    resumed.lifecycle.load(str(tmp_path))
    resumed.step_number = 9
    for step in range(9, 20):
        resumed.step(scores(step))
        assert (resumed.zones, resumed.spared) == trace[step]
    assert resumed.shown == whole.shown[9:]
    for name, value in whole.lifecycle.history.state_dict().items():
        assert np.array_equal(value, resumed.lifecycle.history.state_dict()[name]), name


def test_a_checkpoint_without_history_stops_a_run_that_needs_it(tmp_path, caplog):
    needs = Trainer({"history": {"cooldown": 3}, "demo": {"select": "round_robin"}}).lifecycle
    with pytest.raises(UserError, match=r"cooldown, hpt.demo.select=round_robin .* hpt.history.on_missing=empty"):
        needs.load(str(tmp_path))
    Trainer({"history": {"cooldown": 3, "on_missing": "empty"}}).lifecycle.load(str(tmp_path))
    Trainer().lifecycle.load(str(tmp_path))
    assert caplog.text.count("it starts empty") == 2


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"retire_after": 0}, "retire_after=0: must be null or at least 1"),
        ({"cooldown": -1}, "cooldown=-1: must be at least 0"),
        ({"early_gate": {"after_failures": 0}}, "after_failures=0: must be at least 1"),
        ({"early_gate": {"after_failures": 1, "rollouts": 0}}, "rollouts=0: must be at least 1"),
        ({"early_gate": {"rollouts": 2}}, "hpt.history.early_gate: needs after_failures"),
        ({"early_gate": {"after_failures": 1, "rollouts": 4}}, "spares nothing"),
        ({"retire_afer": 1}, "unknown key"),
    ],
)
def test_settings_that_make_no_sense_are_refused(node, message):
    with pytest.raises(UserError, match=message):
        Trainer({"history": node})
