"""The hybrid trainer around its steps: questions that are drawn, checkpoints, construction."""

import logging
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from batches import (
    EOS,
    HERE,
    TOKENIZER,
    Rollouts,
    Workers,
    make_trainer,
    step,
)
from tiny_run import changed
from tiny_tokenizers import tiny

from verl_hpt.errors import UserError
from verl_hpt.history import FILE, identity
from verl_hpt.host.batch import SKIPPED
from verl_hpt.host.loss_fn import hpt_loss
from verl_hpt.host.trainer import ROLLOUTS, hybrid

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"

pytestmark = pytest.mark.usefixtures("queue")


# --- questions on their way to the rollouts ---------------------------------------------------------------------------


def drawn(trainer, names, **columns):
    """verl's next questions, from a data loader of one batch."""
    batch = {
        "raw_prompt": np.array([[{"role": "user", "content": f"{name}:"}] for name in names] + [None], dtype=object)[
            :-1
        ],
        "data_source": np.array(["src"] * len(names), dtype=object),
        **columns,
    }
    trainer.config.data.train_batch_size = len(names)
    trainer.train_dataloader_it = iter([batch])
    return trainer._next_train_batch()


def test_the_early_gate_tells_verl_how_many_rollouts_and_itself_how_many_it_skipped():
    trainer = make_trainer("++hpt.history.early_gate={after_failures: 1, rollouts: 1}", f"{ROLL}.n=5")
    step(trainer, Rollouts().add("hard", [0, 0], target="ab").add("half", [1, 0]).batch())
    batch = drawn(trainer, ["half", "hard", "new"])
    assert [batch[i][ROLLOUTS] for i in range(3)] == [5, 1, 5]
    assert [batch[i][SKIPPED] for i in range(3)] == [0, 4, 0]
    own = drawn(trainer, ["half", "hard"], **{ROLLOUTS: np.array([2, 3], dtype=object)})
    assert [own[i][ROLLOUTS] for i in range(2)] == [2, 1] and [own[i][SKIPPED] for i in range(2)] == [0, 2]


def test_without_an_early_gate_verls_questions_are_left_alone():
    batch = drawn(make_trainer(), ["a", "b"])
    assert ROLLOUTS not in batch and SKIPPED not in batch and len(batch) == 2


def test_skipped_rollouts_are_read_back_and_counted():
    trainer = make_trainer("++hpt.history.early_gate={after_failures: 1, rollouts: 1}", f"{ROLL}.n=5")
    rollouts = Rollouts().add("hard", [0], target="ab", answers=["xyz"], **{SKIPPED: 4})
    _, _, metrics = step(trainer, rollouts.batch())
    assert metrics["hpt/history/early_gated"] == 1 and metrics["hpt/history/tokens_saved"] == 16


def test_a_question_key_names_the_question():
    trainer = make_trainer("++hpt.question_key=id")
    step(trainer, Rollouts().add("u", [0, 0], target="ab", id="my question").batch())
    assert [group.key for group in trainer.plans[0].groups] == ["my question"]


def test_the_early_gate_finds_questions_by_the_column_that_names_them():
    """Two questions of one prompt, and one whose prompt was mended: before, the early gate went by the prompt."""
    trainer = make_trainer("++hpt.question_key=id", "++hpt.history.early_gate={after_failures: 1}", f"{ROLL}.n=5")
    rollouts = Rollouts().add("a", [0, 0], prompt="same:", id=1).add("b", [1, 0], prompt="same:", id=2)
    step(trainer, rollouts.add("c", [0, 0], prompt="before:", id=3).batch())
    assert sorted(trainer.hpt.lifecycle.history.records) == ["1", "2", "3"]
    batch = drawn(trainer, ["same", "same", "after", "new"], id=np.array([1, 2, 3, 4], dtype=object))
    assert [batch[i][SKIPPED] for i in range(4)] == [4, 0, 4, 0]


