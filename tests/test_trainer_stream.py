"""The door of the update where a file's demonstrations stand beside the batch's questions."""

import json
import math
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from batches import EOS, TOKENIZER, Rollouts, keys_there, likelihood, make_trainer, step, updated
from started_rows import by_key
from test_trainer_run import Checkpointed, Stock
from tiny_run import changed

from verl_hpt.errors import UserError
from verl_hpt.host.beside import FILE
from verl_hpt.host.trainer import hybrid
from verl_hpt.loss import WEIGHTS

ACTOR, ROLL, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
PSFT = "{kind: S, estimator: {mask: psft_clip, reference: old, advantage: unit}}"

pytestmark = pytest.mark.usefixtures("queue")


def experts(folder, targets, **columns) -> str:
    """A file with these demonstrations."""
    folder.mkdir(exist_ok=True)
    prompts = [[{"role": "user", "content": f"q{i}"}] for i in range(len(targets))]
    rows = {"data_source": ["expert"] * len(targets), "prompt": prompts, "target": targets, **columns}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "experts.parquet")
    return str(folder / "experts.parquet")


def streaming(folder, targets, *overrides, batch=2, method="++hpt.method=chord_mu", ranks=1, **columns):
    """A trainer whose stream is open, over a file with these demonstrations."""
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    files = f"++hpt.stream={{files: {experts(folder, targets, **columns)}, batch: {batch}}}"
    trainer = make_trainer(
        files, method, "data.filter_overlong_prompts=False", *overrides, folder=str(folder), ranks=ranks
    )
    trainer.tokenizer, trainer.processor, trainer.val_dataset = TOKENIZER, None, None
    trainer._open_stream()
    return trainer


def two_rollouts(**settings) -> Rollouts:
    return Rollouts(**settings).add("a", [1, 0], target="unread", answers=["yes", "no no"])


TEXTS = ["one", "twotwo"]
ENDED = [f"{text}<|im_end|>" for text in TEXTS]


def test_a_streams_demonstrations_are_rows_of_ours_beside_the_rollouts(tmp_path):
    """token, μ = 0.3: a rollout's token 0.7/(4 + 6), one of the stream's 0.3/(4 + 7)."""
    trainer, rollouts = streaming(tmp_path, TEXTS, "++hpt.demo_coef=0.3"), two_rollouts()
    meta, ranks, metrics = step(trainer, rollouts.batch([1, 0]))
    rows = by_key(meta, ranks)
    assert list(rows) == ["a_0_0", "a_1_0", *ENDED]
    assert [row["w_rl"] for row in rows.values()] == pytest.approx([0.07, 0.07, 0, 0])
    assert [row["w_entropy"] for row in rows.values()] == pytest.approx([0.07, 0.07, 0, 0])
    assert [row["w_demo"] for row in rows.values()] == pytest.approx([0, 0, 0.3 / 11, 0.3 / 11])
    assert [row["is_demo"] for row in rows.values()] == [0, 0, 1, 1]
    advantage = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert [row["advantage"] for row in rows.values()] == pytest.approx([advantage, -advantage, 0, 0])
    expected = {"rows/rollouts": 2, "rows/demos": 2, "questions": 1, "taught_share": 0, "stream/epoch": 1,
                "optimizer_steps": 1, "demo_to_rl_weight": 0.3 / 11 / 0.07, "history/questions": 1}  # fmt: skip
    assert {name: metrics[f"hpt/{name}"] for name in expected} == pytest.approx(expected)
    assert keys_there() == set(rollouts.keys) and not trainer.actor_rollout_wg.passes


def test_a_row_of_the_stream_has_the_tokens_that_a_rollout_of_its_prompt_would_have(tmp_path):
    trainer = streaming(tmp_path, TEXTS, "++data.apply_chat_template_kwargs={opening: 'calmly '}")
    rows = by_key(*step(trainer, two_rollouts().batch())[:2])
    for index, text in enumerate(ENDED):
        messages = [{"role": "user", "content": f"q{index}"}]
        prompt = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = [*TOKENIZER.encode(TEXTS[index]), EOS]
        assert TOKENIZER.decode(prompt) == f"<|im_start|>user\nq{index}<|im_end|>\n<|im_start|>assistant\n"
        assert rows[text]["prompts"].tolist() == prompt and rows[text]["responses"].tolist() == answer
        assert rows[text]["input_ids"].tolist() == prompt + answer
        assert rows[text]["response_mask"].tolist() == rows[text]["loss_mask"].tolist() == [1] * len(answer)
        assert rows[text]["old_log_probs"].tolist() == [0] * len(answer)
        assert (rows[text]["reward"], rows[text]["correct"]) == (1, 1)


