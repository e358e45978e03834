"""The history of questions, and what follows from it."""

import json
import os
import time
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from verl_hpt import config, history_report, mixing
from verl_hpt.errors import UserError
from verl_hpt.history import FILE, Draw, History, Index, number, numbers, prompt_number
from verl_hpt.lifecycle import SPARED, Lifecycle
from verl_hpt.mixing import PlanSettings, plan
from verl_hpt.questions import Group, Reader, questions_of

# --- the index --------------------------------------------------------------------------------------------------------


def test_index_agrees_with_a_dictionary_whatever_the_keys():
    """Random keys, consecutive ones and multiples of a power of two, in batches, known and unknown ones mixed."""
    draw = np.random.default_rng(0)
    random_keys = draw.integers(0, 2**64, 5000, dtype=np.uint64)
    for keys in (random_keys, np.arange(5000, dtype=np.uint64), np.arange(5000, dtype=np.uint64) << np.uint64(40)):
        index, known = Index(), {}
        for part in np.array_split(keys, 37):
            found = index.find(part)
            assert found.tolist() == [known.get(int(key), -1) for key in part]
            new = np.unique(part[found < 0])
            known |= {int(key): int(at) for key, at in zip(new, index.add(new), strict=True)}
        assert sorted(known.values()) == list(range(len(index)))
        assert index.find(keys).tolist() == [known[int(key)] for key in keys]
        assert (index.find(keys ^ np.uint64(2**63 + 2**20)) == -1).all()


def test_keys_that_are_sixteen_hex_digits_keep_their_number_and_others_are_hashed():
    assert number("00000000000000ff") == 255
    assert number("question 7") != number("question 8")
    assert number("question 7") == number("question 7")
    assert numbers([]).dtype == np.uint64


# --- what is remembered -----------------------------------------------------------------------------------------------


def observe(history, step, solved, taught=None, *, keys=None, n=4, on_rl=None):
    """One step in which question i had solved[i] of n rollouts solved; on demonstrations where none is, unless said."""
    solved = np.array(solved)
    taught = solved == 0 if taught is None else np.array(taught, dtype=bool)
    keys = np.arange(1, len(solved) + 1, dtype=np.uint64) if keys is None else np.array(keys, dtype=np.uint64)
    history.observe(
        step,
        Draw(
            keys, keys + np.uint64(1000), solved, np.full(len(solved), n), taught, ~taught if on_rl is None else on_rl
        ),
    )


def columns(history, *names, questions=1):
    found = history.look_up(np.arange(1, questions + 1, dtype=np.uint64), *names)
    return [values.tolist() for values in found]


def test_counts_of_draws_failures_and_uses_follow_the_steps():
    history = History()
    for step, solved in enumerate(([0, 4, 0], [0, 0, 1], [0, 0, 0]), 1):
        observe(history, step, solved)
    names = ("drawn", "failures", "uses", "solved", "rollouts", "drawn_at", "taught_at")
    assert columns(history, *names, questions=3) == [
        [3, 3, 3], [3, 2, 1], [3, 2, 2], [0, 0, 0], [4, 4, 4], [3, 3, 3], [3, 3, 3],
    ]  # fmt: skip
    assert columns(history, "drawn", "taught_at", questions=4)[0] == [3, 3, 3, 0], "an unknown question has zeros"


def test_graduated_once_a_taught_question_trains_on_solved_rollouts():
    """Question 1 is taught, then solved; 2 is solved from the start; 3 keeps unsolved rollouts (retired)."""
    history = History()
    observe(history, 1, [0, 2, 0])
    observe(history, 2, [1, 3, 0], taught=[False, False, False])
    assert history.listing("graduated")["key"].tolist() == [1]
    observe(history, 3, [0, 3, 1], taught=[True, False, True], on_rl=np.array([False, True, True]))
    assert history.listing("graduated")["key"].tolist() == [1], "taught while solved is no graduation"
    observe(history, 4, [0, 3, 1], taught=[True, False, False])
    assert sorted(history.listing("graduated")["key"].tolist()) == [1, 3]