@pytest.mark.parametrize(("key", "columns"), [("id", {"id": None}), ("raw_prompt", {"raw_prompt": None})])
def test_a_row_that_names_no_question_stops_before_sampling_and_after_it(key, columns):
    """verl 0.9 writes ``raw_prompt`` into every row; one that lacks it is no row of verl's."""
    overrides = ["++hpt.question_key=id"] if key == "id" else []
    message = rf"question None \(data source 'src', index None\): its column '{key}'.* names no question"
    with pytest.raises(UserError, match=message):
        drawn(make_trainer(*overrides), ["a"], **{key: np.array([None], dtype=object)})
    with pytest.raises(UserError, match=message.replace("None", "0").replace("question 0", "question None")):
        step(make_trainer(*overrides), Rollouts().add("u", [0, 0], **columns).batch())


def same_messages(uid, prompt, scores) -> Rollouts:
    """Rollouts of one question, its prompt rendered to other tokens than at other draws."""
    return Rollouts().add(uid, scores, target="ab", prompt=prompt, raw_prompt=[{"role": "user", "content": "q:"}])


def test_a_template_that_writes_the_date_leaves_a_question_itself():
    trainer = make_trainer("++hpt.history.early_gate={after_failures: 2}", f"{ROLL}.n=5")
    for day in (1, 2):
        step(trainer, same_messages(f"u{day}", f"Today is the {day}. q:", [0, 0]).batch())
    (record,) = trainer.hpt.lifecycle.history.records.values()
    assert (record.drawn, record.failures, record.uses) == (2, 2, 2)
    assert [drawn(trainer, ["q"])[0][name] for name in (ROLLOUTS, SKIPPED)] == [1, 4]


def test_a_question_is_itself_before_sampling_after_it_and_in_the_dataset():
    trainer = make_trainer("++hpt.history.early_gate={after_failures: 1}", f"{ROLL}.n=5")
    step(trainer, same_messages("u", "tokens", [0, 0]).batch())
    row = {"data_source": "src", "prompt": [{"role": "user", "content": "q:", "name": None}]}
    assert list(trainer.hpt.lifecycle.history.records) == [identity(row, prompt_key="prompt")]
    assert drawn(trainer, ["q"])[0][SKIPPED] == 4


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Checkpointed(Workers):
    """Worker groups whose checkpoints are empty; notes whether our state was there before them."""

    def save_checkpoint(self, path, *_, **__):
        folder = Path(path).parent
        marker = folder.parent / "latest_checkpointed_iteration.txt"
        self.found = (sorted(os.listdir(folder)), marker.exists())

    def load_checkpoint(self, **_):
        pass


def resumable(folder, *overrides):
    trainer = make_trainer(*overrides, folder=str(folder))
    trainer.actor_rollout_wg = Checkpointed()
    trainer.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    return trainer


def test_our_state_is_written_before_verls_marker(tmp_path):
    trainer = resumable(tmp_path)
    trainer.global_steps = 3
    trainer._save_checkpoint()
    assert trainer.actor_rollout_wg.found == (["hpt_alarms.json", FILE], False)
    assert (tmp_path / "global_step_3" / FILE).exists()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_resuming_reads_the_history_of_the_checkpoint_that_verl_reads(tmp_path):
    trainer = resumable(tmp_path)
    for number in (1, 2):
        step(trainer, Rollouts().add(f"q{number}", [0, 0], target="ab").batch())
        trainer.global_steps = number
        trainer._save_checkpoint()
    shutil.copytree(tmp_path / "global_step_1", tmp_path / "elsewhere" / "global_step_1")
    shutil.rmtree(tmp_path / "global_step_1")

    latest = resumable(tmp_path)
    latest._load_checkpoint()
    assert latest.global_steps == 2 and latest.hpt.lifecycle.history.totals()["questions"] == 2
    path = f"trainer.resume_from_path={tmp_path}/elsewhere/global_step_1"
    chosen = resumable(tmp_path, "trainer.resume_mode=resume_path", path)
    chosen._load_checkpoint()
    assert chosen.global_steps == 1 and chosen.hpt.lifecycle.history.totals()["questions"] == 1