def test_the_weight_of_a_stream_follows_its_schedule_and_is_told(tmp_path):
    """0.9 → 0.05 over 200 steps, cosine: 0.475 at step 100, 0.05 from step 200 on."""
    trainer = streaming(tmp_path, TEXTS)
    for at, mu in ((100, 0.475), (200, 0.05), (999, 0.05)):
        trainer.global_steps, rollouts = at, Rollouts().add(f"a{at}", [1, 0], answers=["yes", "no no"])
        meta, ranks, metrics = step(trainer, rollouts.batch())
        rows = by_key(meta, ranks)
        assert metrics["hpt/demo_coef"] == pytest.approx(mu)
        assert rows[f"a{at}_0_0"]["w_rl"] == pytest.approx((1 - mu) / 10)
        assert rows[ENDED[0]]["w_demo"] == pytest.approx(mu / 11)


def test_a_steered_weight_follows_the_entropy_of_the_steps_before(tmp_path):
    """0.5 + 0.01·(0.3 − 2.3) = 0.48 after a step whose entropy is 2.3 nats."""
    trainer, found = streaming(tmp_path, TEXTS, method="++hpt.method=amft_style"), []
    for at in (1, 2):
        metrics = {"actor/entropy": 2.3}
        trainer.global_steps = at
        trainer._update_actor(Rollouts().add(f"a{at}", [1, 0], answers=["yes", "no no"]).batch(), metrics)
        found.append((metrics["hpt/demo_coef"], trainer.plans[-1].plan.w_demo.max()))
    assert found == [(0.5, pytest.approx(0.5 / 11)), (0.48, pytest.approx(0.48 / 11))]
    with pytest.raises(RuntimeError, match="has no metric actor/entropy"):
        trainer._update_actor(Rollouts().add("b", [1]).batch(), {})


def test_a_streams_rows_are_dealt_over_the_optimizer_steps_each_with_its_own_normaliser(tmp_path):
    targets = ["a", "bb", "cccc"]
    trainer = streaming(tmp_path, targets, "++hpt.demo_coef=0.5", f"{ACTOR}.ppo_mini_batch_size=1", batch=3)
    rollouts = Rollouts().add("a", [1, 0], answers=["x", "yy"]).add("b", [1, 0], answers=["zzz", "yy"])
    meta, ranks, metrics = step(trainer, rollouts.batch())
    rows, size = updated(ranks), trainer.plans[0].plan.rows_per_step
    assert metrics["hpt/optimizer_steps"] == 2 and len(rows) == 2 * size and meta.extra_info["mini_batch_size"] == size
    counts = []
    for of_step in (rows[:size], rows[size:]):
        shown = [row for row in of_step if row["w_demo"]]
        tokens = sum(len(row["responses"]) for row in shown)
        assert [row["w_demo"] for row in shown] == pytest.approx([0.5 / tokens] * len(shown))
        own = [row for row in of_step if not row["is_demo"]]
        learning = sum(len(row["responses"]) for row in own)
        assert [row["w_rl"] for row in own] == pytest.approx([0.5 / learning] * 2)
        counts.append(len(shown))
    assert counts == [2, 1]