def test_forgotten_while_a_solved_question_is_not_solved_now():
    history = History()
    observe(history, 1, [2, 0])
    assert history.totals() == {"questions": 2, "graduated": 0, "forgotten": 0, "hopeless": 1}
    observe(history, 2, [0, 0])
    observe(history, 3, [0, 0])
    assert history.listing("forgotten")["key"].tolist() == [1]
    assert history.listing("hopeless")["key"].tolist() == [2]
    assert len(history.listing("all")["key"]) == 2
    observe(history, 4, [1, 0])
    assert history.totals()["forgotten"] == 0
    with pytest.raises(UserError, match="graduated, forgotten, hopeless, all"):
        history.listing("solved")


def test_the_order_of_a_batch_leaves_no_trace():
    draw = np.random.default_rng(1)
    one, other = History(), History()
    for step in range(1, 9):
        keys = draw.integers(0, 300, 64, dtype=np.uint64)  # some twice in a batch
        solved, taught = draw.integers(0, 3, 64), draw.random(64) < 0.5
        turned = draw.permutation(64)
        observe(one, step, solved, taught, keys=keys)
        observe(other, step, solved[turned], taught[turned], keys=keys[turned])
        one.observe_demos(keys, solved)
        other.observe_demos(keys[turned], solved[turned])
    for name, value in one.state_dict().items():
        assert np.array_equal(value, other.state_dict()[name]), name


def test_a_question_twice_in_a_batch_is_two_draws():
    history = History()
    observe(history, 1, [0, 0], keys=[1, 1])
    assert columns(history, "drawn", "failures", "uses") == [[2], [2], [2]]


def test_counts_stop_at_the_largest_number_instead_of_starting_again():
    history = History()
    observe(history, 1, [0])
    history._rows["failures"][:] = 65535
    observe(history, 2, [0])
    assert columns(history, "failures") == [[65535]]


def test_uses_of_each_demonstration_are_counted_apart():
    history = History()
    history.observe_demos(numbers(["a", "a", "b"]), np.array([0, 2, 0]))
    history.observe_demos(numbers(["a", "a"]), np.array([2, 2]))
    assert history.demo_uses(numbers(["a", "b", "c", "a"]), np.array([3, 2, 0, 1])) == [[1, 0, 3], [1, 0], [], [1]]


def test_a_prompt_leads_to_its_question():
    history = History()
    prompt = prompt_number("gsm8k", [{"role": "user", "content": "2+2?"}])
    key = numbers(["0000000000000007"])
    history.observe(1, Draw(key, np.array([prompt], dtype=np.uint64), *(np.array([x]) for x in (0, 4, 1, 0))))
    assert prompt == prompt_number("gsm8k", [{"content": "2+2?", "role": "user"}])
    asked = np.array([prompt, prompt_number("other", [{"role": "user", "content": "2+2?"}])], dtype=np.uint64)
    assert history.look_up_prompts(asked, "failures")[0].tolist() == [1, 0]
    known, keys = history.keys_of_prompts(asked)
    assert known.tolist() == [True, False] and keys[0] == 7


# --- checkpoints ------------------------------------------------------------------------------------------------------


def some_history(questions=500, steps=6) -> History:
    draw, history = np.random.default_rng(2), History()
    for step in range(1, steps):
        keys = draw.integers(0, questions, 128, dtype=np.uint64)
        observe(history, step, draw.integers(0, 5, 128), draw.random(128) < 0.5, keys=keys)
        history.observe_demos(keys, draw.integers(0, 4, 128))
    history.tokens_saved = 12.5
    return history


def test_a_restored_history_is_the_same_and_goes_on_the_same(tmp_path):
    one = some_history()
    one.save(str(tmp_path / "global_step_5" / FILE))
    other = History.read(str(tmp_path / "global_step_5" / FILE))
    for _ in range(2):
        for name, value in one.state_dict().items():
            assert np.array_equal(value, other.state_dict()[name]) and value.dtype == other.state_dict()[name].dtype
        for history in (one, other):
            observe(history, 9, [0, 1, 2], keys=[5, 10**9, 3])
            history.observe_demos(numbers(["x"]), np.array([1]))
    assert os.listdir(tmp_path / "global_step_5") == [FILE], "nothing is left beside it"