def test_a_run_resumed_with_another_tokenizer_and_template_finds_its_questions(tmp_path, caplog):
    gate = ("++hpt.history={early_gate: {after_failures: 1}, cooldown: 3}", f"{ROLL}.n=5")
    trainer = resumable(tmp_path, *gate)
    step(trainer, same_messages("u", "one template's tokens", [0, 0]).batch())
    trainer.global_steps = 1
    trainer._save_checkpoint()

    other = resumable(tmp_path, *gate, "++data.apply_chat_template_kwargs={enable_thinking: false}")
    other.hpt.bind_tokenizer(tiny("qwen3"))
    with caplog.at_level(logging.WARNING):
        other._load_checkpoint()
    assert not [record for record in caplog.records if record.name.startswith("verl_hpt")], "resumed without a word"
    assert drawn(other, ["q", "new"])[0][SKIPPED] == 4
    step(other, same_messages("v", "another template's tokens", [0]).batch())
    (record,) = other.hpt.lifecycle.history.records.values()
    assert (record.drawn, record.failures) == (2, 2)
    assert other.plans[0].counts["history/cooling"] == 1


@pytest.mark.parametrize("mode", ["auto", "disable"])
def test_a_run_from_scratch_reads_nothing(tmp_path, mode):
    trainer = resumable(tmp_path, f"trainer.resume_mode={mode}", "++hpt.history.cooldown=3")
    trainer._load_checkpoint()
    assert trainer.global_steps == 0 and trainer.hpt.lifecycle.history.totals()["questions"] == 0


# --- before training --------------------------------------------------------------------------------------------------


class Stock:
    """The least of verl's trainer that ours is built over."""

    columns = ("prompt", "target")

    def __init__(self, config):
        self.config, self.initialized = config, False

    def _init_dataloader(self):
        self.tokenizer = TOKENIZER
        self.train_dataset = SimpleNamespace(dataframe=SimpleNamespace(column_names=self.columns))
        self.train_dataloader = SimpleNamespace(collate_fn=lambda rows: {"rows": rows})
        self.val_dataloader = SimpleNamespace(collate_fn=lambda rows: {"rows": rows})

    def on_init_end(self):
        self.initialized = True


def test_our_trainer_keeps_the_name_of_verls_and_meets_tokenizer_columns_and_loss():
    config = changed(f"actor_rollout_ref.model.path={HERE}", f"{ACTOR}.clip_ratio_low=0.07")
    trainer = hybrid(Stock)(config)
    assert type(trainer).__name__ == "HybridStock" and trainer.config is config
    trainer._init_dataloader()
    assert trainer.hpt.eos == EOS and trainer.hpt.reader.tokenizer is TOKENIZER
    uneven = [{"target": [[1.0], [1.0, 2.0]]}]
    for loader in (trainer.train_dataloader, trainer.val_dataloader):
        assert isinstance(loader.collate_fn(uneven)["rows"][0]["target"], str), "packed on its way to verl"
    losses = []
    trainer.actor_rollout_wg = SimpleNamespace(set_loss_fn=losses.append)
    trainer.on_init_end()
    ((loss,),) = [losses]
    assert trainer.initialized and isinstance(loss, partial) and loss.func is hpt_loss
    assert loss.keywords["spec"].constants.clip_low == 0.07


def test_a_column_that_is_not_there_stops_before_any_model_loads():
    config = changed(f"actor_rollout_ref.model.path={HERE}", "++hpt.demo.key=answer")
    with pytest.raises(UserError, match=r"hpt\.demo\.key='answer': the training data has no such column"):
        hybrid(Stock)(config)._init_dataloader()


def test_ranks_are_asked_of_the_worker_group_once():
    trainer, asked = make_trainer(), []

    def query(name):
        asked.append(name)
        return [0, 0, 1, 1, 2, 2]

    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={}, _query_dispatch_info=query)
    assert trainer._ranks() == 3 == trainer._ranks() and asked == ["actor"]