def test_a_stream_goes_through_its_file_in_the_order_of_the_seed_and_leaves_out_what_is_unusable(tmp_path):
    targets = [f"t{i}" for i in range(5)] + ["", None]
    trainer, seen, told = streaming(tmp_path, targets, "++hpt.seed=3"), [], []
    stream = trainer.hpt.beside.stream
    order = [f"t{i}" for i in stream.order() if i < 5]
    for at in range(1, 4):
        trainer.global_steps = at
        _, ranks, metrics = step(trainer, Rollouts().add(f"a{at}", [1]).batch())
        shown = [entry.ids for entry in trainer.plans[-1].beside]
        assert {tuple(row["responses"].tolist()) for row in updated(ranks) if row["w_demo"]} == set(map(tuple, shown))
        seen += [TOKENIZER.decode(ids[:-1]) for ids in shown]
        told.append([metrics.get(f"hpt/stream/{name}", 0) for name in ("unusable", "unusable/empty", "unusable/null")])
    assert seen[:5] == order and sorted(order) == [f"t{i}" for i in range(5)]
    assert stream.epoch == 1 and seen[5] == next(f"t{i}" for i in stream.order() if i < 5)
    again = stream.order()[: stream.position]
    expected = [2 + (5 in again) + (6 in again), 1 + (5 in again), 1 + (6 in again)]
    assert [sum(counts) for counts in zip(*told, strict=True)] == expected
    assert metrics["hpt/unusable_demos"] == 0, "those of the questions"


def test_old_log_probs_of_a_stream_are_those_of_verls_own_pass_where_its_term_reads_them(tmp_path):
    compose = f"++hpt.compose={{rollouts: grpo, demos: [{PSFT}], place: stream, when: always, normalization: token}}"
    cuts = [f"{ROLL}.log_prob_micro_batch_size_per_gpu=3", f"{ACTOR}.ppo_micro_batch_size_per_gpu=5"]
    trainer, rollouts = streaming(tmp_path, TEXTS, *cuts, method=compose, ranks=2), two_rollouts()
    _, ranks, metrics = step(trainer, rollouts.batch())
    ((passed, given),) = trainer.actor_rollout_wg.passes
    assert len(passed) == 6, "two demonstrations and four filling rows: ranks and micro-batches divide it"
    texts = {TOKENIZER.decode(row) for rank in given for row in rank["responses"].unbind()}
    assert texts == set(ENDED)
    shown = [row for row in updated(ranks) if row["w_demo"]]
    assert len(shown) == 2 and metrics["hpt/rows/padding"] == 6, "padding needs no pass"
    for row in shown:
        assert torch.equal(row["old_log_probs"], likelihood(row["responses"]).bfloat16())
        assert row["w_demo"] == pytest.approx(0.1 / 11)
    (own, *_) = [row for row in updated(ranks) if row["w_rl"]]
    assert own["w_rl"] == pytest.approx(1 / 10), "not convex"
    assert keys_there() == set(rollouts.keys)


def test_reference_log_probs_of_a_stream_are_those_of_a_pass(tmp_path):
    asft = "{kind: S, estimator: {advantage: unit, likelihood: anchored}}"
    compose = f"++hpt.compose={{rollouts: grpo, demos: [{asft}], place: stream, when: always}}"
    trainer = streaming(tmp_path, TEXTS, f"{ACTOR}.use_kl_loss=True", method=compose)
    rollouts = Rollouts().add("a", [1], answers=["x"], ref_log_prob=torch.full((2,), -5.0, dtype=torch.bfloat16))
    rows = by_key(*step(trainer, rollouts.batch())[:2])
    for text in ENDED:
        assert torch.equal(rows[text]["ref_log_prob"], likelihood(rows[text]["responses"]).bfloat16())
    assert rows["a_0_0"]["ref_log_prob"].tolist() == [-5, -5]


def test_a_stream_is_scored_at_a_temperature_of_one(tmp_path):
    trainer = streaming(tmp_path, TEXTS, f"{ROLL}.temperature=0.7", f"{ACTOR}.ppo_micro_batch_size_per_gpu=5")
    meta, ranks, _ = step(trainer, two_rollouts().batch())
    assert "temperature" in meta.fields and "temperature" not in meta.extra_info
    for row in updated(ranks):
        assert row["temperature"].item() == pytest.approx(1.0 if row["is_demo"] else 0.7)


def test_numbers_of_a_streams_tokens_stand_beside_them(tmp_path):
    """Weights of "ab" and its EOS, relative: mean 1. Rollouts have the blank."""
    trainer = streaming(tmp_path, ["ab"], "++hpt.demo.token_weights=w", batch=1, w=[[1.0, 1.0, 4.0]])
    rows = by_key(*step(trainer, Rollouts().add("a", [1], answers=["zz"]).batch())[:2])
    assert {key: row[WEIGHTS].tolist() for key, row in rows.items()} == {
        "a_0_0": [1, 1, 1],
        "ab<|im_end|>": [0.5, 0.5, 2],
    }