def test_a_loaded_state_is_a_copy():
    one, other = some_history(), History()
    other.load_state_dict(one.state_dict())
    before = one.column("drawn").copy()
    observe(other, 9, [0] * 3, keys=one.state_dict()["keys"][:3])
    assert np.array_equal(one.column("drawn"), before)


def test_a_write_that_is_cut_off_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / FILE
    some_history().save(str(path))
    good = path.read_bytes()

    def cut_off(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(OSError, match="no space"):
        History().save(str(path))
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 100, lambda data: data[:-5000]],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / FILE
    some_history().save(str(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=str(path)):
        History.read(str(path))


def test_another_version_or_arrays_that_do_not_fit_are_refused():
    state = some_history().state_dict()
    with pytest.raises(UserError, match="version 2"):
        History().load_state_dict(state | {"version": np.array(2)})
    with pytest.raises(UserError, match="drawn has shape"):
        History().load_state_dict(state | {"drawn": state["drawn"][:-1]})
    with pytest.raises(UserError, match="without flags"):
        History().load_state_dict({name: value for name, value in state.items() if name != "flags"})


# --- size and speed ---------------------------------------------------------------------------------------------------


def test_history_is_small_and_a_steps_look_ups_are_quick():
    """107 bytes a question are 1 GiB at ten million; 1,024 look-ups take at most 10 ms of a step that takes seconds."""
    draw, history = np.random.default_rng(3), History()
    keys = np.unique(draw.integers(0, 2**64, 300_000, dtype=np.uint64))
    for part in np.array_split(draw.permutation(keys), 8):
        observe(history, 1, np.zeros(len(part)), keys=part)
    assert history.nbytes < 107 * len(keys)
    asked = draw.choice(keys, 1024)
    seconds = []
    for _ in range(20):
        start = time.thread_time()
        history.look_up(asked, "uses", "taught_at")
        history.look_up_prompts(asked + np.uint64(1000), "failures")
        history.demo_uses(asked, np.ones(1024, dtype=int))
        observe(history, 2, np.zeros(1024), keys=asked)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.01, seconds


# --- what follows from it ---------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a character; token 0 is EOS."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens=False):
        return [ord(character) for character in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, i):
        return "<eos>" if i == 0 else chr(i)


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
            groups, rewards, rewards, np.full(len(rewards), 10), self.reader, settings, self.step_number, past
        )
        made = plan(questions, settings)
        self.zones = {name: decision.zone for name, decision in zip(names, made.decisions, strict=True)}
        shown = {name: [] for name in names}
        for row in np.flatnonzero(made.kind == mixing.DEMO):
            shown[names[made.question[row]]].append(read[made.question[row]][made.index[row]][1]["place"])
        self.shown.append(shown)
        return self.lifecycle.remember(self.step_number, groups, questions, read, made, [1.0] * len(names), counts)


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


def test_the_command_lists_forgotten_questions_with_their_text(tmp_path, capsys):
    trainer = Trainer()
    for scores in ([1, 0, 0, 0], [0] * 4):
        trainer.step({"what is 2+2?": scores, "other": [0] * 4})
    trainer.lifecycle.save(str(tmp_path))
    rows = [{"data_source": "src", "prompt": trainer.prompt(name)} for name in ("unknown", "what is 2+2?", "other")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    arguments = [str(tmp_path), "--which", "forgotten", "--data", str(tmp_path / "train.parquet")]
    assert history_report.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["questions"], told["graduated"], told["forgotten"], told["hopeless"]) == (2, 0, 1, 1)
    assert [row["question"] for row in told["forgotten_questions"]] == ["row 1: what is 2+2?"]
    assert history_report.main(arguments) == 0
    assert "solved 0 of 4 at step 2, drawn 2 times, taught 1 (last at step 2)" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no column 'question'; it has data_source, prompt"):
        history_report.main([*arguments, "--prompt-key", "question"])
    with pytest.raises(UserError, match=r"nothing.npz: no history"):
        history_report.main([str(tmp_path / "nothing.npz")])


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