def test_a_stream_over_two_ranks_and_what_an_update_that_fails_leaves_behind(tmp_path):
    cut = f"{ACTOR}.ppo_micro_batch_size_per_gpu=3"
    trainer, rollouts = streaming(tmp_path, TEXTS, cut, ranks=2), two_rollouts().padding()
    meta, ranks, metrics = step(trainer, rollouts.batch([2, 0, 1]))
    assert [len(rank) for rank in ranks] == [3, 3] and metrics["hpt/rows/padding"] == 2
    assert sorted(key.startswith("hpt") for key in meta.keys) == [False] * 2 + [True] * 4
    assert keys_there() == set(rollouts.keys)

    def fail():
        assert len(keys_there()) == len(rollouts.keys) + 4
        raise OSError("out of memory")

    trainer.actor_rollout_wg.during = fail
    with pytest.raises(OSError, match="out of memory"):
        trainer._update_actor(rollouts.batch(), {})
    assert keys_there() == set(rollouts.keys)


# --- before training, and after a stop --------------------------------------------------------------------------------


class Stocked(Stock):
    """verl's trainer with what a stream needs of it."""

    columns = ("prompt", "data_source")

    def _init_dataloader(self):
        super()._init_dataloader()
        self.processor, self.val_dataset = None, None


def test_the_stream_is_opened_with_verls_datasets_and_the_training_data_needs_no_demonstrations(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    stream = f"++hpt.stream.files=[{experts(tmp_path, TEXTS)}, {experts(tmp_path / 'more', ['3', '4', '5'])}]"
    method = ["++hpt.method=chord_mu", f"actor_rollout_ref.model.path={tmp_path}", "data.filter_overlong_prompts=False"]
    trainer = hybrid(Stocked)(changed(*method, stream))
    trainer._init_dataloader()
    assert trainer.hpt.beside.stream.rows == 5 and trainer.hpt.beside.stream.batch == 64
    wrong = hybrid(Stocked)(changed(*method, stream, "++hpt.demo.key=answer"))
    with pytest.raises(UserError, match=r"hpt\.demo\.key='answer': hpt\.stream\.files have no such column; they have"):
        wrong._init_dataloader()
    plain = hybrid(Stock)(changed(*method[1:]))
    plain._open_stream()
    assert plain.hpt.beside.stream is None, "other methods open none"


def test_files_without_a_usable_demonstration_or_a_prompt_that_fits_stop_before_training(tmp_path):
    with pytest.raises(UserError, match=r"hpt\.stream\.files: no row has a usable demonstration"):
        streaming(tmp_path, ["", None])
    with pytest.raises(UserError, match=r"hpt\.stream\.files: no row is left; data\.max_prompt_length filters"):
        streaming(tmp_path, TEXTS, "data.filter_overlong_prompts=True", "data.max_prompt_length=1")


def test_a_run_that_goes_on_takes_the_demonstrations_that_would_have_come(tmp_path):
    targets, straight = [f"t{i}" for i in range(7)], []
    trainer = streaming(tmp_path, targets)
    trainer.actor_rollout_wg = Checkpointed()
    trainer.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    for at in range(1, 6):
        trainer.global_steps = at
        step(trainer, Rollouts().add(f"a{at}", [1]).batch())
        straight.append([entry.key for entry in trainer.plans[-1].beside])
        if at == 2:
            trainer._save_checkpoint()
            assert FILE in trainer.actor_rollout_wg.found[0], "before verl's marker file"
    resumed = streaming(tmp_path, targets)
    resumed.actor_rollout_wg, resumed.train_dataloader = Checkpointed(), trainer.train_dataloader
    resumed._load_checkpoint()
    assert resumed.global_steps == 2
    for at in range(3, 6):
        resumed.global_steps = at
        step(resumed, Rollouts().add(f"b{at}", [1]).batch())
    assert [[entry.key for entry in made.beside] for made in resumed.plans] == straight[2:]
